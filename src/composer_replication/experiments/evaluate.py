"""How well a model in memory does a task it was not trained on: episodes, rates, errors, tokens.

    rows = task_rows("api_drift", "heldout", num_episodes=64).prompts
    result = evaluate(model, tokenizer, "api_drift", rows, decoding="greedy", is_bf16=True)
    result.success.rate, result.error_kinds

The model's weights, its mode and torch's random state are as before afterwards, so a run may call
this between two steps.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from composer_replication.config.execution_sections import MAX_CONCURRENCY, STEP_TIMEOUT_S
from composer_replication.environments.registry import environment_class
from composer_replication.experiments.policy_sampling import (
    Decoding,
    PolicySampler,
    evaluating,
)
from composer_replication.experiments.proportions import Proportion, proportion
from composer_replication.experiments.reward_judge import OneTurn, judge
from composer_replication.planner.evaluation_shape import BATCH_SIZE
from composer_replication.step.hidden_states import causal_lm
from composer_replication.training.rewards import RewardFunction
from composer_replication.training.rollout_episode import Episode, Limits
from composer_replication.training.rollouts import EnvironmentRollouts, Prompt
from composer_replication.training.routing import ROUNDING
from composer_replication.training.shared_prefill import shared_prefill

SUCCESS_REWARD = 1.0 - ROUNDING
"""Every task gives 1 for what was asked, summed up from tenths where it is graded."""
MAX_TURNS = 8
"""More than any shipped task takes: its environment ends the episode."""
MAX_ACTION_TOKENS = 48
MAX_COMPLETION_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class EpisodeOutcome:
    """One episode of an evaluation.

    Example: `EpisodeOutcome(row=0, reward=0.6, error_kinds=("unknown_key",), ...)`.
    """

    row: int
    """Index of the prompt."""
    reward: float | None
    """None where the environment failed, or the reward function gave none."""
    error_kinds: tuple[str, ...]
    """Of each action that the environment refused, in order."""
    num_actions: int
    num_tokens: int
    """Sampled by the model, over all its actions."""
    turns: tuple[Mapping[str, str], ...]
    failure: str = ""
    num_cut: int = 0
    """Actions that reached their token limit before they ended."""

    @property
    def is_success(self) -> bool:
        """Whether the environment gave all there is."""
        return self.reward is not None and self.reward >= SUCCESS_REWARD


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """What one model did on the prompts of one task under one decoding."""

    decoding: Decoding
    episodes: tuple[EpisodeOutcome, ...]
    """All samples of a prompt beside each other, prompts in their order."""
    num_samples: int
    """Episodes of each prompt."""

    def outcomes(self) -> list[float]:
        """For each prompt the share of its episodes that succeeded."""
        size = self.num_samples
        groups = [self.episodes[i : i + size] for i in range(0, len(self.episodes), size)]
        return [sum(episode.is_success for episode in group) / size for group in groups]

    @property
    def success(self) -> Proportion:
        """The rate of exact success."""
        return proportion(self.outcomes())

    @property
    def mean_reward(self) -> float:
        """Mean of the graded reward; a failed environment counts 0."""
        return sum(episode.reward or 0.0 for episode in self.episodes) / len(self.episodes)

    @property
    def reward_standard_error(self) -> float | None:
        """Of `mean_reward`, over the prompts; None of a single prompt."""
        size = self.num_samples
        rewards = [episode.reward or 0.0 for episode in self.episodes]
        means = [fmean(rewards[i : i + size]) for i in range(0, len(rewards), size)]
        return stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None

    @property
    def error_kinds(self) -> dict[str, int]:
        """How many actions were refused, by the kind of error, most frequent first."""
        kinds = Counter(kind for episode in self.episodes for kind in episode.error_kinds)
        return dict(sorted(kinds.items(), key=lambda item: (-item[1], item[0])))

    @property
    def num_tokens(self) -> int:
        """Tokens that the model sampled."""
        return sum(episode.num_tokens for episode in self.episodes)

    @property
    def num_failed(self) -> int:
        """Episodes that the environment could not judge; they count as not succeeded."""
        return sum(episode.reward is None for episode in self.episodes)

    @property
    def num_cut(self) -> int:
        """Actions that reached their token limit before they ended."""
        return sum(episode.num_cut for episode in self.episodes)

    @property
    def num_actions(self) -> int:
        """Actions that the model took."""
        return sum(episode.num_actions for episode in self.episodes)


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    rows: Sequence[Mapping[str, object]],
    *,
    decoding: Decoding,
    reward: RewardFunction | None = None,
    num_samples: int = 1,
    temperature: float = 1.0,
    max_turns: int = MAX_TURNS,
    max_action_tokens: int = MAX_ACTION_TOKENS,
    step_timeout_s: float = STEP_TIMEOUT_S,
    max_concurrency: int = MAX_CONCURRENCY,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    is_bf16: bool = False,
) -> EvaluationResult:
    """Play an episode of every row, all of them turn by turn.

    Args:
        model: a causal LM, wrapped or not, on any device.
        tokenizer: with a chat template.
        task: name of an environment: a shipped one, or `package.module:Class`.
        rows: `prompt` and what the environment's `reset` takes, with unique prompts.
        decoding: `greedy`, or `sampled` at `temperature`.
        reward: judges episodes of one turn in place of an environment; see `find_judge`.
        num_samples: episodes of each row; greedy ones are all alike, so 1 is enough there.
        temperature: of sampled decoding.
        max_turns: actions that an episode may take.
        max_action_tokens: where an action is cut.
        step_timeout_s: of one call of an environment.
        max_concurrency: environments at a time.
        batch_size: contexts decoded at a time.
        seed: of sampled decoding.
        is_bf16: compute under bf16 autocast.

    Raises:
        DataError: a row that the environment refuses.
        RewardError: an environment that fails in every episode, or a reward function that fails.
    """
    environment = environment_class(task) if reward is None else OneTurn
    rollouts = EnvironmentRollouts(
        environment,
        rows,
        max_turns=max_turns,
        step_timeout_s=step_timeout_s,
        max_concurrency=max_concurrency,
    )
    sampler = PolicySampler(model, tokenizer, decoding, temperature, batch_size)
    limits = Limits(
        max_action_tokens=max_action_tokens,
        max_completion_tokens=MAX_COMPLETION_TOKENS,
        max_context_tokens=getattr(
            causal_lm(model).config.get_text_config(), "max_position_embeddings", None
        ),
    )
    played = [row for row in rows for _ in range(num_samples)]
    prompts = [cast(Prompt, row["prompt"]) for row in played]
    with evaluating(model, seed=seed, is_bf16=is_bf16), shared_prefill(model):
        episodes = rollouts.play(prompts, tokenizer, sampler, limits)
    if reward is not None:
        judge(reward, played, episodes)
    outcomes = [_outcome(episode, i // num_samples) for i, episode in enumerate(episodes)]
    return EvaluationResult(decoding, tuple(outcomes), num_samples)


def _outcome(episode: Episode, row: int) -> EpisodeOutcome:
    turns = episode.messages[episode.num_prompt_messages :]
    return EpisodeOutcome(
        row=row,
        reward=episode.reward,
        error_kinds=tuple(episode.error_kinds),
        num_actions=sum(turn.role == "assistant" for turn in turns),
        num_tokens=sum(episode.env_mask),
        turns=tuple({"role": turn.role, "content": turn.content} for turn in turns),
        failure=str(episode.failure or ""),
        num_cut=episode.num_cut,
    )
