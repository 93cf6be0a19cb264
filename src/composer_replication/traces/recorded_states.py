"""From a trace to prompts: the states at which the policy acts anew, with what judges it."""

from collections.abc import Mapping

from composer_replication.traces.error_turns import canonical_action, consensus
from composer_replication.traces.json_lines import Row
from composer_replication.traces.trace import Trace, message_rows


def recorded_state_rows(trace: Trace) -> list[Row]:
    """A row of `prompts.jsonl` for every error turn at which most teachers agreed otherwise.

    The policy acts at the state anew; what the teachers did judges it, and the recorded error is
    what it is told where it errs.
    """
    rows: list[Row] = []
    for index in sorted(trace.errors.keys() & trace.teacher_actions.keys()):
        actions, error = trace.teacher_actions[index], trace.errors[index]
        recorded = trace.messages[index].content
        agreed = consensus(actions)
        if agreed is None or canonical_action(agreed[0]) == canonical_action(recorded):
            continue
        rows.append(
            {
                "prompt": message_rows(trace.state(index)),
                "teacher_actions": list(actions),
                "recorded_action": recorded,
                "error_kind": error.kind,
                "error_message": error.message,
                "error_example": error.example or "",
                "source": trace.source,
            }
        )
    return rows


def replayed_state_rows(trace: Trace, episode: Mapping[str, object]) -> list[Row]:
    """A row for every action of the run, judged by the environment that it came from.

    Args:
        trace: recorded in an environment.
        episode: what its `reset` took.
    """
    actions = [
        index
        for index, message in enumerate(trace.messages)
        if message.role == "assistant" and index >= trace.num_context_messages
    ]
    return [
        {
            "prompt": message_rows(trace.state(index)),
            "episode": dict(episode),
            "past_actions": [trace.messages[past].content for past in actions[:position]],
            "source": trace.source,
        }
        for position, index in enumerate(actions)
    ]
