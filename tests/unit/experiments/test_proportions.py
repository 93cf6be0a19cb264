"""Intervals against values worked out by hand, and the cases where a normal interval would fail."""

import numpy as np
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
    assert -1 <= forth.low <= 0.5 <= forth.high <= 1
    assert (back.low, back.high) == pytest.approx((-forth.high, -forth.low))
    # Pairs that agree leave less room than the same outcomes in another order.
    agree = paired_change([0.0, 1.0] * 12, [0.0, 1.0] * 12)
    cross = paired_change([0.0, 1.0] * 12, [1.0, 0.0] * 12)
    assert agree.change == cross.change == 0.0
    assert 0 < agree.high < cross.high
    assert agree.low == pytest.approx(-agree.high)


def pairs(both, lost, won, neither):
    before = [1.0] * (both + lost) + [0.0] * (won + neither)
    return before, [1.0] * both + [0.0] * lost + [1.0] * won + [0.0] * neither


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        # By hand: Wilson's bound of 24 of 24 is 24 / (24 + 1.96^2) = 0.8620; 1 - 0.1380 sqrt(2).
        ((0, 0, 24, 0), 0.804876, 1.0),
        # By hand: Wilson's bound of 0 of 3 is 1.96^2 / (3 + 1.96^2) = 0.5615; no rate is under 0,
        # so of each pair of limits one is the rate itself and adds nothing.
        ((0, 0, 0, 3), -0.561497, 0.561497),
        ((24, 0, 0, 0), -0.137976, 0.137976),
        # A known value of method 10, to its four digits.
        ((36, 2, 12, 0), 0.0569, 0.3404),
    ],
)
def test_newcombes_paired_interval_has_its_values(table, low, high):
    found = paired_change(*pairs(*table))
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(
    ("rate_before", "rate_after", "num_samples"),
    [(0.02, 0.95, 1), (0.5, 0.5, 1), (0.3, 0.7, 1), (0.02, 0.95, 4), (0.3, 0.7, 4)],
)
def test_the_interval_holds_the_true_change_at_least_93_times_in_100(
    rate_before, rate_after, num_samples
):
    rng = np.random.default_rng(0)
    num_held = 0
    for _ in range(1000):
        before, after = (
            (rng.binomial(num_samples, rate, 24) / num_samples).tolist()
            for rate in (rate_before, rate_after)
        )
        found = paired_change(before, after)
        num_held += found.low <= rate_after - rate_before <= found.high
    assert num_held >= 930


def test_samples_of_prompts_that_differ_are_covered_too():
    """Easy and hard prompts, each sampled four times by both models."""
    rng = np.random.default_rng(0)
    num_held = 0
    for _ in range(1000):
        easy = rng.random(24)
        before = rng.binomial(4, 0.6 * easy) / 4
        after = rng.binomial(4, 0.2 + 0.8 * easy) / 4
        found = paired_change(before.tolist(), after.tolist())
        num_held += found.low <= 0.2 + 0.2 * 0.5 <= found.high
    assert num_held >= 950


def test_samples_of_one_prompt_have_no_exact_test():
    found = paired_change([0.25, 0.5], [0.75, 0.5])
    assert (found.change, found.p_value, found.num_better) == (0.25, None, 1)
