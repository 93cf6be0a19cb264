"""Hint sites: a state, a short hint, and the action that the hint is about."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from composer_replication.errors import DataError, nearest
from composer_replication.traces.trace import Message, TurnError, message_rows, messages_from


@dataclass(frozen=True, slots=True)
class HintSite:
    """One error turn and the hint that would have helped.

    The student sees `state`; the teacher sees `state` with `hint` inserted; both score the same
    action tokens.

    Example:
        >>> site = HintSite(
        ...     state=(Message("user", "Read /src/app.py."),),
        ...     hint='The key is "file". Example: {"tool": "read", "file": "/b.txt"}',
        ...     action='{"tool": "read", "path": "/src/app.py"}',
        ... )
    """

    state: tuple[Message, ...]
    """What the model saw when it acted; never empty, never ends with an assistant turn."""
    hint: str
    """The empty hint inserts nothing: the teacher then sees the student's own context."""
    action: str
    """The erring action as text; where `action_ids` is given, its decoded form."""
    state_ids: tuple[int, ...] | None = None
    """Token ids of the state exactly as the sampler saw them; None: rendered once from `state`."""
    action_ids: tuple[int, ...] | None = None
    """Token ids of the action exactly as sampled, end-of-turn token included; None: rendered."""
    is_on_policy: bool = False
    """True where the policy being trained sampled the action."""
    error_kind: str = ""
    """The `TurnError.kind` at this action, for counting."""
    source: str = ""
    """Trace or episode id; splits never cut through a source."""

    def __post_init__(self) -> None:
        if not self.state:
            raise DataError(
                f"Hint site {self.source!r} has an empty state. "
                "Give the messages before the action."
            )
        if self.state[-1].role == "assistant":
            raise DataError(
                f"Hint site {self.source!r}: the state ends with an assistant turn, "
                f"{self.state[-1].content[:60]!r}. That turn is an action; "
                "the state is what came before it."
            )
        if not self.action and not self.action_ids:
            raise DataError(
                f"Hint site {self.source!r} has no action, so there is nothing to score."
            )


def hint_from_error(error: TurnError) -> str:
    """The hint text for a structured error; it carries the example call where there is one.

    Small models hardly follow a bare error message: on SmolLM2-135M a verbal hint moved the
    probability of the right key from 0.001 to 0.005, one with an example call to 0.89.
    """
    text = f"Hint: {error.message}"
    if error.example is not None:
        text += f" Example of a correct call: {error.example}"
    return text


_SITE_KEYS = frozenset({"state", "hint", "action", "error_kind", "source"})


def hint_site_from_row(row: Mapping[str, object], where: str) -> HintSite:
    """A hint site from one row of `hint_sites.jsonl` or of a dataset.

    Raises:
        DataError: a missing or unknown key, or a value of the wrong kind.
    """
    check_keys(row, _SITE_KEYS, where)
    return HintSite(
        state=require_state(row, where),
        hint=require_text(row, "hint", where),
        action=require_text(row, "action", where),
        error_kind=require_text(row, "error_kind", where, default=""),
        source=require_text(row, "source", where, default=""),
    )


def hint_site_row(site: HintSite) -> dict[str, object]:
    """The JSON row of a hint site (text only: exact ids belong to one tokenizer)."""
    row: dict[str, object] = {
        field.name: getattr(site, field.name) for field in fields(site) if field.name in _SITE_KEYS
    }
    row["state"] = message_rows(site.state)
    return row


def check_keys(row: Mapping[str, object], known: frozenset[str], where: str) -> None:
    """Refuse keys that nothing reads, naming the nearest known one."""
    for key in row:
        if key not in known:
            raise DataError(f"{where} has the unknown key {key!r}. {nearest(key, known)}")


def require_text(
    row: Mapping[str, object], key: str, where: str, default: str | None = None
) -> str:
    """The text under `key`, or a `DataError` that says what is there instead.

    A missing key, or the None that a dataset's column holds for it, is `default` where one is
    given.
    """
    value = default if row.get(key) is None and default is not None else row.get(key)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is {value!r}; it must be text.")
    return value


def require_state(row: Mapping[str, object], where: str) -> tuple[Message, ...]:
    """The messages under `state`."""
    value = row.get("state")
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"{where}: 'state' is {value!r}; it must be a list of chat messages.")
    return messages_from(value, where)
