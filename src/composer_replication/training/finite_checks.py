"""nan and infinity, found before they reach the weights, and told with where they came from."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from composer_replication.errors import ModelError, TrainingError

_WHERE_TO_LOOK = {
    "grpo": "the rewards in rollouts/ and grpo.temperature",
    "sdpo": "the hint sites and sdpo.temperature",
    "dpo": "the pairs and their reference log-probs (delete reference_logps/ to score them anew)",
}


@torch.no_grad()
def refuse_non_finite_weights(model: nn.Module, spec: str) -> None:
    """Read every weight once: one nan would make every loss nan, steps later.

    Raises:
        ModelError: it names the first weight, and how many of its values are not finite.
    """
    for name, weight in model.named_parameters():
        # A sum is nan or infinite where any value is, and needs no memory; its own overflow is
        # told apart by looking again.
        if not torch.isfinite(weight.sum(dtype=torch.float32)):
            num_bad = int((~torch.isfinite(weight)).sum())
            if num_bad:
                raise ModelError(
                    f"{spec}: the weight {name} has {num_bad} of {weight.numel()} values that are "
                    "nan or infinite, so every loss would be. Take the weights from before the "
                    "training that broke them, or download them again."
                )


def non_finite_loss(
    losses: Mapping[str, float], inputs: Mapping[str, Tensor], step: int
) -> TrainingError:
    """The error of a step whose loss is not finite: the channel, the step, what to look at.

    Args:
        losses: of each channel in this micro-batch, over all ranks; they are not all finite.
        inputs: of this rank's micro-batch.
        step: the number of the step that was to be made, from 1.
    """
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    shown = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    bad_inputs = sorted(
        name
        for name, tensor in inputs.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    )
    if bad_inputs:
        places = ", ".join(_WHERE_TO_LOOK.get(name, f"the rows of {name}") for name in bad)
        cause = f"Its input {', '.join(bad_inputs)} is not finite. Look at {places}."
    else:
        cause = (
            "Its inputs are finite and the model's outputs are not. Lower grpo.learning_rate, set "
            "grpo.max_grad_norm = 1.0, or compute in fp32 with grpo.bf16 = false."
        )
    return TrainingError(
        f"The loss of step {step} is not finite in {' and '.join(bad)} ({shown}). "
        f"Nothing was updated. {cause}"
    )


def check_gradient_norm(norm: Tensor | float | None, step: int, *, has_loss_scaling: bool) -> None:
    """Stop before the optimizer reads a gradient that is not finite.

    transformers clips and steps whatever the norm is: a norm of nan makes every weight nan, an
    infinite one sets the step to 0 and what was infinite to nan.

    Args:
        norm: of all gradients before clipping; None: not known.
        step: the number of the step that was to be made, from 1.
        has_loss_scaling: fp16's scaler overflows to find its scale, and skips such steps itself.

    Raises:
        TrainingError: nan or infinite without loss scaling.
    """
    if norm is None or has_loss_scaling or math.isfinite(norm):
        return
    raise TrainingError(
        f"The gradient norm of step {step} is {float(norm)} while its loss is finite, so the "
        "backward pass overflowed. Nothing was updated. Lower grpo.learning_rate, compute in fp32 "
        "with grpo.bf16 = false, or raise sdpo.temperature and grpo.temperature if they are small."
    )
