"""What a run's rows and gradients say about its channels."""

import math

import pytest

from composer_replication.experiments.live_channels import OwnGradient, check_channels

WEIGHTS = {"sdpo": 0.1, "dpo": 0.05}
GRADIENTS = {name: OwnGradient(1e-3) for name in ("grpo", "sdpo", "dpo")}


def row(step, **changes):
    values = {
        "step": step, "loss": 0.1 * 0.02 + 0.05 * 0.69, "grad_norm": 0.3,
        "loss/grpo": 0.0, "tokens/grpo": 100.0, "loss/sdpo": 0.02, "tokens/sdpo": 30.0,
        "loss/dpo": 0.69, "pairs/dpo": 2.0,
    }  # fmt: skip
    return {name: v for name, v in (values | changes).items() if v is not None}


def causes(rows, *, gradients=GRADIENTS, largest_advantage=0.5, alternates=False):
    """The causes of the channels that fail."""
    checks = check_channels(
        rows, WEIGHTS, gradients, largest_advantage=largest_advantage, alternates=alternates
    )
    assert [check.name for check in checks] == [f"channels_live/{name}" for name in GRADIENTS]
    return {check.name.removeprefix("channels_live/"): check.cause for check in checks
            if not check.passed}  # fmt: skip


def test_live_channels_pass_though_on_policy_grpos_loss_is_0():
    assert causes([row(1), row(2)]) == {}


@pytest.mark.parametrize(
    ("changes", "name", "cause"),
    [
        ({"loss/sdpo": math.nan}, "sdpo", "loss/sdpo was nan at step 2"),
        ({"loss/dpo": math.inf}, "dpo", "loss/dpo was inf at step 2"),
        ({"grad_norm": math.nan}, "grpo", "grad_norm was nan at step 2"),
        ({"loss": math.nan}, "grpo", "loss was nan at step 2"),
        ({"loss/dpo": None}, "dpo", "Step 2 lacks a dpo loss"),
        ({"loss": 0.1 * 0.02}, "dpo", "is not what is trained"),
        ({"loss": 0.05 * 0.69}, "sdpo", "is not what is trained"),
    ],
)
def test_one_wrong_row_among_right_ones_fails_the_channel_it_belongs_to(changes, name, cause):
    found = causes([row(1), row(2, **changes), row(3)])
    assert list(found) == [name]
    assert cause in found[name]


@pytest.mark.parametrize(
    ("gradient", "cause"),
    [
        (OwnGradient(0.0), "moves no weight"),
        (OwnGradient(math.nan), "moves no weight"),
        (OwnGradient(math.inf), "moves no weight"),
        (OwnGradient(1e-3, lost=1.0), "100% of the sdpo channel's own gradient is missing"),
        (OwnGradient(1e-3, lost=math.nan), "is missing"),
    ],
)
def test_a_channel_needs_a_gradient_of_its_own_that_arrives(gradient, cause):
    found = causes([row(1)], gradients=GRADIENTS | {"sdpo": gradient})
    assert list(found) == ["sdpo"]
    assert cause in found["sdpo"]


def test_a_channel_whose_gradient_could_not_be_taken_fails():
    gradients = {"grpo": OwnGradient(1.0), "dpo": OwnGradient(1.0)}
    assert "No micro-batch" in causes([row(1)], gradients=gradients)["sdpo"]


def test_without_any_advantage_grpo_is_dead_whatever_its_rewards_are():
    found = causes([row(1, reward_std=0.3)], largest_advantage=0.0)
    assert "no advantage differs from 0" in found["grpo"]


def test_channels_that_take_turns_have_a_loss_in_their_own_steps_alone():
    sdpo = {"loss/dpo": None, "pairs/dpo": 0.0, "loss": 0.1 * 0.02}
    dpo = {"loss/sdpo": None, "tokens/sdpo": 0.0, "loss": 0.05 * 0.69}
    turns = [row(1, **sdpo), row(2, **dpo), row(3, **sdpo)]
    assert causes(turns, alternates=True) == {}
    assert "gives it none there" in causes([*turns, row(4)], alternates=True)["sdpo"]
    assert "Step 2 lacks a sdpo loss" in causes(turns)["sdpo"]
    counted = [row(1, **sdpo | {"pairs/dpo": 2.0}), row(2, **dpo)]
    assert "not its turn" in causes(counted, alternates=True)["dpo"]
