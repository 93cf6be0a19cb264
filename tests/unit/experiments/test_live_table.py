"""The live table shows the few numbers that matter and says once what looks odd."""

import io

import pytest
from rich.console import Console

from composer_replication.experiments.live_table import LiveTable, remarks

ROW = {
    "step": 3,
    "reward": 0.25,
    "loss/grpo": 0.01,
    "loss/sdpo": 0.02,
    "loss/dpo": 0.69,
    "grad_norm": 1.5,
    "tokens/sdpo": 40.0,
    "pairs/dpo": 2.0,
    "step_s": 7.5,
    "peak_gib": 3.25,
}


def shown(*rows, **options):
    stream = io.StringIO()
    table = LiveTable(Console(file=stream, width=200), **options)
    for row in rows:
        table.add(row)
    return stream.getvalue()


def test_a_row_that_looks_right_gets_no_remark():
    assert remarks(ROW) == {}
    assert len(shown(ROW).splitlines()) == 2  # the header and the row


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"loss/grpo": 1e-9}, "normal on-policy"),
        ({"frac_reward_zero_std": 1.0}, "every group's rewards were equal"),
        ({"tokens/sdpo": 0.0}, "SDPO was 0"),
        ({"pairs/dpo": 0.0}, "DPO was 0"),
        ({"completions/clipped_ratio": 0.75}, "75% of the rollouts were cut off"),
    ],
)
def test_an_odd_number_gets_one_plain_sentence_and_only_once(change, sentence):
    text = shown(ROW | change, ROW | change)
    assert text.count(sentence) == 1


def test_rows_of_fixed_shape_are_not_called_cut_off():
    assert "cut off" not in shown(ROW | {"completions/clipped_ratio": 1.0}, is_sampled=False)


def test_a_channel_that_is_off_shows_a_dash_and_never_a_zero():
    row = {name: value for name, value in ROW.items() if "dpo" not in name or "sdpo" in name}
    cells = shown(row).splitlines()[1].split()
    assert cells.count("-") == 2  # its loss and its pairs
