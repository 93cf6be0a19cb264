"""Intervals against values worked out by hand, and the cases where a normal interval would fail."""

import pytest

from composer_replication.experiments.proportions import paired_change, proportion


@pytest.mark.parametrize(
    ("outcomes", "low", "high"),
    [
        ([1.0, 0.0, 1.0, 1.0], 0.300642, 0.954413),
        ([0.0] * 20, 0.0, 0.161125),
        ([1.0] * 20, 0.838875, 1.0),
        ([0.5, 0.5], 0.094531, 0.905469),
    ],
)
def test_wilsons_interval_has_its_textbook_values(outcomes, low, high):
    found = proportion(outcomes)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-6)
    assert found.rate == sum(outcomes) / len(outcomes)
    assert found.num_prompts == len(outcomes)


def test_mcnemar_counts_changed_prompts_alone():
    before = [0.0] * 8 + [1.0] * 50
    after = [1.0] * 7 + [0.0] + [1.0] * 50
    found = paired_change(before, after)
    assert (found.num_better, found.num_worse) == (7, 0)
    assert found.p_value == pytest.approx(2 / 2**7)
    assert paired_change([1.0, 0.0], [0.0, 1.0]).p_value == 1.0


def test_a_change_keeps_its_sign_and_its_pairs():
    before, after = [0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]
    forth, back = paired_change(before, after), paired_change(after, before)
    assert (forth.change, back.change) == (0.5, -0.5)
    assert 0 <= forth.low <= 0.5 <= forth.high <= 1
    # Unpaired, the same two sets of outcomes would leave room for no change at all.
    same = paired_change(before, before)
    assert (same.change, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_samples_of_one_prompt_have_no_exact_test():
    found = paired_change([0.25, 0.5], [0.75, 0.5])
    assert (found.change, found.p_value, found.num_better) == (0.25, None, 1)
