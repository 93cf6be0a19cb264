"""Traces from ATIF trajectories (Agent Trajectory Interchange Format, v1.x).

ATIF has no field for errors and teachers; producers write them under `extra`. What this project
reads there, at an agent's step: `composer = {"is_error", "error_kind", "error_message",
"error_example", "teacher_actions"}`. An observation's own `extra.is_error` counts as well.
"""

import json
from collections.abc import Iterable, Mapping
from typing import cast

from composer_replication.errors import DataError, shown
from composer_replication.traces.json_lines import Row
from composer_replication.traces.trace import Message, Role, Trace, TurnError

_ROLES: Mapping[object, Role] = {"system": "system", "user": "user", "agent": "assistant"}
MAX_ERROR_CHARS = 300
"""Of an observation that serves as an error's message; the rest of a log says little."""


def trace_from_atif(row: Mapping[str, object], where: str) -> Trace:
    """The trace of one trajectory.

    An action is the agent's message, followed by its tool calls as JSON, a line each, unless the
    message already is that call. Results of a step are one tool turn.

    Args:
        row: the trajectory.
        where: its place, for error texts.

    Raises:
        DataError: no steps, or a step of an unknown source or form; it names the step.
    """
    steps = row.get("steps")
    if not isinstance(steps, list) or not steps:
        raise DataError(
            f"{where}: 'steps' is {shown(steps)}; a trajectory has a list of at least one step. "
            "Give ATIF v1 trajectories, one a line."
        )
    messages: list[Message] = []
    errors: dict[int, TurnError] = {}
    teachers: dict[int, tuple[str, ...]] = {}
    num_context = 0
    for number, step in enumerate(cast(list[object], steps), start=1):
        place = f"{where}, step {number}"
        fields = _object(step, place)
        role = _ROLES.get(fields.get("source"))
        if role is None:
            raise DataError(
                f"{place}: the source is {shown(fields.get('source'))}; it must be system, user or "
                "agent. Correct it, or drop the trajectory."
            )
        results = _results(fields)
        index = len(messages)
        messages.append(Message(role, _action(fields) if role == "assistant" else _text(fields)))
        if results:
            messages.append(Message("tool", "\n".join(text for text, _ in results)))
        if fields.get("is_copied_context"):
            num_context = len(messages)
        elif role == "assistant":
            notes = _notes(fields)
            if error := _error(notes, results):
                errors[index] = error
            if actions := notes.get("teacher_actions"):
                teachers[index] = tuple(map(str, cast(Iterable[object], actions)))
    source = str(row.get("session_id") or row.get("trajectory_id") or where)
    return Trace(tuple(messages), errors, teachers, num_context, source)


def _object(value: object, place: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{place} is {shown(value)}; a step is an object. Correct it.")
    return cast(Row, value)


def _text(fields: Mapping[str, object]) -> str:
    """Text of a message or result: a string, or the text parts of a list."""
    content = fields.get("message", fields.get("content"))
    if isinstance(content, str) or content is None:
        return content or ""
    parts = cast(Iterable[Mapping[str, object]], content)
    return "\n".join(str(part["text"]) for part in parts if part.get("type") == "text")


def _action(fields: Mapping[str, object]) -> str:
    text = _text(fields)
    calls = [
        {"tool": call["function_name"], **cast(Row, call.get("arguments") or {})}
        for call in cast(Iterable[Row], fields.get("tool_calls") or ())
    ]
    try:
        is_said = calls == [json.loads(text)]
    except ValueError:
        is_said = False
    lines = [] if is_said else [json.dumps(call) for call in calls]
    return "\n".join(part for part in (text, *lines) if part)


def _results(fields: Mapping[str, object]) -> list[tuple[str, bool]]:
    """(text, whether it is marked as an error) of each result of a step."""
    observation = cast(Row, fields.get("observation") or {})
    results = cast(Iterable[Row], observation.get("results") or ())
    return [
        (_text(result), bool(cast(Row, result.get("extra") or {}).get("is_error")))
        for result in results
    ]


def _notes(fields: Mapping[str, object]) -> Row:
    return cast(Row, cast(Row, fields.get("extra") or {}).get("composer") or {})


def _error(notes: Row, results: list[tuple[str, bool]]) -> TurnError | None:
    failed = [text for text, is_error in results if is_error]
    if not (notes.get("is_error") or failed):
        return None
    said = "\n".join(failed or [text for text, _ in results])[:MAX_ERROR_CHARS]
    example = notes.get("error_example")
    return TurnError(
        kind=str(notes.get("error_kind") or "tool_error"),
        message=str(notes.get("error_message") or said or "The call failed."),
        example=None if example is None else str(example),
    )
