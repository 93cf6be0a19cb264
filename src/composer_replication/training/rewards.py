"""Reward functions in TRL's signature: the environment's own, and a synthetic one for shapes."""

from collections.abc import Callable, Sequence

RewardFunction = Callable[..., list[float]]


def environment_reward(*, environment_reward: Sequence[float], **columns: object) -> list[float]:
    """What each rollout's environment gave, 0 to 1; `EnvironmentRollouts` fills the column."""
    del columns
    return [float(reward) for reward in environment_reward]


def token_reward(*, completion_ids: Sequence[Sequence[int]], **columns: object) -> list[float]:
    """The share of completion tokens with an even id: synthetic, for models with random weights.

    It means nothing; it differs between rollouts, so GRPO has something to push.
    """
    del columns
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]
