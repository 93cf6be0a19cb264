"""`zero_weight_parity`: with every extra channel off the step is TRL's, bit for bit on a CPU.

Both losses are differentiated on the same rollouts from the same random state. The two gradients go
into the same `.grad` with opposite signs: what is left is their difference, and no second copy of
the weights is needed.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from composer_replication.experiments.channel_probe import (
    Inputs,
    gradient_norm,
    policy_of,
    trainable,
    undisturbed,
    with_separate_forwards,
)
from composer_replication.experiments.live_channels import OwnGradient
from composer_replication.experiments.random_states import RandomStates
from composer_replication.experiments.trained_batches import few_rows
from composer_replication.runs.summary import Check
from composer_replication.step.channels import CHANNELS
from composer_replication.training.channel_weights import channel_weights
from composer_replication.training.trainer import ComposerReplicationTrainer
from composer_replication.training.trl_hooks import GRPOTrainer

NAME = "zero_weight_parity"
MAX_ROWS = 2
"""Rollouts compared; each costs two forwards and backwards."""
NUM_REPEATS = 3
"""Identical TRL runs whose differences are measured where CUDA's sums have no fixed order."""


@dataclass(frozen=True, slots=True)
class _Difference:
    """Between two losses, in absolute values, and where the gradients differ most."""

    loss: float
    gradient: float
    parameter: str
    same_random_state: bool

    @property
    def largest(self) -> float:
        """Of the loss and of every gradient."""
        return max(self.loss, self.gradient)


def check_parity(trainer: ComposerReplicationTrainer, inputs: Inputs) -> tuple[Check, OwnGradient]:
    """The verdict, and GRPO's own gradient on the same rollouts.

    Args:
        trainer: its weights, metrics and random states stay as they are.
        inputs: a micro-batch of the run whose advantages differ from 0.
    """
    names = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages"}
    assert names <= inputs.keys(), f"a micro-batch of TRL's has {names}"
    inputs = few_rows(inputs, MAX_ROWS)
    theirs = _trl_part(trainer)
    # Only `tree = "off"` is TRL bit for bit: a packed forward adds up in another order.
    with undisturbed(trainer), with_separate_forwards(trainer):
        trainer.channel_weights = _weights_of_0(trainer)
        policy_of(trainer).train()
        difference, norm = _difference(trainer, theirs, trainer.compute_loss, inputs)
        bound = 0.0
        if trainer.accelerator.device.type == "cuda":
            repeats = (_difference(trainer, theirs, theirs, inputs) for _ in range(NUM_REPEATS))
            bound = max(repeat.largest for repeat, _ in repeats)
    passed = difference.largest <= bound and difference.same_random_state
    cause = None if passed else _cause(difference)
    check = Check(NAME, passed=passed, value=difference.largest, bound=bound, cause=cause)
    return check, OwnGradient(norm)


def _weights_of_0(trainer: ComposerReplicationTrainer) -> dict[str, float]:
    """What the trainer makes of weights of 0; a channel that is left on shows in the loss."""
    args = copy.copy(trainer._composer_args)
    args.alpha_sdpo, args.beta_replay, args.channel_weights = 0.0, 0.0, {}
    data = {CHANNELS[name].data for name in trainer.channel_weights}
    return channel_weights(args, has_hint_sites="hint_sites" in data, has_pairs="pairs" in data)


def _trl_part(trainer: ComposerReplicationTrainer) -> Callable[[nn.Module, Inputs], Tensor]:
    """TRL's own loss on the same model: the same trainer, as an object of TRL's class."""
    plain = copy.copy(trainer)
    plain.__class__ = GRPOTrainer  # pyright: ignore[reportAttributeAccessIssue]
    return cast(Callable[[nn.Module, Inputs], Tensor], plain.compute_loss)


def _difference(
    trainer: ComposerReplicationTrainer,
    theirs: Callable[[nn.Module, Inputs], Tensor],
    ours: Callable[[nn.Module, Inputs], Tensor],
    inputs: Inputs,
) -> tuple[_Difference, float]:
    """Of `ours` to `theirs` from the same random state, and the norm of the gradient of `ours`."""
    policy_of(trainer).zero_grad(set_to_none=True)
    start = RandomStates.take()
    our_loss = _backward(trainer, ours, inputs, sign=1)
    norm = gradient_norm(trainer)
    end = RandomStates.take()
    start.put_back()
    their_loss = _backward(trainer, theirs, inputs, sign=-1)
    rests = {
        name: float(parameter.grad.abs().nan_to_num(nan=math.inf).max())
        for name, parameter in trainable(trainer).items()
        if parameter.grad is not None and parameter.numel() > 0
    }
    name = max(rests, key=lambda name: rests[name])
    same_state = RandomStates.take() == end
    return _Difference(abs(our_loss - their_loss), rests[name], name, same_state), norm


def _backward(
    trainer: ComposerReplicationTrainer,
    compute: Callable[[nn.Module, Inputs], Tensor],
    inputs: Inputs,
    *,
    sign: int,
) -> float:
    with trainer.compute_loss_context_manager():
        loss = compute(cast(nn.Module, trainer.model_wrapped), inputs)
    trainer.accelerator.backward(sign * loss)
    return float(loss.detach())


def _cause(difference: _Difference) -> str:
    if not difference.same_random_state:
        return (
            "With both weights 0 our loss leaves another random state than TRL's: the next "
            "rollouts would differ. Something draws random numbers outside a forked state."
        )
    return (
        f"With both weights 0 our loss is {difference.loss:.3g} away from TRL's on the same "
        f"rollouts, and the gradient of {difference.parameter} {difference.gradient:.3g}. A run "
        "without the extra channels would not be GRPO. Look for a term that the trainer's "
        "_compute_loss adds without a weight, or for a method of TRL's that is overridden."
    )
