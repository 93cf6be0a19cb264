"""Credit files: what is written comes back, whole, and nothing else is taken for it."""

import json

import pytest

from composer_replication.errors import DataError
from composer_replication.runs.credit_files import read_credit, write_credit

ROLLOUT = {
    "schema": 1,
    "step": 7,
    "channel": "grpo",
    "context": "List /src.",
    "token_ids": [504, 2],
    # A line separator inside a token ends no line of the file.
    "tokens": ["l\u2028\ud55c\x85", "<end>"],
    "is_sampled": [True, False],
    "policy_logp": [-0.4, -0.1],
    "advantage": 0.5,
    "credit": [0.0625, 0.0],
}


def test_rows_come_back_as_they_were_written(tmp_path):
    path = write_credit(tmp_path / "credit", 7, [ROLLOUT, {**ROLLOUT, "advantage": -0.5}])
    assert path == tmp_path / "credit" / "step_000007.jsonl"
    assert read_credit(path) == [ROLLOUT, {**ROLLOUT, "advantage": -0.5}]


def test_a_second_write_of_a_step_replaces_the_first(tmp_path):
    write_credit(tmp_path, 7, [ROLLOUT, ROLLOUT])
    assert len(read_credit(write_credit(tmp_path, 7, [ROLLOUT]))) == 1


def test_a_figure_that_is_not_finite_is_null(tmp_path):
    path = write_credit(tmp_path, 1, [{**ROLLOUT, "credit": [float("nan"), float("inf")]}])
    assert read_credit(path)[0]["credit"] == [None, None]
    assert "NaN" not in path.read_text()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (json.dumps({**ROLLOUT, "schema": 2}), "line 2, has schema 2 and this version reads 1"),
        ('{"schema": 1, "ste', "line 2, is not a credit row"),
        ("[1]", "line 2, is not a credit row"),
    ],
)
def test_a_line_that_is_no_row_of_this_version_is_named(tmp_path, line, message):
    path = write_credit(tmp_path, 1, [ROLLOUT])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=message):
        read_credit(path)
