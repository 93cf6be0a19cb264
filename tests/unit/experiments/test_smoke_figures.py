"""Verdicts and figures that follow from the rows of a run alone."""

import pytest

from composer_replication.experiments.run_figures import channel_checks, channel_figures, percentile

LIVE = {
    "tokens/grpo": 100.0, "reward_std": 0.1, "loss/grpo": 0.0,
    "tokens/sdpo": 30.0, "loss/sdpo": 0.02, "pairs/dpo": 2.0, "loss/dpo": 0.69,
}  # fmt: skip


def verdicts(**changes):
    return {check.name: check for check in channel_checks([LIVE | changes], ("sdpo", "dpo"))}


def test_live_channels_pass_though_on_policy_grpos_loss_is_0():
    assert all(check.passed for check in verdicts().values())


@pytest.mark.parametrize(
    ("changes", "name", "cause"),
    [
        ({"reward_std": 0.0}, "grpo", "no advantage differs from 0"),
        ({"tokens/sdpo": 0.0}, "sdpo", "No tokens reached sdpo"),
        ({"loss/sdpo": 0.0}, "sdpo", "exactly 0 at every step"),
        ({"pairs/dpo": 0.0}, "dpo", "No pairs reached dpo"),
    ],
)
def test_a_channel_that_did_nothing_fails_with_its_cause(changes, name, cause):
    found = verdicts(**changes)
    assert [n for n, check in found.items() if not check.passed] == [f"channels_live/{name}"]
    assert cause in found[f"channels_live/{name}"].cause


def test_figures_of_a_channel_without_rows_are_unknown_and_not_0():
    assert set(channel_figures([], "sdpo").values()) == {None}


def test_the_percentile_is_a_measured_value():
    assert percentile([5.0, 1.0, 4.0, 2.0, 3.0], 0.95) == 5.0
    assert percentile([1.0, 2.0], 0.5) == 2.0
    assert percentile([7.0], 0.95) == 7.0
