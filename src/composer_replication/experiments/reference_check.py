"""`dpo_reference`: at the reference's own weights DPO is log 2 and its margin is 0.

The references that training reads are scored again in the very batches in which they were scored
first: same rows, same shape, same kernels. What is left is then no rounding but an error.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn.functional import logsigmoid

from composer_replication.experiments.channel_probe import (
    Inputs,
    channel_loss,
    computes_in_fp32,
    policy_of,
    record_inputs,
)
from composer_replication.runs.summary import Check
from composer_replication.step.hidden_states import in_eval_mode
from composer_replication.traces.pairs import PreferencePair
from composer_replication.training.trainer import ComposerReplicationTrainer

NAME = "dpo_reference"
FP32_BOUND = 1e-5
SPREADS_IN_BF16 = 10
MAX_BATCHES = 4
"""Batches scored again, spread over all: each costs six forwards of its rows."""
SHIFT_NATS = 10.0
"""References lowered by it must move the loss as the formula says: a loss that compares the policy
with itself is log 2 whatever the references are."""


@dataclass(frozen=True, slots=True)
class _Deviation:
    """How far one batch is from the reference."""

    loss: float
    expected_loss: float
    margin: float
    shifted: float
    """Loss with the chosen actions' references lowered, less what it must be there."""
    nats: float
    """Largest difference of one action's log-prob between the policy and its stored reference."""
    source: str

    def worst(self, dpo_beta: float) -> float:
        """The largest of all, in units of the loss; nan where one is not a number."""
        parts = (self.loss - self.expected_loss, self.margin, self.shifted, dpo_beta * self.nats)
        return math.nan if any(map(math.isnan, parts)) else max(map(abs, parts))


@torch.no_grad()
def check_references(trainer: ComposerReplicationTrainer) -> Check:
    """The verdict, before the first optimizer step; the caller keeps the trainer undisturbed."""
    args = trainer._composer_args
    assert trainer.planner is not None
    assert trainer.planner.pair_loader is not None
    pairs = trainer.planner.pair_loader.records
    size = args.pairs_per_step
    starts = evenly_spread(range(0, len(pairs), size), MAX_BATCHES)
    with in_eval_mode(policy_of(trainer)):
        found = [_deviation(trainer, pairs[start : start + size]) for start in starts]
        bound = FP32_BOUND
        if not computes_in_fp32(trainer):
            spread = _spread_nats(trainer, [pairs[start] for start in starts])
            bound = max(bound, SPREADS_IN_BF16 * args.dpo_beta * spread)
    worst = max(found, key=lambda d: _nan_first(d.worst(args.dpo_beta)))
    value = worst.worst(args.dpo_beta)
    passed = value <= bound
    cause = None if passed else _cause(worst, bound / args.dpo_beta, args.reference_cache_dir)
    return Check(NAME, passed=passed, value=value, bound=bound, cause=cause)


