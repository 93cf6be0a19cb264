import json
from importlib import resources

import pytest

from composer_replication.errors import DataError
from composer_replication.traces.atif import MAX_ERROR_CHARS, trace_from_atif
from composer_replication.traces.error_turns import hint_sites_from_trace
from composer_replication.traces.hints import hint_site_row
from composer_replication.traces.trace import Message, TurnError


def agent(**fields):
    return {"step_id": 1, "source": "agent", "message": "", **fields}


def trajectory(*steps, **fields):
    return {
        "schema_version": "ATIF-v1.8",
        "session_id": "s1",
        "agent": {"name": "a", "version": "1"},
        "steps": [{"step_id": 1, "source": "user", "message": "Go."}, *steps],
        **fields,
    }


def call(name="read", **arguments):
    return {"tool_call_id": "c", "function_name": name, "arguments": arguments}


def result(content, **extra):
    return {"results": [{"source_call_id": "c", "content": content, "extra": extra}]}


def test_messages_calls_and_results_become_turns_in_order():
    trace = trace_from_atif(
        trajectory(
            agent(message="Reading.", tool_calls=[call(path="a")], observation=result("text")),
            agent(message="Done."),
        ),
        "f",
    )
    assert trace.messages == (
        Message("user", "Go."),
        Message("assistant", 'Reading.\n{"tool": "read", "path": "a"}'),
        Message("tool", "text"),
        Message("assistant", "Done."),
    )
    assert (trace.source, trace.errors, trace.teacher_actions) == ("s1", {}, {})


def test_a_call_that_the_message_already_is_comes_once():
    text = '{"path": "a", "tool": "read"}'
    trace = trace_from_atif(trajectory(agent(message=text, tool_calls=[call(path="a")])), "f")
    assert trace.messages[1].content == text


def test_parallel_calls_and_parts_of_text_are_lines():
    parts = [{"type": "text", "text": "one"}, {"type": "image", "source": {}}]
    two = {"results": [{"content": "r1"}, {"content": parts}]}
    step = agent(message=parts, tool_calls=[call(path="a"), call("stop")], observation=two)
    trace = trace_from_atif(trajectory(step), "f")
    assert trace.messages[1].content.split("\n") == [
        "one",
        '{"tool": "read", "path": "a"}',
        '{"tool": "stop"}',
    ]
    assert trace.messages[2].content == "r1\none"


def test_errors_come_from_the_notes_or_from_a_marked_result():
    notes = {
        "is_error": True,
        "error_kind": "unknown_key",
        "error_message": "Use file.",
        "error_example": "{}",
        "teacher_actions": ["x", "y"],
    }
    trace = trace_from_atif(
        trajectory(
            agent(message="a", extra={"composer": notes}, observation=result("error: no")),
            agent(message="b", observation=result("x" * 999, is_error=True)),
            agent(message="c", observation=result("fine", is_error=False)),
        ),
        "f",
    )
    assert trace.errors == {
        1: TurnError("unknown_key", "Use file.", "{}"),
        3: TurnError("tool_error", "x" * MAX_ERROR_CHARS),
    }
    assert trace.teacher_actions == {1: ("x", "y")}


def test_copied_context_is_state_and_never_an_error_turn():
    shown = agent(message="a", is_copied_context=True, observation=result("bad", is_error=True))
    trace = trace_from_atif(trajectory(shown, agent(message="b")), "f")
    assert (trace.errors, trace.num_context_messages) == ({}, 3)


def test_the_shipped_episodes_read_back_give_the_shipped_hint_sites():
    folder = resources.files("composer_replication.environments") / "data" / "api_drift"
    sites = [json.loads(line) for line in (folder / "hint_sites.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    for site, row in zip(sites, rows, strict=True):
        first = hint_site_row(hint_sites_from_trace(trace_from_atif(row, "f"))[0])
        for key in ("state", "action", "error_kind", "source"):
            assert first[key] == site[key]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({}, "f: 'steps' is None"),
        ({"steps": []}, "at least one step"),
        ({"steps": ["x"]}, "f, step 1 is 'x'"),
        ({"steps": [{"source": "tool"}]}, "f, step 1: the source is 'tool'"),
    ],
)
def test_what_is_no_trajectory_is_named_with_its_place(row, match):
    with pytest.raises(DataError, match=match):
        trace_from_atif(row, "f")
