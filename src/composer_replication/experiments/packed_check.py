"""`packed_parity`: the packed step's loss and gradient are those of a forward for each role.

Both whole losses are differentiated on the same micro-batch with opposite signs into the same
`.grad`, so that what is left is their difference.
"""

import math
from typing import cast

import torch
from torch import nn

from composer_replication.experiments.channel_probe import (
    Inputs,
    computes_in_fp32,
    gradient_norm,
    policy_of,
    undisturbed,
    with_separate_forwards,
)
from composer_replication.runs.summary import Check
from composer_replication.training.trainer import ComposerReplicationTrainer

NAME = "packed_parity"
MAX_ERROR = 1e-3
"""Of the gradient's norm; fp32 sums in another order differ by 1e-5 to 1e-4."""
MAX_HALF_ERROR = 0.3
"""Half precision rounds every activation: two orders of the same sums differ by a tenth."""


def check_packed(trainer: ComposerReplicationTrainer, inputs: Inputs) -> Check:
    """The verdict on a micro-batch of the run.

    Args:
        trainer: packed; its weights, metrics and random states stay as they are.
        inputs: the micro-batch, with the tensors of every channel.
    """
    bound = MAX_ERROR if computes_in_fp32(trainer) else MAX_HALF_ERROR
    with undisturbed(trainer):
        policy_of(trainer).train()
        loss = _backward(trainer, inputs, sign=1)
        norm = gradient_norm(trainer)
        with with_separate_forwards(trainer):
            separate_loss = _backward(trainer, inputs, sign=-1)
        rest = gradient_norm(trainer)
    error = rest / norm if norm > 0 else (0.0 if rest == 0 else math.inf)
    passed = error <= bound
    cause = None
    if not passed:
        cause = (
            f"The packed loss is {loss:.6g} and that of separate forwards {separate_loss:.6g}, and "
            f"their gradients differ by {error:.2g} of their norm. Set tree = 'off', and report "
            "the model: its attention does not follow the prefix tree."
        )
    return Check(NAME, passed=passed, value=error, bound=bound, cause=cause)


def _backward(trainer: ComposerReplicationTrainer, inputs: Inputs, *, sign: int) -> float:
    with trainer.compute_loss_context_manager():
        loss: torch.Tensor = trainer.compute_loss(cast(nn.Module, trainer.model_wrapped), inputs)
    trainer.accelerator.backward(sign * loss)
    return float(loss.detach())
