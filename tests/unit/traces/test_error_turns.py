import pytest

from composer_replication.errors import DataError
from composer_replication.traces.error_turns import (
    canonical_action,
    consensus,
    hint_sites_from_trace,
    pairs_from_trace,
)
from composer_replication.traces.trace import Message, Trace, TurnError

MESSAGES = (
    Message("user", "Shown request"),
    Message("assistant", '{"shown": 1}'),
    Message("user", "Read a.py."),
    Message("assistant", '{"tool": "read", "path": "a.py"}'),
    Message("user", "error: unknown key"),
    Message("assistant", '{"tool": "read", "name": "a.py"}'),
    Message("user", "error: unknown key again"),
)
ERRORS = {
    5: TurnError("unknown_key", "Still wrong."),
    3: TurnError("unknown_key", 'Use the key "file".', '{"file": "b.py"}'),
}


def trace(**changes):
    values = {"messages": MESSAGES, "errors": ERRORS, "num_context_messages": 2, "source": "s"}
    return Trace(**(values | changes))


def test_each_error_turn_becomes_a_site_whose_state_ends_before_it():
    first, second = hint_sites_from_trace(trace())
    assert (first.state, first.action) == (MESSAGES[:3], MESSAGES[3].content)
    assert (second.state, second.action) == (MESSAGES[:5], MESSAGES[5].content)
    assert first.hint == 'Hint: Use the key "file". Example of a correct call: {"file": "b.py"}'
    assert (first.error_kind, first.source, first.is_on_policy) == ("unknown_key", "s", False)


def test_a_trace_without_errors_gives_nothing():
    assert hint_sites_from_trace(trace(errors={})) == []
    assert pairs_from_trace(trace(errors={}, teacher_actions={3: ("x",)})) == []


def test_the_teachers_agreed_action_is_chosen_with_the_share_that_agreed():
    actions = ('{"b": 2, "a": 1}', "stop", '{"a": 1,"b": 2}')
    (pair,) = pairs_from_trace(trace(teacher_actions={3: actions}))
    assert (pair.state, pair.chosen, pair.rejected) == (
        MESSAGES[:3],
        '{"b": 2, "a": 1}',
        MESSAGES[3].content,
    )
    assert pair.weight == pytest.approx(2 / 3)
    assert pair.source == "s"


def test_teachers_who_would_err_alike_or_who_disagree_give_no_pair():
    same = '{"path":"a.py","tool":"read"}'
    assert pairs_from_trace(trace(teacher_actions={3: (same,)})) == []
    assert pairs_from_trace(trace(teacher_actions={3: ("go", "stop")})) == []
    assert pairs_from_trace(trace(teacher_actions={3: ()})) == []


def test_consensus_needs_a_single_most_common_action():
    assert consensus(("a", "b", "b ")) == ("b", 2 / 3)
    assert consensus(("a",)) == ("a", 1.0)
    assert consensus(("a", "b")) is None
    assert consensus(()) is None


def test_json_is_equal_whatever_its_spacing_and_order_but_never_with_a_key_twice():
    assert canonical_action('{"b": 1,  "a": 2}') == canonical_action('{"a": 2, "b": 1}\n')
    assert canonical_action('{"a": 1, "a": 2}') != canonical_action('{"a": 2}')
    assert canonical_action("[" * 5000) == "[" * 5000


@pytest.mark.parametrize("index", [0, 1, 2, 7])
def test_an_error_at_what_is_no_action_of_the_run_is_refused(index):
    with pytest.raises(DataError, match=f"message {index} is no action"):
        trace(errors={index: TurnError("x", "y")})
