"""Makes the data of the call-format task: a script answers wrongly in the ways of a small model.

Each episode is one trace with one error turn; its hint comes from the environment's own error, and
its pair sets the right call against the wrong answer.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict

from composer_replication.environments.call_format import CallFormat
from composer_replication.environments.call_format_tasks import (
    CALL_KEYS,
    FormatSpec,
    FormatTask,
    call_text,
    format_task,
)
from composer_replication.experiments.task_rows import TaskRows
from composer_replication.traces.error_turns import hint_sites_from_trace, pairs_from_trace
from composer_replication.traces.trace import Message, Trace, TurnError, messages_from

SLIPS = (
    "prose",
    "bare_value",
    "shown_call",
    "other_key",
    "cut_value",
    "other_tool",
    "confused_tool",
    "left_out",
    "list_value",
)
"""The ways to err, the commonest of SmolLM2-135M first; an episode takes one of them."""


def call_format_rows(specs: Sequence[FormatSpec]) -> TaskRows:
    """The rows of the episodes of one split."""
    # Moving on by one a round, each slip meets each tool in 54 episodes.
    slips = [SLIPS[(index + index // len(CALL_KEYS)) % len(SLIPS)] for index in range(len(specs))]
    traces = [wrong_trace(spec, slip) for spec, slip in zip(specs, slips, strict=True)]
    return TaskRows(
        prompts=[{"prompt": format_task(spec).prompt(), **asdict(spec)} for spec in specs],
        hint_sites=[site for trace in traces for site in hint_sites_from_trace(trace)],
        pairs=[pair for trace in traces for pair in pairs_from_trace(trace)],
    )


def wrong_trace(spec: FormatSpec, slip: str) -> Trace:
    """One episode in which the script slips, with the right call as a teacher's."""
    task = format_task(spec)
    prompt = messages_from(task.prompt())
    action = _slipped(task, slip)
    environment = CallFormat()
    environment.reset(**asdict(spec))
    observation = environment._step_text(action)
    error = observation.error
    assert error is not None, f"{slip} is no mistake: {action}"
    return Trace(
        messages=(*prompt, Message("assistant", action), Message("tool", observation.content)),
        errors={
            len(prompt): TurnError(error.kind, error.message, error.example, error.demonstrations)
        },
        teacher_actions={len(prompt): (call_text(task.call),)},
        num_context_messages=len(prompt),
        source=f"{spec.split}-{spec.task_seed:04d}",
    )


def _slipped(task: FormatTask, slip: str) -> str:
    call = dict(task.call)
    key = list(call)[1]
    match slip:
        case "prose":
            return f"Sure. {task.request}"
        case "bare_value":
            return call[key]
        case "shown_call":
            return call_text(task.demos[-1][1] if task.demos else task.example)
        case "other_key":
            return json.dumps({f"{key}name" if part == key else part: call[part] for part in call})
        case "cut_value":
            return call_text(call | {key: call[key].rpartition("/")[2] + "_"})
        case "other_tool":
            return call_text(call | {"tool": f"{call['tool']}_file"})
        case "confused_tool":
            return call_text(call | {"tool": next(t for t in CALL_KEYS if t != call["tool"])})
        case "left_out":
            return call_text({part: call[part] for part in call if part != key})
        case "list_value":
            return json.dumps(call | {key: [call[key]]})
        case _:
            raise AssertionError(f"no slip {slip!r}")
