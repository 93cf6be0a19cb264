"""Episodes of one turn that a reward function judges, called as TRL calls it in training."""

import asyncio
import inspect
from collections.abc import Awaitable, Mapping, Sequence

from composer_replication.environments.protocol import Observation
from composer_replication.training.rewards import RewardFunction
from composer_replication.training.rollout_episode import Episode


class OneTurn:
    """An episode that ends with its first action and judges nothing."""

    def reset(self, **row: object) -> None:
        """Whatever the row says."""

    def _step_text(self, action: str) -> Observation:
        del action
        return Observation("", is_done=True)

    def get_reward(self) -> float:
        """Until `judge` has given the episode its own."""
        return 0.0


def judge(
    function: RewardFunction, rows: Sequence[Mapping[str, object]], episodes: Sequence[Episode]
) -> None:
    """Give every episode the function's reward, or None where the function gives none.

    Args:
        function: of `judge_checks.find_judge`, so that each reward is finite.
        rows: of the episodes, all with the same keys.
        episodes: finished ones.

    Raises:
        RewardError: the function fails, or judges none of them.
    """
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    prompts = columns.pop("prompt")
    found = function(
        prompts=prompts,
        completions=[[_last_message(episode)] for episode in episodes],
        completion_ids=[episode.completion_ids for episode in episodes],
        trainer_state=None,
        log_extra=_log_nothing,
        log_metric=_log_nothing,
        **columns,
    )
    rewards = asyncio.run(_awaited(found)) if inspect.isawaitable(found) else found
    for episode, reward in zip(episodes, rewards, strict=True):
        episode.reward = reward


def _last_message(episode: Episode) -> dict[str, str]:
    last = episode.messages[-1]
    return {"role": last.role, "content": last.content}


def _log_nothing(*values: object, **named: object) -> None:
    """Where a training run logs what a reward function hands over."""
    del values, named


async def _awaited(found: Awaitable[list[float | None]]) -> list[float | None]:
    return await found
