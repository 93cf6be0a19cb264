"""Reward functions in TRL's signature: the environment's own, a synthetic one, and the user's.

TRL turns a reward of nan into an advantage of 0 without a word; here every rollout has one finite
number, or None where the user's function leaves it unscored.
"""

import functools
import inspect
import math
import numbers
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import cast

import numpy as np
from torch import Tensor

from composer_replication.errors import RewardError, shown
from composer_replication.training.users_code import users_code

RewardFunction = Callable[..., list[float] | list[float | None]]

ENVIRONMENT_REWARD = "The environment's get_reward()"


def environment_reward(
    *,
    environment_reward: Sequence[object],
    environment_failure: Sequence[str] | None = None,
    **columns: object,
) -> list[float | None]:
    """What each rollout's environment gave, 0 to 1; `EnvironmentRollouts` fills the columns.

    None where the environment failed: TRL leaves such a rollout out of its group.

    Raises:
        RewardError: a reward that is not a finite number.
    """
    failures = environment_failure or [""] * len(environment_reward)
    return [
        None
        if failure
        else _finite(
            reward, f"{ENVIRONMENT_REWARD} gave {shown(reward)} for {_rollout(index, columns)}"
        )
        for index, (reward, failure) in enumerate(zip(environment_reward, failures, strict=True))
    ]


def token_reward(*, completion_ids: Sequence[Sequence[int]], **columns: object) -> list[float]:
    """The share of completion tokens with an even id: synthetic, for models with random weights.

    It means nothing; it differs between rollouts, so GRPO has something to push.
    """
    del columns
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def checked_reward(function: RewardFunction, name: str) -> RewardFunction:
    """The user's reward function, held to one finite number or None for each rollout.

    Args:
        function: in TRL's signature; a coroutine function stays one.
        name: as the user wrote it, `package.module:function`.

    Raises:
        RewardError: from the function that is returned, where the user's own raises, or gives
            another number of rewards than there are rollouts, or one that is no finite number.
    """
    what = f"The reward function {name!r}"
    remedy = "Correct it; TRL calls it with keyword arguments: see rollout.reward."

    def checked(*, completion_ids: Sequence[object], **columns: object) -> object:
        with users_code(what, remedy):
            rewards = function(completion_ids=completion_ids, **columns)
        return _finite_rewards(rewards, len(completion_ids), what, columns)

    async def checked_async(*, completion_ids: Sequence[object], **columns: object) -> object:
        with users_code(what, remedy):
            awaitable = function(completion_ids=completion_ids, **columns)
            rewards = await cast(Awaitable[object], awaitable)
        return _finite_rewards(rewards, len(completion_ids), what, columns)

    chosen = checked_async if inspect.iscoroutinefunction(function) else checked
    functools.update_wrapper(chosen, function, assigned=("__module__", "__doc__"))
    # TRL names its metrics after the function.
    chosen.__name__ = name.rpartition(":")[2]
    return cast(RewardFunction, chosen)


def _finite_rewards(
    rewards: object, num_rollouts: int, what: str, columns: Mapping[str, object]
) -> list[float | None]:
    if not isinstance(rewards, Iterable) or isinstance(rewards, str | Mapping):
        raise RewardError(
            f"{what} returned {shown(rewards)}; it must return a list of one number for each of "
            f"the {num_rollouts} rollouts. Return a list."
        )
    values = list(cast(Iterable[object], rewards))
    if len(values) != num_rollouts:
        raise RewardError(
            f"{what} returned {len(values)} values for {num_rollouts} rollouts, so it is not known "
            "which reward is whose. Return one for each of `completions`, in their order."
        )
    if all(value is None for value in values):
        raise RewardError(
            f"{what} returned None for all {num_rollouts} rollouts; there is nothing to compare. "
            "Return a number for those that it can judge."
        )
    return [
        None
        if value is None
        else _finite(value, f"{what} returned {shown(value)} for {_rollout(index, columns)}")
        for index, value in enumerate(values)
    ]


def _rollout(index: int, columns: Mapping[str, object]) -> str:
    """The rollout in words, with the end of its prompt where TRL hands the prompts over."""
    prompts = cast(Sequence[Sequence[Mapping[str, str]]] | None, columns.get("prompts"))
    if prompts is None:
        return f"rollout {index}"
    return f"rollout {index} (its prompt ends {prompts[index][-1]['content'][-40:]!r})"


def _finite(value: object, problem: str) -> float:
    # One number of a tensor or array is a number; text that looks like one is not.
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1):
        value = cast(object, value.item())
    if not isinstance(value, numbers.Real):
        raise RewardError(f"{problem}; a reward is a number. Return a float.")
    if not math.isfinite(value):
        raise RewardError(
            f"{problem}; the baseline of its whole group would not be a number. Return a finite "
            "number, such as 0.0 for a failed rollout."
        )
    return float(value)