def evenly_spread(positions: Sequence[int], num_wanted: int) -> list[int]:
    """At most `num_wanted` of the positions, the first and the last among them."""
    if len(positions) <= num_wanted:
        return list(positions)
    last = len(positions) - 1
    return [positions[index * last // (num_wanted - 1)] for index in range(num_wanted)]


def _deviation(trainer: ComposerReplicationTrainer, pairs: Sequence[PreferencePair]) -> _Deviation:
    inputs = record_inputs(trainer, pairs=pairs)
    loss = float(channel_loss(trainer, "dpo", inputs))
    sides = zip(_action_nats(trainer, pairs), _stored_nats(pairs), strict=True)
    ratios = [scored - stored for scored, stored in sides]
    chosen, rejected = ratios[: len(pairs)], ratios[len(pairs) :]
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    worst = max(ratios, key=_nan_first)
    return _Deviation(
        loss=loss,
        expected_loss=math.log(2) * sum(pair.weight for pair in pairs) / len(pairs),
        margin=trainer._composer_args.dpo_beta * max(margins, key=_nan_first),
        shifted=_shifted_deviation(trainer, inputs),
        nats=abs(worst),
        source=pairs[ratios.index(worst) % len(pairs)].source,
    )


def _shifted_deviation(trainer: ComposerReplicationTrainer, inputs: Inputs) -> float:
    """The loss less the formula's where each chosen action gained `SHIFT_NATS` on its reference."""
    settings = trainer.step_settings.dpo
    reference = inputs["dpo_chosen_ref_logprobs"]
    lowered = reference - SHIFT_NATS
    # What is left of the shift after rounding, so that long actions keep the tight bound.
    margins = settings.beta * (reference.double() - lowered.double())
    expected = -(1 - settings.label_smoothing) * logsigmoid(margins)
    expected = expected - settings.label_smoothing * logsigmoid(-margins)
    expected = (inputs["dpo_pair_weights"].double() * expected).mean()
    loss = channel_loss(trainer, "dpo", {**inputs, "dpo_chosen_ref_logprobs": lowered})
    return float(loss.double() - expected)


def _action_nats(
    trainer: ComposerReplicationTrainer, pairs: Sequence[PreferencePair]
) -> list[float]:
    """Log-probs of the chosen actions and then of the rejected ones, in one batch each."""
    inputs = record_inputs(trainer, pairs=pairs)
    with trainer.compute_loss_context_manager():
        model = cast(nn.Module, trainer.model_wrapped)
        needs = frozenset({"pairs"})
        scores = trainer.packing(model, inputs, needs, trainer.step_settings, None)
    assert scores.chosen_logp is not None
    assert scores.rejected_logp is not None
    return [*scores.chosen_logp.tolist(), *scores.rejected_logp.tolist()]


def _stored_nats(pairs: Sequence[PreferencePair]) -> list[float]:
    stored = [pair.ref_chosen_logp for pair in pairs] + [pair.ref_rejected_logp for pair in pairs]
    return [math.nan if nats is None else nats for nats in stored]


def _spread_nats(trainer: ComposerReplicationTrainer, pairs: Sequence[PreferencePair]) -> float:
    """How far an action's log-prob moves when its row is scored beside others."""
    together = _action_nats(trainer, pairs)
    alone = [_action_nats(trainer, [pair]) for pair in pairs]
    chosen, rejected = [nats[0] for nats in alone], [nats[1] for nats in alone]
    return max(abs(a - b) for a, b in zip(together, [*chosen, *rejected], strict=True))


def _nan_first(value: float) -> float:
    """Orders by size, with what is not a number as the largest."""
    return math.inf if math.isnan(value) else abs(value)


def _cause(worst: _Deviation, bound_nats: float, cache: str | None) -> str:
    if not worst.nats <= bound_nats:
        return (
            f"The stored reference of pair {worst.source!r} is {worst.nats:.4g} nats away from the "
            f"policy's own log-prob, and before the first step both are the same weights. DPO "
            f"starts at {worst.loss:.4g} instead of {worst.expected_loss:.4g}. The references were "
            "made up, or scored by another model, template or precision. Delete the cache "
            f"{cache}; if it fails again, look at how the references are scored."
        )
    if abs(worst.loss - worst.expected_loss) < abs(worst.shifted):
        return (
            f"DPO is log 2 at the reference, and {abs(worst.shifted):.4g} away from its formula "
            f"when every chosen action's reference is lowered by {SHIFT_NATS:g} nats. The loss "
            "does not read the stored references, or not with dpo.beta and dpo.label_smoothing: "
            "look at step/channels.py and losses/dpo.py."
        )
    return (
        f"The stored references are the policy's own log-probs, and still DPO is {worst.loss:.6g} "
        f"with a margin of {worst.margin:.3g} instead of {worst.expected_loss:.6g} and 0. The loss "
        "does not compare each side with its own reference: look at losses/dpo.py and the "
        "trainer's _compute_trace_replay_loss."
    )
