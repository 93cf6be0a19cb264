"""Multi-turn rollouts in an environment, behind TRL's `rollout_func`.

TRL's own `tools` and `environment_factory` refuse models whose chat template has no tool calls.
This loop lets the model act in plain text, keeps the sampled ids exact, marks what the environment
wrote (`env_mask`), and turns every error turn into a hint site.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from composer_replication.batch.render import end_of_turn_ids, render_state
from composer_replication.config.execution_sections import MAX_CONCURRENCY, STEP_TIMEOUT_S
from composer_replication.environments.protocol import Observation, TextEnvironment
from composer_replication.errors import ConfigError, DataError, RewardError
from composer_replication.step.hidden_states import causal_lm
from composer_replication.traces.trace import Message, messages_from
from composer_replication.training.action_sampling import SampledAction, sample_actions
from composer_replication.training.checked_environment import CheckedEnvironment
from composer_replication.training.environment_pool import EnvironmentPool, Failure
from composer_replication.training.rollout_episode import (
    Episode,
    Limits,
    RolloutBatch,
    lead_to_next_turn,
    take_turn,
    to_batch,
)
from composer_replication.training.shared_prefill import shared_prefill
from composer_replication.training.trl_hooks import GRPOTrainer

Prompt = Sequence[Mapping[str, object]]
ActionSampler = Callable[[Sequence[list[int]], int], list[SampledAction]]


class EnvironmentRollouts:
    """A `rollout_func` for `ComposerReplicationTrainer` and TRL's `GRPOTrainer` alike.

    Environments work side by side, each in a thread of its own; the policy samples for all of them
    at once. Rows are found again by their prompt, since TRL hands over prompts alone.

    An environment that raises or does not answer in time ends its rollout without a reward, so that
    GRPO leaves it out of its group; the metrics `rollouts/timeouts` and `rollouts/crashes` count
    them. Where every rollout fails, the first failure is raised.
    """

    def __init__(
        self,
        environment: Callable[[], object],
        rows: Iterable[Mapping[str, object]],
        *,
        max_turns: int = 2,
        max_action_tokens: int = 40,
        step_timeout_s: float = STEP_TIMEOUT_S,
        max_concurrency: int = MAX_CONCURRENCY,
    ) -> None:
        """Keep the task.

        Args:
            environment: makes an instance with `reset(**row)`, `_step_text` and `get_reward`.
            rows: of the training set: `prompt` and what `reset` takes; equal prompts are one row.
            max_turns: actions an episode may take, at least 1.
            max_action_tokens: tokens one action may take, at least 1.
            step_timeout_s: seconds that an environment may take to answer one call.
            max_concurrency: environments that may work at a time.

        Raises:
            ConfigError: an environment that cannot be driven by text.
            DataError: two rows with one prompt that tell `reset` different things.
        """
        self._environment = environment
        self._rows = _by_prompt(rows)
        self.max_turns = max_turns
        self.max_action_tokens = max_action_tokens
        self._pool = EnvironmentPool(
            cast(Callable[[], TextEnvironment], partial(CheckedEnvironment, environment)),
            timeout_s=step_timeout_s,
            max_concurrency=max_concurrency,
        )
        # Making one is the check.
        (made,) = self._pool.run([(0, lambda environment: environment)])
        if isinstance(made, Failure):
            raise made.error

    def fresh(self) -> "EnvironmentRollouts":
        """The same task in environments of its own, for rollouts beside a run's."""
        return EnvironmentRollouts(
            self._environment,
            self._rows.values(),
            max_turns=self.max_turns,
            max_action_tokens=self.max_action_tokens,
            step_timeout_s=self._pool.timeout_s,
            max_concurrency=self._pool.max_concurrency,
        )

    def __call__(self, prompts: Sequence[Prompt], trainer: GRPOTrainer) -> RolloutBatch:
        """Play one episode for each prompt, all of them turn by turn.

        Raises:
            DataError: a prompt that is not among the rows, or a row that `reset` refuses.
            RewardError: the environment failed in every rollout.
        """
        tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)

        def sample(contexts: Sequence[list[int]], max_new_tokens: int) -> list[SampledAction]:
            return sample_actions(trainer, contexts, max_new_tokens)

        # Around all turns, so that each goes on from the caches of the one before it.
        with shared_prefill(cast(nn.Module, trainer.model)):
            episodes = self.play(prompts, tokenizer, sample, self._limits(trainer))
        _count_failures(episodes, trainer)
        return to_batch(episodes, tokenizer)

    def play(
        self,
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        sample: ActionSampler,
        limits: Limits,
    ) -> list[Episode]:
        """The finished episodes of the prompts, whoever samples their actions.

        Args:
            prompts: among the rows; one that comes twice is played twice.
            tokenizer: of the policy.
            sample: one action for each context, given the most tokens any may have.
            limits: how long an episode may get.

        Raises:
            DataError: a prompt that is not among the rows, or a row that `reset` refuses.
            RewardError: the environment failed in every episode.
        """
        episodes = self._start(prompts, tokenizer)
        ends = end_of_turn_ids(tokenizer)
        for turn in range(self.max_turns):
            active = [e for e in episodes if not e.is_done and limits.action_tokens(e) > 0]
            if not active:
                break
            budgets = [limits.action_tokens(episode) for episode in active]
            actions = sample([e.context_ids for e in active], max(budgets))
            actions = [action.cut(n) for action, n in zip(actions, budgets, strict=True)]
            for episode, action in zip(active, actions, strict=True):
                episode.num_cut += bool(action.ids) and action.ids[-1] not in ends
            self._play(active, actions, tokenizer, limits, is_last=turn == self.max_turns - 1)
        self._judge(episodes)
        return episodes

    def _limits(self, trainer: GRPOTrainer) -> Limits:
        config = causal_lm(cast(nn.Module, trainer.model)).config.get_text_config()
        return Limits(
            max_action_tokens=self.max_action_tokens,
            max_completion_tokens=int(trainer.max_completion_length or 0),
            # Models without position limits, such as state-space ones, have no such value.
            max_context_tokens=getattr(config, "max_position_embeddings", None),
        )

    def _start(
        self, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
    ) -> list[Episode]:
        rows = [self._row(prompt, index) for index, prompt in enumerate(prompts)]
        openings = self._pool.run([(seat, _reset_with(row)) for seat, row in enumerate(rows)])
        episodes: list[Episode] = []
        for seat, (prompt, row, opening) in enumerate(zip(prompts, rows, openings, strict=True)):
            messages = list(messages_from(prompt, f"prompt {seat}"))
            if isinstance(opening, str) and opening:
                last = messages[-1]
                messages[-1] = Message(last.role, last.content + opening)
            episode = Episode(
                seat=seat,
                messages=messages,
                prompt_ids=render_state(tokenizer, messages),
                source=f"rollout:{row.get('source', seat)}",
                num_prompt_messages=len(messages),
            )
            if isinstance(opening, Failure):
                # A row that cannot be played is the data's fault, not a failure of the moment.
                if isinstance(opening.error, DataError | ConfigError):
                    raise opening.error
                episode.fail(opening)
            episodes.append(episode)
        return episodes

    def _row(self, prompt: Prompt, index: int) -> Mapping[str, object]:
        row = self._rows.get(_prompt_key(prompt))
        if row is None:
            raise DataError(
                f"Prompt {index} is not among the rows this environment was given, so it cannot be "
                "reset. Pass the same data set to EnvironmentRollouts and to the trainer."
            )
        return row

    def _play(
        self,
        active: Sequence[Episode],
        actions: Sequence[SampledAction],
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        *,
        is_last: bool,
    ) -> None:
        """Carry out one sampled action of each episode and append what its environment answers."""
        texts = [
            cast(str, tokenizer.decode(action.ids, skip_special_tokens=True)) for action in actions
        ]
        answers = self._pool.run(
            [(e.seat, _step_with(text)) for e, text in zip(active, texts, strict=True)]
        )
        for episode, action, text, answer in zip(active, actions, texts, answers, strict=True):
            if isinstance(answer, Failure):
                episode.append(action.ids, action.logps, is_sampled=True)
                episode.messages.append(Message("assistant", text))
                episode.fail(answer)
            else:
                take_turn(episode, action, text, answer)
                episode.is_done = answer.is_done or is_last
                lead_to_next_turn(episode, action, answer, tokenizer, limits)

    def _judge(self, episodes: Sequence[Episode]) -> None:
        """The rewards; of an environment's own, so it may take long and fail as well."""
        judged = [episode for episode in episodes if episode.failure is None]
        rewards = self._pool.run([(e.seat, lambda made: made.get_reward()) for e in judged])
        for episode, reward in zip(judged, rewards, strict=True):
            if isinstance(reward, Failure):
                episode.fail(reward)
            else:
                episode.reward = reward
        failures = [episode.failure for episode in episodes if episode.failure is not None]
        if len(failures) == len(episodes):
            raise _total_failure(failures)


