"""Hint sites: a state, a short hint, and the action that the hint is about."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Protocol

from composer_replication.errors import DataError
from composer_replication.traces.row_reading import (
    check_keys,
    placed,
    require_state,
    require_text,
)
from composer_replication.traces.trace import Message, message_rows

EXAMPLE_MARK = "Example of a correct call: "
"""What follows its last place in a hint is an action."""
REQUEST_MARK = "\nExample request: "
"""Begins a demonstration in a hint: a request, then `EXAMPLE_MARK` and its action on a new line."""


class ToldError(Protocol):
    """What a hint is made of: a `TurnError`, or the error of an environment."""

    @property
    def message(self) -> str:
        """One sentence."""
        ...

    @property
    def example(self) -> str | None:
        """A right call on other arguments."""
        ...

    @property
    def demonstrations(self) -> tuple[tuple[str, str], ...]:
        """(request, right call) of other requests."""
        ...


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
        if not self.action.strip() and not self.action_ids:
            raise DataError(
                f"Hint site {self.source!r} has no action, so there is nothing to score. "
                "Give the action that erred, or drop the site."
            )


def hint_from_error(error: ToldError) -> str:
    """The hint text for a structured error, with its demonstrations, or else its example.

    Small models hardly follow a bare error message: on SmolLM2-135M a verbal hint moved the
    probability of the right key from 0.001 to 0.005, one with an example call to 0.89.

    Example:
        >>> hint_from_error(TurnError("unknown_key", 'Use the key "file".', "read file=b.py"))
        'Hint: Use the key "file". Example of a correct call: read file=b.py'
    """
    text = f"Hint: {error.message}"
    for request, action in error.demonstrations:
        text += f"{REQUEST_MARK}{request}\n{EXAMPLE_MARK}{action}"
    if error.example is not None and not error.demonstrations:
        text += f" {EXAMPLE_MARK}{error.example}"
    return text


def demonstrations_in(hint: str) -> tuple[str, list[tuple[str, str]]]:
    """The advice of a hint, and what it demonstrates: (request, action), in order.

    The request is empty where the hint gives an action alone. A hint that demonstrates nothing is
    advice from end to end.

    Example:
        >>> demonstrations_in('Use "file". Example of a correct call: read file=b.py')
        ('Use "file".', [('', 'read file=b.py')])
    """
    advice, *blocks = hint.split(REQUEST_MARK)
    parts = [block.partition(f"\n{EXAMPLE_MARK}") for block in blocks]
    if parts and all(mark for _, mark, _ in parts):
        return advice.rstrip(), [(request, action) for request, _, action in parts]
    advice, mark, action = hint.rpartition(EXAMPLE_MARK)
    return (advice.rstrip(), [("", action)]) if mark and not parts else (hint, [])


SITE_KEYS = frozenset({"state", "hint", "action", "error_kind", "source"})
"""What a row of `hint_sites.jsonl` may say; its other keys are metadata."""

_IDS_REASON = (
    "Exact ids belong to one tokenizer, and a row is text. "
    "Leave it out, or give HintSite records to the trainer."
)
_ACTION_REASON = (
    "Student and teacher score the same action, the one that erred. Give that one as 'action'; "
    "what would have been better goes into 'hint', or into a preference pair."
)
_REFUSED_KEYS = {
    "state_ids": _IDS_REASON,
    "action_ids": _IDS_REASON,
    "student_action": _ACTION_REASON,
    "teacher_action": _ACTION_REASON,
    "is_on_policy": (
        "A recorded action is not the policy's own. Leave it out; with sdpo.actions = 'resampled' "
        "the policy answers anew."
    ),
}


def hint_site_from_row(row: Mapping[str, object], where: str) -> HintSite:
    """A hint site from one row of `hint_sites.jsonl` or of a dataset.

    Raises:
        DataError: a missing or misspelt key, or a value of the wrong kind; it names the place.
    """
    with placed(where):
        check_keys(row, SITE_KEYS, _REFUSED_KEYS)
        return HintSite(
            state=require_state(row),
            hint=require_text(row, "hint"),
            action=require_text(row, "action"),
            error_kind=require_text(row, "error_kind", default=""),
            source=require_text(row, "source", default=""),
        )


def hint_site_row(site: HintSite) -> dict[str, object]:
    """The JSON row of a hint site (text only: exact ids belong to one tokenizer)."""
    row: dict[str, object] = {
        field.name: getattr(site, field.name) for field in fields(site) if field.name in SITE_KEYS
    }
    row["state"] = message_rows(site.state)
    return row
