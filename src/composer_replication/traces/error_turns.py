"""From a trace to what trains: error turns become hint sites, and pairs where teachers agreed."""

import json
from collections import Counter

from composer_replication.traces.hints import HintSite, hint_from_error
from composer_replication.traces.pairs import PreferencePair
from composer_replication.traces.trace import Trace


def hint_sites_from_trace(trace: Trace) -> list[HintSite]:
    """A hint site for every error turn, in the order of the turns."""
    return [
        HintSite(
            state=trace.state(index),
            hint=hint_from_error(error),
            action=trace.messages[index].content,
            error_kind=error.kind,
            source=trace.source,
        )
        for index, error in sorted(trace.errors.items())
    ]


def pairs_from_trace(trace: Trace) -> list[PreferencePair]:
    """A pair for every error turn at which most teachers agreed on something else.

    Two calls are equal where their JSON is; the pair's weight is the share of teachers that agreed.
    A tie prefers nothing, and gives no pair.
    """
    pairs: list[PreferencePair] = []
    for index in sorted(trace.errors.keys() & trace.teacher_actions.keys()):
        rejected = trace.messages[index].content
        agreed = consensus(trace.teacher_actions[index])
        if agreed is not None and canonical_action(agreed[0]) != canonical_action(rejected):
            pairs.append(
                PreferencePair(
                    trace.state(index), agreed[0], rejected, weight=agreed[1], source=trace.source
                )
            )
    return pairs


def consensus(actions: tuple[str, ...]) -> tuple[str, float] | None:
    """The action of the most teachers and their share; None without a single most common one.

    Example: `consensus(('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', "stop"))`
    -> `('{"a": 1, "b": 2}', 2 / 3)`.
    """
    counts = Counter(canonical_action(action) for action in actions).most_common(2)
    if not counts or (len(counts) == 2 and counts[0][1] == counts[1][1]):
        return None
    first = next(action for action in actions if canonical_action(action) == counts[0][0])
    return first, counts[0][1] / len(actions)


def canonical_action(action: str) -> str:
    """The action with the spacing and key order of its JSON made the same; other text stripped."""
    try:
        return json.dumps(json.loads(action, object_pairs_hook=_unique), sort_keys=True)
    # RecursionError: a model may write a few hundred opening brackets.
    except (ValueError, RecursionError):
        return action.strip()


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) != len(pairs):
        # Python keeps the last of equal keys; such a text equals no call.
        raise ValueError("a key is given twice")
    return dict(pairs)