def _by_prompt(rows: Iterable[Mapping[str, object]]) -> dict[str, Mapping[str, object]]:
    found: dict[str, Mapping[str, object]] = {}
    for index, row in enumerate(rows):
        other = found.setdefault(_prompt_key(cast(Prompt, row["prompt"])), row)
        if other != row:
            differ = [k for k in {**other, **row} if other.get(k) != row.get(k)]
            raise DataError(
                f"Row {index} has the prompt of an earlier row and another {differ[0]!r}. TRL "
                "hands over the prompt alone, so nothing says which of the two to play. Give every "
                "row a prompt of its own."
            )
    return found


def _reset_with(row: Mapping[str, object]) -> Callable[[TextEnvironment], str | None]:
    values = {key: value for key, value in row.items() if key != "prompt"}
    return lambda environment: environment.reset(**values)


def _step_with(text: str) -> Callable[[TextEnvironment], Observation]:
    return lambda environment: environment._step_text(text)


def _total_failure(failures: Sequence[Failure]) -> BaseException:
    """Why a batch has no reward at all, which no later batch can be expected to have either."""
    first = failures[0]
    if first.kind == "crash":
        if isinstance(first.error, Exception):
            return first.error
        return RewardError(
            f"The environment raised {first.error!r} in all {len(failures)} rollouts, which would "
            "end the program without a word. Let it raise an Exception, or answer with an error."
        )
    return RewardError(
        f"The environment gave {first.error} in all {len(failures)} rollouts, so none of them has "
        "a reward. Raise rollout.step_timeout_s, lower rollout.max_concurrency where they wait for "
        "each other, or look for what it waits for."
    )


def _count_failures(episodes: Sequence[Episode], trainer: GRPOTrainer) -> None:
    kinds = [episode.failure.kind for episode in episodes if episode.failure is not None]
    counts = torch.tensor(
        [kinds.count("timeout"), kinds.count("crash")], device=trainer.accelerator.device
    )
    counts = cast(torch.Tensor, trainer.accelerator.reduce(counts, "sum"))
    is_training = cast(torch.nn.Module, trainer.model).training
    metrics = trainer._metrics["train" if is_training else "eval"]
    for name, count in zip(("timeouts", "crashes"), counts.tolist(), strict=True):
        metrics[f"rollouts/{name}"].append(count)


def _prompt_key(prompt: Prompt) -> str:
    return json.dumps([[row["role"], row["content"]] for row in prompt])
