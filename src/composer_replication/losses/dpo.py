"""Direct preference optimisation on the summed log-probabilities of chosen and rejected actions.

Letters: P preference pairs. Log-probabilities and rewards are in nats.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from composer_replication.errors import ConfigError


class DPOLoss(NamedTuple):
    """A sum and a count that add over micro-batches, and what the pairs look like."""

    loss_sum: Float[Tensor, ""]
    """Weighted sum over the pairs, in nats."""
    num_pairs: int
    """Pairs in the call; divide the step's sum by the step's number of pairs."""
    chosen_rewards: Float[Tensor, " P"]
    """beta * log(policy / ref) of the chosen actions, without gradient."""
    rejected_rewards: Float[Tensor, " P"]
    """The same for the rejected actions."""
    accuracy: Float[Tensor, ""]
    """Share of pairs whose chosen reward is above the rejected one; 0 without pairs."""


def dpo_loss(
    policy_chosen_logp: Float[Tensor, " P"],
    policy_rejected_logp: Float[Tensor, " P"],
    ref_chosen_logp: Float[Tensor, " P"],
    ref_rejected_logp: Float[Tensor, " P"],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    pair_weights: Float[Tensor, " P"] | None = None,
) -> DPOLoss:
    """Sum over pairs of -(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m), e label_smoothing.

    m = log(policy / ref) of chosen minus that of rejected. No gradient reaches the reference. A
    pair of weight 0 adds exactly 0 to loss and gradient, whatever its log-probabilities hold.

    Args:
        policy_chosen_logp: log-probability of each chosen continuation, summed over its actions.
        policy_rejected_logp: the same for the rejected continuation.
        ref_chosen_logp: the chosen continuation under the frozen reference.
        ref_rejected_logp: the rejected continuation under the frozen reference.
        beta: how strongly the policy is held to the reference, above 0.
        label_smoothing: assumed share of pairs that are labelled the wrong way round (cDPO),
            in [0, 0.5).
        pair_weights: factor of each pair's loss; None is 1.

    Raises:
        ConfigError: beta or label_smoothing is out of range.

    Source: DPO, arXiv:2305.18290 eq. 7; label smoothing: ericmitchell.ai/cdpo.pdf eq. 3.
    """
    if not beta > 0:
        raise ConfigError(
            f"beta is {beta}; at 0 every pair has the same loss, and below 0 the rejected side "
            "is preferred. Pass a beta above 0, such as 0.1."
        )
    if not 0 <= label_smoothing < 0.5:
        raise ConfigError(
            f"label_smoothing is {label_smoothing}; it must be within [0, 0.5). At 0.5 a pair "
            "says nothing about which side is better. Lower label_smoothing."
        )
    chosen_log_ratio = _single(policy_chosen_logp) - _single(ref_chosen_logp.detach())
    rejected_log_ratio = _single(policy_rejected_logp) - _single(ref_rejected_logp.detach())
    scaled_margin = beta * (chosen_log_ratio - rejected_log_ratio)
    if pair_weights is None:
        pair_weights = torch.ones_like(scaled_margin)
    # Zero it first: 0 * nan is nan, in the loss and in its gradient.
    scaled_margin = torch.where(pair_weights != 0, scaled_margin, 0.0)
    pair_losses = -(1 - label_smoothing) * logsigmoid(scaled_margin)
    pair_losses = pair_losses - label_smoothing * logsigmoid(-scaled_margin)
    chosen_rewards = beta * chosen_log_ratio.detach()
    rejected_rewards = beta * rejected_log_ratio.detach()
    num_pairs = scaled_margin.shape[0]
    return DPOLoss(
        loss_sum=(pair_weights.detach() * pair_losses).sum(),
        num_pairs=num_pairs,
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        accuracy=(chosen_rewards > rejected_rewards).to(chosen_rewards.dtype).sum()
        / max(num_pairs, 1),
    )


def _single(logp: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """At least fp32: the margin is a small difference of sums over hundreds of tokens."""
    return logp if logp.dtype == torch.float64 else logp.float()
