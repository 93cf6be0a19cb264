"""`packed_parity`: the packed step's gradient is that of a forward for each role, term by term.

The whole loss, and each of its terms taken from the forward that all of them share, is
differentiated on the same micro-batch with opposite signs into the same `.grad`, so that what is
left is the difference. A term of small weight would not show in the whole.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

from torch import Tensor, nn

from composer_replication.experiments.channel_probe import (
    Inputs,
    computes_in_fp32,
    gradient_norm,
    policy_of,
    undisturbed,
    with_separate_forwards,
)
from composer_replication.experiments.trained_batches import few_rows
from composer_replication.runs.summary import Check
from composer_replication.training.trainer import ComposerReplicationTrainer

NAME = "packed_parity"
MAX_ERROR = 1e-3
"""Of the gradient's norm; fp32 sums in another order differ by 1e-5 to 1e-4."""
MAX_HALF_ERROR = 0.3
"""Half precision rounds every activation: two orders of the same sums differ by a tenth. A term
that is left out differs by 1."""
MAX_ROWS = 2
"""Rollouts compared: two of a prompt share it, more add nothing but time. Each comparison, of the
whole and of every term, costs two forwards and backwards of all that the micro-batch holds."""


def check_packed(
    trainer: ComposerReplicationTrainer, latest: Inputs, last: Mapping[str, Inputs]
) -> Check:
    """The verdict on micro-batches of the run.

    Args:
        trainer: packed; its weights, metrics and random states stay as they are.
        latest: the micro-batch whose whole loss is compared.
        last: for each term, `grpo` included, the last micro-batch in which it had something.
    """
    bound = MAX_ERROR if computes_in_fp32(trainer) else MAX_HALF_ERROR
    errors = {"the whole loss": _error(trainer, _whole_loss, latest)}
    errors |= {name: _error(trainer, partial(_term, name), inputs) for name, inputs in last.items()}
    worst = max(errors, key=errors.__getitem__)
    passed = errors[worst] <= bound
    cause = None
    if not passed:
        cause = (
            f"The packed gradient of {worst} differs from that of separate forwards by "
            f"{errors[worst]:.2g} of its norm. Set tree = 'off', and report the model: its "
            "attention does not follow the prefix tree."
        )
    return Check(NAME, passed=passed, value=errors[worst], bound=bound, cause=cause)


def _error(
    trainer: ComposerReplicationTrainer,
    loss_of: Callable[[ComposerReplicationTrainer, Inputs], Tensor],
    inputs: Inputs,
) -> float:
    """Norm of the difference of both gradients over that of the packed one."""
    inputs = few_rows(inputs, MAX_ROWS, prefers_one_prompt=True)
    with undisturbed(trainer):
        policy_of(trainer).train()
        trainer.accelerator.backward(loss_of(trainer, inputs))
        norm = gradient_norm(trainer)
        with with_separate_forwards(trainer):
            trainer.accelerator.backward(-loss_of(trainer, inputs))
        rest = gradient_norm(trainer)
    return rest / norm if norm > 0 else (0.0 if rest == 0 else math.inf)


def _whole_loss(trainer: ComposerReplicationTrainer, inputs: Inputs) -> Tensor:
    with trainer.compute_loss_context_manager():
        return trainer.compute_loss(cast(nn.Module, trainer.model_wrapped), inputs)


def _term(name: str, trainer: ComposerReplicationTrainer, inputs: Inputs) -> Tensor:
    """One term, read from the forward of the whole step."""
    model, names = cast(nn.Module, trainer.model_wrapped), tuple(trainer.channel_weights)
    with (
        trainer.compute_loss_context_manager(),
        trainer.packing.shared(model, inputs, names, trainer._open_teacher),
    ):
        if name == "grpo":
            return trainer._weighted_losses(model, inputs, ())
        return trainer._channel_loss(name, model, inputs)
