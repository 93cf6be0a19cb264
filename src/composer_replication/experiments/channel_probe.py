"""One channel's loss on chosen records, computed as training computes it, without a trace.

The checks call the trainer's own methods, collator, teacher and autocast: a second implementation
would prove nothing about the first.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from composer_replication.experiments.random_states import RandomStates
from composer_replication.step.hidden_states import causal_lm
from composer_replication.traces.hints import HintSite
from composer_replication.traces.pairs import PreferencePair
from composer_replication.training.channel_plan import plan_step
from composer_replication.training.trainer import ComposerReplicationTrainer

Inputs = dict[str, Tensor]


def record_inputs(
    trainer: ComposerReplicationTrainer,
    sites: Sequence[HintSite] = (),
    pairs: Sequence[PreferencePair] = (),
    channels: Sequence[str] | None = None,
) -> Inputs:
    """The records as one micro-batch that is the whole step; all ranks call it together.

    Args:
        trainer: whose collator renders them.
        sites: hint sites of this rank.
        pairs: pairs of this rank, references filled in.
        channels: to be counted; None: all extra channels of the run.
    """
    (micro_batch,) = plan_step(
        [sites],
        pairs,
        collator=trainer.collator,
        channels=list(trainer.channel_weights) if channels is None else channels,
        sum_over_ranks=trainer._sum_over_ranks,
    )
    return micro_batch.inputs(trainer.accelerator.device)


def channel_loss(trainer: ComposerReplicationTrainer, name: str, inputs: Inputs) -> Tensor:
    """The channel's unweighted loss, through the trainer's method and under its autocast."""
    with trainer.compute_loss_context_manager():
        return trainer._channel_loss(name, cast(nn.Module, trainer.model_wrapped), inputs)


def computes_in_fp32(trainer: ComposerReplicationTrainer) -> bool:
    """Whether neither autocast nor the weights are of half precision."""
    dtypes = {parameter.dtype for parameter in causal_lm(policy_of(trainer)).parameters()}
    return trainer.accelerator.mixed_precision == "no" and dtypes <= {torch.float32, torch.float64}


def policy_of(trainer: ComposerReplicationTrainer) -> nn.Module:
    """The policy as the trainer holds it, not wrapped for several processes."""
    return cast(nn.Module, trainer.model)


def trainable(trainer: ComposerReplicationTrainer) -> dict[str, nn.Parameter]:
    """The policy's trained parameters by name."""
    named = policy_of(trainer).named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def gradient_norm(trainer: ComposerReplicationTrainer) -> float:
    """The norm of all `.grad` of the policy; nan or inf where one is not finite."""
    grads = [p.grad.float() for p in trainable(trainer).values() if p.grad is not None]
    if not grads:
        return 0.0
    return float(torch.stack([grad.norm() for grad in grads]).double().norm())


@contextmanager
def undisturbed(trainer: ComposerReplicationTrainer) -> Iterator[None]:
    """Runs the trainer's methods and then puts back all that they touched.

    Random states of every library, metrics, counters, settings and the training mode are as they
    were, and no gradient is left: a run with checks has the rows of a run without.
    """
    states = RandomStates.take()
    # Totals and metrics are added to in place, so a reference to them would keep nothing.
    attributes = {
        name: copy.copy(value) if isinstance(value, dict | list) else value
        for name, value in trainer.__dict__.items()
    }
    attributes["_metrics"] = copy.deepcopy(trainer._metrics)
    policy = policy_of(trainer)
    was_training = policy.training
    policy.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        trainer.__dict__.clear()
        trainer.__dict__.update(attributes)
        policy.train(was_training)
        policy.zero_grad(set_to_none=True)
        states.put_back()


@contextmanager
def with_separate_forwards(trainer: ComposerReplicationTrainer) -> Iterator[None]:
    """The trainer with a forward for each role, whose rows belong to one record each.

    Half precision rounds a packed forward differently when other rows are beside it; what is judged
    here holds for it by `packed_parity`.
    """
    packing = trainer.packing
    trainer.packing = packing.off()
    try:
        yield
    finally:
        trainer.packing = packing


@contextmanager
def without_dropout(trainer: ComposerReplicationTrainer) -> Iterator[None]:
    """Training mode in which two forwards of the same rows are equal."""
    policy = policy_of(trainer)
    modules = [module for module in policy.modules() if isinstance(module, nn.Dropout)]
    # Attention layers keep their own rate and read it only while training.
    attention = [m for m in policy.modules() if isinstance(vars(m).get("attention_dropout"), float)]
    rates = [module.p for module in modules]
    attention_rates = [vars(module)["attention_dropout"] for module in attention]
    policy.train()
    try:
        for module in modules:
            module.p = 0.0
        for module in attention:
            vars(module)["attention_dropout"] = 0.0
        yield
    finally:
        for module, rate in zip(modules, rates, strict=True):
            module.p = rate
        for module, rate in zip(attention, attention_rates, strict=True):
            vars(module)["attention_dropout"] = rate
