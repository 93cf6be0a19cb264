"""Rows to records and back: strict keys, named places."""

import pytest

from composer_replication import HintSite, Message, PreferencePair
from composer_replication.errors import DataError
from composer_replication.traces.hints import hint_from_error, hint_site_from_row, hint_site_row
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
        ({"hnit": "x"}, "unknown key 'hnit'. Did you mean 'hint'"),
        ({"action": None}, "line 3: 'action' is None; it must be text"),
        ({"state": "hello"}, "must be a list of chat messages"),
        ({"state": []}, "must be a list of chat messages"),
        ({"state": [{"role": "user"}]}, "message 0.*needs a text 'role' and a text 'content'"),
        ({"state": [{"role": "usr", "content": ""}]}, "role 'usr'. Did you mean 'user'"),
    ],
)
def test_a_mistake_in_a_row_names_the_place_and_the_fix(change, message):
    with pytest.raises(DataError, match=message):
        hint_site_from_row(hint_site_row(SITE) | change, "hint_sites.jsonl, line 3")


def test_a_dataset_column_that_is_none_counts_as_missing():
    row = hint_site_row(SITE) | {"error_kind": None, "source": None}
    assert hint_site_from_row(row, "x").source == ""


def test_a_pair_row_refuses_a_weight_that_is_not_a_number():
    with pytest.raises(DataError, match="'weight' is 'high'"):
        pair_from_row(pair_row(PAIR) | {"weight": "high"}, "pairs.jsonl, line 1")


def test_a_hint_carries_the_corrected_call_where_there_is_one():
    error = TurnError("unknown_key", "read has no key 'path'.", '{"tool": "read", "file": "/b"}')
    assert hint_from_error(error) == (
        'Hint: read has no key \'path\'. Example of a correct call: {"tool": "read", "file": "/b"}'
    )
    assert hint_from_error(TurnError("k", "no.")) == "Hint: no."
