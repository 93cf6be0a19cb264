"""Group-relative policy optimisation: advantages from rewards, and the clipped surrogate.

Letters: B rollouts, C completion tokens, G rollouts per prompt. Equal to TRL 1.16's GRPOTrainer.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from composer_replication.errors import ConfigError, DataError, nearest

_LOSS_TYPES = ("dr_grpo", "dapo", "grpo", "bnpo")
_LEVELS = ("token", "sequence")
_SCALES = ("none", "group", "batch")

_STD_FLOOR = 1e-4
"""Added to a standard deviation of rewards; TRL's value."""


class GRPOLoss(NamedTuple):
    """A sum and what to divide it by; both add over the micro-batches and ranks of a step."""

    loss_sum: Float[Tensor, ""]
    denominator: Float[Tensor, ""]
    """0 without rollouts or tokens: divide by max(denominator, 1)."""
    num_clipped: Float[Tensor, ""]
    """Tokens whose gradient the clip stopped."""
    num_tokens: Float[Tensor, ""]
    """Tokens that train."""

    @property
    def clip_fraction(self) -> Float[Tensor, ""]:
        """Share of the training tokens whose gradient the clip stopped."""
        return self.num_clipped / self.num_tokens.clamp(min=1)


def grpo_loss(
    policy_logp: Float[Tensor, "B C"],
    old_logp: Float[Tensor, "B C"] | None,
    advantages: Float[Tensor, " B"] | Float[Tensor, "B C"],
    loss_mask: Bool[Tensor, "B C"],
    *,
    loss_type: str = "dr_grpo",
    importance_sampling_level: str = "token",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    max_completion_length: int | None = None,
) -> GRPOLoss:
    """Sum of -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A), r = policy / old policy.

    The step's loss is the sum of `loss_sum` over the sum of `denominator`:

    - dr_grpo: token losses over rollouts times max_completion_length.
    - dapo: token losses over training tokens.
    - grpo: each rollout's mean over its tokens, over rollouts.
    - bnpo: the micro-batch's mean over its tokens, over micro-batches; the only one that depends
      on how the step is split.

    What masked positions hold (-inf, nan) changes neither loss nor gradient.

    Args:
        policy_logp: log-probability of each completion token, in nats.
        old_logp: the same under the policy that sampled, without gradient; None if it is this
            policy, so every ratio is 1.
        advantages: one per rollout, or one per token.
        loss_mask: True on tokens that the policy sampled.
        loss_type: "dr_grpo", "dapo", "grpo" or "bnpo", as above.
        importance_sampling_level: "token", or "sequence" for one ratio per rollout: the geometric
            mean over its tokens (GSPO).
        epsilon_low: ratios stop at 1 - epsilon_low.
        epsilon_high: ratios stop at 1 + epsilon_high.
        delta: largest ratio where the advantage is negative (two-sided clip); None: no limit.
        max_completion_length: the constant length of dr_grpo, in tokens; only dr_grpo needs it.

    Raises:
        ConfigError: unknown loss_type or level, or dr_grpo without max_completion_length.

    Source: GRPO, arXiv:2402.03300 eq. 3; Dr. GRPO, arXiv:2503.20783; DAPO, arXiv:2503.14476;
    GSPO, arXiv:2507.18071; two-sided clip, INTELLECT-2, arXiv:2505.07291.
    """
    _check_options(loss_type, importance_sampling_level, max_completion_length)
    mask_BC = loss_mask
    policy_BC = policy_logp if policy_logp.dtype == torch.float64 else policy_logp.float()
    old_BC = (policy_BC if old_logp is None else old_logp).detach()
    # A masked position may hold -inf or nan; zero it first, since 0 * nan is nan.
    log_ratio_BC = torch.where(mask_BC, policy_BC - old_BC, 0.0)
    advantages_BC = advantages if advantages.dim() == 2 else advantages.unsqueeze(1)
    advantages_BC = torch.where(mask_BC, advantages_BC.detach(), 0.0)
    lengths_B = mask_BC.sum(-1).clamp(min=1)
    if importance_sampling_level == "sequence":
        log_ratio_BC = (log_ratio_BC.sum(-1) / lengths_B).unsqueeze(1).expand_as(policy_BC)
    ratio_BC = log_ratio_BC.exp()
    clipped_BC = ratio_BC.clamp(1 - epsilon_low, 1 + epsilon_high)
    if delta is not None:
        ratio_BC = ratio_BC.clamp(max=delta)
    token_loss_BC = -torch.minimum(ratio_BC * advantages_BC, clipped_BC * advantages_BC)
    num_tokens = mask_BC.sum().to(policy_BC.dtype)
    num_rollouts = torch.full_like(num_tokens, policy_BC.shape[0])
    stopped_BC = (ratio_BC * advantages_BC > clipped_BC * advantages_BC) & mask_BC
    if loss_type == "dr_grpo":
        loss_sum, denominator = token_loss_BC.sum(), num_rollouts * (max_completion_length or 0)
    elif loss_type == "dapo":
        loss_sum, denominator = token_loss_BC.sum(), num_tokens
    elif loss_type == "grpo":
        loss_sum, denominator = (token_loss_BC.sum(-1) / lengths_B).sum(), num_rollouts
    else:
        loss_sum = token_loss_BC.sum() / num_tokens.clamp(min=1)
        denominator = torch.ones_like(num_tokens)
    return GRPOLoss(loss_sum, denominator, stopped_BC.sum().to(policy_BC.dtype), num_tokens)


