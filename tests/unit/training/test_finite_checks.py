"""nan and infinity are stopped before they reach the weights, by channel, step and place."""

import pytest
import torch

from composer_replication.errors import ModelError, TrainingError
from composer_replication.training.finite_checks import (
    check_gradient_norm,
    non_finite_loss,
    refuse_non_finite_weights,
)

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_one_value_in_the_last_weight_is_found(dtype, value):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)).to(dtype)
    refuse_non_finite_weights(model, "spec")
    with torch.no_grad():
        model[1].bias[2] = value
    with pytest.raises(ModelError, match=r"^spec: the weight 1\.bias has 1 of 3 values"):
        refuse_non_finite_weights(model, "spec")


def test_two_infinities_that_cancel_are_found():
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([INF, -INF]))
    with pytest.raises(ModelError, match="2 of 2 values"):
        refuse_non_finite_weights(model, "spec")


def test_finite_weights_whose_sum_overflows_pass():
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(3e38)
    refuse_non_finite_weights(model, "spec")


def loss_error(inputs, **losses):
    return str(non_finite_loss(losses, inputs, step=12))


def test_a_loss_that_is_not_finite_names_channel_step_and_what_to_look_at():
    inputs = {"advantages": torch.zeros(2), "completion_ids": torch.zeros(2, dtype=torch.long)}
    assert loss_error(inputs, grpo=0.25, sdpo=NAN) == (
        "The loss of step 12 is not finite in sdpo (grpo 0.25, sdpo nan). Nothing was updated. Its "
        "inputs are finite and the model's outputs are not. Lower grpo.learning_rate, set "
        "grpo.max_grad_norm = 1.0, or compute in fp32 with grpo.bf16 = false."
    )


def test_an_input_that_is_not_finite_is_named_with_its_place():
    inputs = {"dpo_chosen_ref_logprobs": torch.tensor([NAN]), "advantages": torch.zeros(1)}
    text = loss_error(inputs, grpo=0.0, dpo=NAN)
    assert "not finite in dpo" in text
    assert "Its input dpo_chosen_ref_logprobs is not finite. Look at the pairs" in text
    assert "the rows of mine" in loss_error({"x": torch.tensor([INF])}, mine=INF)


@pytest.mark.parametrize("norm", [NAN, INF, torch.tensor(NAN)])
def test_a_gradient_that_is_not_finite_stops_before_the_step(norm):
    with pytest.raises(TrainingError, match=r"gradient norm of step 3 is (nan|inf) while its loss"):
        check_gradient_norm(norm, 3, has_loss_scaling=False)
    # fp16's scaler finds its scale by overflowing, and skips those steps itself.
    check_gradient_norm(norm, 3, has_loss_scaling=True)


@pytest.mark.parametrize("norm", [0.0, 1e30, torch.tensor(2.5), None])
def test_a_finite_or_unknown_norm_passes(norm):
    check_gradient_norm(norm, 3, has_loss_scaling=False)
