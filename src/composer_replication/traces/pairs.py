"""Preference pairs: two actions at the same state, and the frozen reference's view of both."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from composer_replication.errors import DataError
from composer_replication.traces.row_reading import (
    check_keys,
    placed,
    require_number,
    require_state,
    require_text,
)
from composer_replication.traces.trace import Message, message_rows

# A sum of log-probs of near-certain tokens may round to a little above 0.
_MAX_LOGP = 1e-2


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
        if not self.state:
            raise DataError(
                f"Pair {self.source!r} has an empty state. Give the messages before the action."
            )
        if self.state[-1].role == "assistant":
            raise DataError(
                f"Pair {self.source!r}: the state ends with an assistant turn, "
                f"{self.state[-1].content[:60]!r}. That turn is an action; "
                "the state is what came before it."
            )
        if not self.chosen.strip() or not self.rejected.strip():
            side = "rejected" if self.chosen.strip() else "chosen"
            raise DataError(
                f"Pair {self.source!r} has an empty {side} action, so there is nothing to score. "
                "Give both actions, or drop the pair."
            )
        if self.chosen == self.rejected:
            raise DataError(
                f"Pair {self.source!r} prefers {self.chosen[:60]!r} over itself: no gradient can "
                "come of it. Drop pairs whose two actions are equal."
            )
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise DataError(
                f"Pair {self.source!r} has weight {self.weight}; it must be above 0 and finite. "
                "Drop a pair that should not count."
            )
        for side in ("chosen", "rejected"):
            logp = self.ref_chosen_logp if side == "chosen" else self.ref_rejected_logp
            if logp is not None and not -math.inf < logp <= _MAX_LOGP:
                raise DataError(
                    f"Pair {self.source!r}: ref_{side}_logp is {logp}; a log-prob is a finite "
                    "number of at most 0, and training would follow a wrong one. Leave it out to "
                    "have it scored; if scoring gave it, look for nan in the model's weights."
                )


PAIR_KEYS = frozenset({"state", "chosen", "rejected", "weight", "source"})
"""What a row of `pairs.jsonl` may say; its other keys are metadata."""

_REFERENCE_REASON = (
    "It holds for one reference model, and this run scores its own once and caches it. "
    "Leave it out, or give PreferencePair records to the trainer."
)
_REFUSED_KEYS = {"ref_chosen_logp": _REFERENCE_REASON, "ref_rejected_logp": _REFERENCE_REASON}


def pair_from_row(row: Mapping[str, object], where: str) -> PreferencePair:
    """A pair from one row of `pairs.jsonl` or of a dataset.

    Raises:
        DataError: a missing or misspelt key, or a value of the wrong kind; it names the place.
    """
    with placed(where):
        check_keys(row, PAIR_KEYS, _REFUSED_KEYS)
        return PreferencePair(
            state=require_state(row),
            chosen=require_text(row, "chosen"),
            rejected=require_text(row, "rejected"),
            weight=require_number(row, "weight", default=1.0),
            source=require_text(row, "source", default=""),
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
