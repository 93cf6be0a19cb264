"""Rows to records and back: named places, and keys that are metadata."""

import pytest

from composer_replication import HintSite, Message, PreferencePair
from composer_replication.errors import DataError
from composer_replication.traces.hints import (
    demonstrations_in,
    hint_from_error,
    hint_site_from_row,
    hint_site_row,
)
from composer_replication.traces.pairs import pair_from_row, pair_row
from composer_replication.traces.trace import TurnError

STATE = (Message("system", "s"), Message("user", "u"))
SITE = HintSite(STATE, "use file", "act", error_kind="unknown_key", source="ep1")
PAIR = PreferencePair(STATE, "good", "bad", weight=0.5, source="ep1")


def test_a_hint_site_survives_its_row():
    assert hint_site_from_row(hint_site_row(SITE), "x") == SITE


def test_a_pair_survives_its_row():
    assert pair_from_row(pair_row(PAIR), "x") == PAIR


def test_exact_ids_stay_out_of_rows_since_they_belong_to_one_tokenizer():
    assert set(hint_site_row(SITE)) == {"state", "hint", "action", "error_kind", "source"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hint": None, "hnit": "x"},
            "unknown key 'hnit'. Did you mean 'hint', which the row lacks?",
        ),
        (
            {"source": None, "sorce": "x"},
            "unknown key 'sorce'. Did you mean 'source', which the row lacks?",
        ),
        ({"action": None}, "'action' is None; it must be text."),
        ({"action": " \n"}, "Hint site 'ep1' has no action, so there is nothing to score."),
        ({"state": "hello"}, "'state' is 'hello'; it must be a list of chat messages"),
        ({"state": []}, "'state' is []; it must be a list of chat messages"),
        ({"state": ["hi"]}, "message 0 is 'hi'; a message is an object with 'role' and 'content'."),
        ({"state": [{"role": "user"}]}, "message 0: 'content' is None; it must be text."),
        ({"state": [{"role": 1, "content": ""}]}, "message 0: 'role' is 1; it must be text."),
        (
            {"state": [{"role": "usr", "content": ""}]},
            "message 0: the role is 'usr'. Did you mean 'user'?",
        ),
        (
            {"state": [{"role": "user", "content": "", "tool_calls": [{"name": "f"}]}]},
            "message 0 has 'tool_calls', and only 'content' is rendered: the call would be lost.",
        ),
        (
            {"state": [{"role": "assistant", "content": "act"}]},
            "Hint site 'ep1': the state ends with an assistant turn, 'act'.",
        ),
        (
            {"action_ids": [1, 2]},
            "the key 'action_ids' cannot come from a row. Exact ids belong to one tokenizer",
        ),
        (
            {"teacher_action": "other"},
            "the key 'teacher_action' cannot come from a row. "
            "Student and teacher score the same action",
        ),
    ],
)
def test_a_mistake_in_a_site_names_the_place_and_the_fix(change, message):
    with pytest.raises(DataError) as caught:
        hint_site_from_row(hint_site_row(SITE) | change, "hint_sites.jsonl, line 3")
    assert str(caught.value).startswith(f"hint_sites.jsonl, line 3: {message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": []}, "'state' is []; it must be a list of chat messages"),
        ({"chosen": ""}, "Pair 'ep1' has an empty chosen action, so there is nothing to score."),
        ({"rejected": " "}, "Pair 'ep1' has an empty rejected action"),
        ({"rejected": "good"}, "Pair 'ep1' prefers 'good' over itself"),
        ({"rejected": ["bad"]}, "'rejected' is ['bad']; it must be text."),
        ({"weight": "high"}, "'weight' is 'high'; it must be a finite number."),
        ({"weight": True}, "'weight' is True; it must be a finite number."),
        ({"weight": float("nan")}, "'weight' is nan; it must be a finite number."),
        ({"weight": -1}, "Pair 'ep1' has weight -1.0; it must be above 0 and finite."),
        (
            {"weight": None, "wieght": 2},
            "unknown key 'wieght'. Did you mean 'weight', which the row lacks?",
        ),
        ({"ref_chosen_logp": -1.0}, "the key 'ref_chosen_logp' cannot come from a row."),
    ],
)
def test_a_mistake_in_a_pair_names_the_place_and_the_fix(change, message):
    with pytest.raises(DataError) as caught:
        pair_from_row(pair_row(PAIR) | change, "pairs.jsonl, line 3")
    assert str(caught.value).startswith(f"pairs.jsonl, line 3: {message}")


def test_a_row_in_another_layout_is_told_what_it_lacks_and_has():
    row = {"prompt": [{"role": "user", "content": "u"}], "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError) as caught:
        pair_from_row(row, "pairs.jsonl, line 1")
    assert str(caught.value) == (
        "pairs.jsonl, line 1: there is no 'state' among its keys ('chosen', 'prompt', 'rejected'). "
        "Add it: the list of chat messages before the action, such as "
        '[{"role": "user", "content": "..."}].'
    )


def test_keys_of_ones_own_are_metadata():
    row = hint_site_row(SITE) | {"session": 7, "hints": ["a", "b"], "state_ids": None}
    assert hint_site_from_row(row, "x") == SITE


@pytest.mark.parametrize("logp", [0.5, float("nan"), float("-inf"), float("inf")])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_reference_log_prob_that_is_none_is_refused(logp, side):
    with pytest.raises(DataError, match=rf"ref_{side}_logp is {logp}; a log-prob is a finite"):
        PreferencePair(STATE, "good", "bad", **{f"ref_{side}_logp": logp})


def test_an_infinite_weight_is_refused():
    with pytest.raises(DataError, match="has weight inf; it must be above 0 and finite"):
        PreferencePair(STATE, "good", "bad", weight=float("inf"))


def test_a_dataset_column_that_is_none_counts_as_missing():
    row = hint_site_row(SITE) | {"error_kind": None, "source": None}
    assert hint_site_from_row(row, "x").source == ""


def test_a_hint_carries_the_corrected_call_where_there_is_one():
    error = TurnError("unknown_key", "read has no key 'path'.", '{"tool": "read", "file": "/b"}')
    assert hint_from_error(error) == (
        'Hint: read has no key \'path\'. Example of a correct call: {"tool": "read", "file": "/b"}'
    )
    assert hint_from_error(TurnError("k", "no.")) == "Hint: no."


def test_demonstrations_take_the_place_of_the_example_and_are_found_again():
    shown = (("Read b.py,\nthen stop.", '{"file": "b.py"}'), ("Read c.py.", '{"file": "c.py"}'))
    hint = hint_from_error(TurnError("unknown_key", 'Use "file".', '{"file": "d"}', shown))
    assert hint == (
        'Hint: Use "file".\nExample request: Read b.py,\nthen stop.\n'
        'Example of a correct call: {"file": "b.py"}\nExample request: Read c.py.\n'
        'Example of a correct call: {"file": "c.py"}'
    )
    assert demonstrations_in(hint) == ('Hint: Use "file".', list(shown))


@pytest.mark.parametrize(
    "hint",
    [
        'Hint: Use "file".',
        "Hint: no.\nExample request: Read b.py.",
        "Hint: no.\nExample request: Read b.py.\nExample request: c.\nExample of a correct call: x",
    ],
)
def test_a_hint_that_demonstrates_nothing_whole_is_advice_from_end_to_end(hint):
    assert demonstrations_in(hint) == (hint, [])
