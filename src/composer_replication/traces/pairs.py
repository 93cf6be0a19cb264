"""Preference pairs: two actions at the same state, and the frozen reference's view of both."""

from collections.abc import Mapping
from dataclasses import dataclass

from composer_replication.errors import DataError
from composer_replication.traces.hints import check_keys, require_state, require_text
from composer_replication.traces.trace import Message, message_rows


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A chosen and a rejected action at one state.

    Example:
        >>> pair = PreferencePair(
        ...     state=(Message("user", "Read /src/app.py."),),
        ...     chosen='{"tool": "read", "file": "/src/app.py"}',
        ...     rejected='{"tool": "read", "path": "/src/app.py"}',
        ... )
    """

    state: tuple[Message, ...]
    chosen: str
    rejected: str
    weight: float = 1.0
    """Trust in the preference, for instance the share of teachers that agreed; above 0."""
    ref_chosen_logp: float | None = None
    """Log-prob of the chosen action under the frozen reference, summed over its tokens, in nats."""
    ref_rejected_logp: float | None = None
    """The same for the rejected action; None until the reference has scored the pair."""
    source: str = ""
    """Trace or episode id; splits never cut through a source."""

    def __post_init__(self) -> None:
        if not self.state or self.state[-1].role == "assistant":
            raise DataError(
                f"Pair {self.source!r}: the state must end with a user, tool or system turn."
            )
        if not self.chosen or not self.rejected:
            raise DataError(
                f"Pair {self.source!r} has an empty action, so there is nothing to score."
            )
        if self.chosen == self.rejected:
            raise DataError(
                f"Pair {self.source!r} prefers {self.chosen[:60]!r} over itself: no gradient can "
                "come of it. Drop pairs whose two actions are equal."
            )
        if not self.weight > 0:
            raise DataError(f"Pair {self.source!r} has weight {self.weight}; it must be above 0.")


_PAIR_KEYS = frozenset({"state", "chosen", "rejected", "weight", "source"})


def pair_from_row(row: Mapping[str, object], where: str) -> PreferencePair:
    """A pair from one row of `pairs.jsonl` or of a dataset.

    Raises:
        DataError: a missing or unknown key, or a value of the wrong kind.
    """
    check_keys(row, _PAIR_KEYS, where)
    weight = row.get("weight", 1.0)
    if not isinstance(weight, int | float):
        raise DataError(f"{where}: 'weight' is {weight!r}; it must be a number above 0.")
    return PreferencePair(
        state=require_state(row, where),
        chosen=require_text(row, "chosen", where),
        rejected=require_text(row, "rejected", where),
        weight=float(weight),
        source=require_text(row, "source", where, default=""),
    )


def pair_row(pair: PreferencePair) -> dict[str, object]:
    """The JSON row of a pair; reference log-probs live in the cache, under their own key."""
    return {
        "state": message_rows(pair.state),
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "weight": pair.weight,
        "source": pair.source,
    }