def group_advantages(
    rewards: Float[Tensor, " B"], num_generations: int, scale: str = "none"
) -> Float[Tensor, " B"]:
    """Reward minus the mean of its group, over a standard deviation if scaled.

    A nan reward (a rollout that could not be scored) gets advantage 0 and is left out of means
    and deviations.

    Args:
        rewards: one per rollout; the G rollouts of a prompt are neighbours.
        num_generations: G, at least 2.
        scale: "none" (Dr. GRPO), "group" divides by the group's standard deviation, "batch" by
            that of all rewards; deviations are unbiased and 1e-4 is added to them.

    Raises:
        ConfigError: num_generations is below 2, or scale is unknown.
        DataError: the rewards are not whole groups.

    Source: GRPO, arXiv:2402.03300 section 4.1.2; "none": Dr. GRPO, arXiv:2503.20783; "batch":
    arXiv:2508.08221.
    """
    if num_generations < 2:
        raise ConfigError(
            f"num_generations is {num_generations}; it must be at least 2. One rollout is its own "
            "baseline, so every advantage would be 0. Raise num_generations."
        )
    if scale not in _SCALES:
        raise ConfigError(
            f"scale is {scale!r}; it must be one of {', '.join(_SCALES)}. {nearest(scale, _SCALES)}"
        )
    if rewards.shape[0] % num_generations:
        raise DataError(
            f"{rewards.shape[0]} rewards are not whole groups of {num_generations}; a baseline "
            "would mix prompts. Pass all rollouts of each prompt, next to each other."
        )
    groups = rewards.view(-1, num_generations)
    centred = (groups - groups.nanmean(1, keepdim=True)).flatten()
    if scale == "group":
        centred = (centred.view_as(groups) / (_std(groups) + _STD_FLOOR)).flatten()
    elif scale == "batch":
        centred = centred / (_std(rewards.unsqueeze(0)) + _STD_FLOOR).squeeze(1)
    return centred.nan_to_num(nan=0.0)


def _std(rows: Float[Tensor, "R S"]) -> Float[Tensor, "R 1"]:
    """Unbiased standard deviation of each row without its nan entries; nan below two of them."""
    num_valid = (~rows.isnan()).sum(1, keepdim=True)
    squares = (rows - rows.nanmean(1, keepdim=True)).square().nansum(1, keepdim=True)
    return (squares / (num_valid - 1)).sqrt()


def _check_options(
    loss_type: str, importance_sampling_level: str, max_completion_length: int | None
) -> None:
    if loss_type not in _LOSS_TYPES:
        raise ConfigError(
            f"loss_type is {loss_type!r}; it must be one of {', '.join(_LOSS_TYPES)}. "
            f"{nearest(loss_type, _LOSS_TYPES)}"
        )
    if importance_sampling_level not in _LEVELS:
        raise ConfigError(
            f"importance_sampling_level is {importance_sampling_level!r}; a ratio belongs to a "
            f"token or to a sequence. {nearest(importance_sampling_level, _LEVELS)}"
        )
    if loss_type == "dr_grpo" and (max_completion_length is None or max_completion_length < 1):
        raise ConfigError(
            f"max_completion_length is {max_completion_length} with loss_type 'dr_grpo', which "
            "divides by that constant length. Pass the largest completion length, in tokens."
        )
