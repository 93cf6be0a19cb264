"""The channels of the step, as a table: what each needs scored, and its sum and count.

To add a channel, write its loss in `losses/`, its `sum_loss` here and one entry of `CHANNELS`. Its
weight is then `channels.NAME` in a run's configuration.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from composer_replication.batch.collate import StepTensors
from composer_replication.losses.dpo import dpo_loss
from composer_replication.losses.grpo import grpo_loss
from composer_replication.step.scores import Count, Scores
from composer_replication.step.settings import StepSettings


@dataclass(frozen=True, slots=True)
class ChannelSum:
    """A channel's loss over this part of the step.

    Divide by the count of the whole step (all micro-batches, all ranks), so that accumulation
    equals one large batch.
    """

    loss_sum: Float[Tensor, ""]
    count: float
    """Tokens or pairs that `loss_sum` is summed over; for GRPO its own denominator."""
    metrics: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    """Detached values worth logging, under TRL's names where it has them."""


SumLoss = Callable[[Scores, StepTensors, StepSettings], ChannelSum]


@dataclass(frozen=True, slots=True)
class Channel:
    """One loss term of the step."""

    name: str
    data: Literal["rollouts", "hint_sites", "pairs"]
    """The part of the step batch it trains on, and so what has to be scored."""
    unit: Literal["tokens", "pairs"]
    count: Count
    """How many units a batch holds, read before any forward."""
    sum_loss: SumLoss


def num_rollout_tokens(tensors: StepTensors) -> int:
    """Completion tokens that the policy sampled."""
    if "completion_mask" not in tensors:
        return 0
    return int((tensors["completion_mask"] * tensors["tool_mask"]).sum())


def num_hinted_tokens(tensors: StepTensors) -> int:
    """Action tokens over all hint sites."""
    return len(tensors["sdpo_student_index"]) if "sdpo_student_index" in tensors else 0


def num_pairs(tensors: StepTensors) -> int:
    """Preference pairs."""
    return len(tensors["dpo_pair_weights"]) if "dpo_pair_weights" in tensors else 0


def _grpo(scores: Scores, tensors: StepTensors, settings: StepSettings) -> ChannelSum:
    assert scores.policy_logp is not None
    grpo = settings.grpo
    loss = grpo_loss(
        scores.policy_logp,
        tensors.get("old_per_token_logps"),
        tensors["advantages"],
        (tensors["completion_mask"] * tensors["tool_mask"]).bool(),
        loss_type=grpo.loss_type,
        importance_sampling_level=grpo.importance_sampling_level,
        epsilon_low=grpo.epsilon_low,
        epsilon_high=grpo.epsilon_high,
        max_completion_length=grpo.max_completion_length,
    )
    return ChannelSum(loss.loss_sum, float(loss.denominator))


def _sdpo(scores: Scores, tensors: StepTensors, settings: StepSettings) -> ChannelSum:
    del settings
    assert scores.divergence is not None
    return ChannelSum(scores.divergence.sum(), num_hinted_tokens(tensors))


def _dpo(scores: Scores, tensors: StepTensors, settings: StepSettings) -> ChannelSum:
    assert scores.chosen_logp is not None
    assert scores.rejected_logp is not None
    loss = dpo_loss(
        scores.chosen_logp,
        scores.rejected_logp,
        tensors["dpo_chosen_ref_logprobs"],
        tensors["dpo_rejected_ref_logprobs"],
        beta=settings.dpo.beta,
        label_smoothing=settings.dpo.label_smoothing,
        pair_weights=tensors["dpo_pair_weights"],
    )
    metrics = {
        "rewards/chosen": loss.chosen_rewards.mean(),
        "rewards/rejected": loss.rejected_rewards.mean(),
        "rewards/margins": (loss.chosen_rewards - loss.rejected_rewards).mean(),
        "rewards/accuracies": torch.as_tensor(loss.accuracy),
    }
    return ChannelSum(loss.loss_sum, num_pairs(tensors), metrics)


CHANNELS: dict[str, Channel] = {
    channel.name: channel
    for channel in (
        Channel("grpo", "rollouts", "tokens", num_rollout_tokens, _grpo),
        Channel("sdpo", "hint_sites", "tokens", num_hinted_tokens, _sdpo),
        Channel("dpo", "pairs", "pairs", num_pairs, _dpo),
    )
}
