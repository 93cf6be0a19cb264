"""Multi-turn rollouts in an environment, behind TRL's `rollout_func`.

TRL's own `tools` and `environment_factory` refuse models whose chat template has no tool calls.
This loop lets the model act in plain text, keeps the sampled ids exact, marks what the environment
wrote (`env_mask`), and turns every error turn into a hint site.
"""

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict, cast

from transformers import PreTrainedTokenizerBase

from composer_replication.batch.render import end_of_turn_ids, render_next_turn, render_state
from composer_replication.environments.protocol import Observation, TextEnvironment
from composer_replication.errors import ConfigError, DataError
from composer_replication.traces.hints import HintSite, hint_from_error
from composer_replication.traces.trace import Message, TurnError, messages_from
from composer_replication.training.trl_hooks import GRPOTrainer

Prompt = Sequence[Mapping[str, object]]


class RolloutBatch(TypedDict):
    """What TRL's `rollout_func` returns; one entry a rollout."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logprobs: None
    env_mask: list[list[int]]
    environment_reward: list[float]
    turns: list[list[dict[str, str]]]
    rollout_hint_sites: list[list[HintSite]]


@dataclass(slots=True)
class Episode:
    """One rollout in the making."""

    environment: TextEnvironment
    messages: list[Message]
    prompt_ids: list[int]
    source: str
    completion_ids: list[int] = field(default_factory=list)
    env_mask: list[int] = field(default_factory=list)
    hint_sites: list[HintSite] = field(default_factory=list)
    num_prompt_messages: int = 0
    is_done: bool = False

    @property
    def context_ids(self) -> list[int]:
        """Everything the model has seen, exactly as it saw it."""
        return [*self.prompt_ids, *self.completion_ids]


class EnvironmentRollouts:
    """A `rollout_func` for `ComposerReplicationTrainer` and TRL's `GRPOTrainer` alike.

    Rows are found again by their prompt, since TRL hands over prompts alone.
    """

    def __init__(
        self,
        environment: Callable[[], object],
        rows: Iterable[Mapping[str, object]],
        *,
        max_turns: int = 2,
        max_action_tokens: int = 40,
    ) -> None:
        """Keep the task.

        Args:
            environment: makes an instance with `reset(**row)`, `_step_text` and `get_reward`.
            rows: of the training set: `prompt` and what `reset` takes.
            max_turns: actions an episode may take, at least 1.
            max_action_tokens: tokens one action may take, at least 1.

        Raises:
            ConfigError: an environment that cannot be driven by text.
        """
        probe = environment()
        if not isinstance(probe, TextEnvironment):
            raise ConfigError(
                f"{type(probe).__name__} lacks reset, _step_text or get_reward, so this rollout "
                "loop cannot drive it. Implement environments.protocol.TextEnvironment, or pass it "
                "to TRL as environment_factory with a model whose template has tool calls."
            )
        self._pool: list[TextEnvironment] = [probe]
        self._environment = environment
        self._rows = {_prompt_key(cast(Prompt, row["prompt"])): row for row in rows}
        self.max_turns = max_turns
        self.max_action_tokens = max_action_tokens

    def __call__(self, prompts: Sequence[Prompt], trainer: GRPOTrainer) -> RolloutBatch:
        """Play one episode for each prompt, all of them turn by turn."""
        tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)
        episodes = [self._start(prompt, i, tokenizer) for i, prompt in enumerate(prompts)]
        for turn in range(self.max_turns):
            active = [episode for episode in episodes if not episode.is_done]
            budget = self._turn_budget(active, int(trainer.max_completion_length or 0))
            if not active or budget < 1:
                break
            actions = sample_actions(trainer, [e.context_ids for e in active], budget)
            is_last = turn == self.max_turns - 1
            for episode, action_ids in zip(active, actions, strict=True):
                _play(episode, action_ids, tokenizer, is_last=is_last)
        return {
            "prompt_ids": [episode.prompt_ids for episode in episodes],
            "completion_ids": [episode.completion_ids for episode in episodes],
            "logprobs": None,
            "env_mask": [episode.env_mask for episode in episodes],
            "environment_reward": [e.environment.get_reward() for e in episodes],
            "turns": [
                [
                    {"role": m.role, "content": m.content}
                    for m in e.messages[e.num_prompt_messages :]
                ]
                for e in episodes
            ],
            "rollout_hint_sites": [episode.hint_sites for episode in episodes],
        }

    def _turn_budget(self, active: Sequence[Episode], max_completion_length: int) -> int:
        longest = max((len(episode.completion_ids) for episode in active), default=0)
        return min(self.max_action_tokens, max_completion_length - longest)

    def _start(self, prompt: Prompt, index: int, tokenizer: PreTrainedTokenizerBase) -> Episode:
        row = self._rows.get(_prompt_key(prompt))
        if row is None:
            raise DataError(
                f"Prompt {index} is not among the rows this environment was given, so it cannot be "
                "reset. Pass the same data set to EnvironmentRollouts and to the trainer."
            )
        while len(self._pool) <= index:
            self._pool.append(cast(TextEnvironment, self._environment()))
        environment = self._pool[index]
        messages = list(messages_from(prompt, f"prompt {index}"))
        opening = environment.reset(**{k: v for k, v in row.items() if k != "prompt"})
        if opening:
            last = messages[-1]
            messages[-1] = Message(last.role, last.content + opening)
        return Episode(
            environment=environment,
            messages=messages,
            prompt_ids=render_state(tokenizer, messages),
            source=f"rollout:{row.get('source', index)}",
            num_prompt_messages=len(messages),
        )


def sample_actions(
    trainer: GRPOTrainer, contexts: Sequence[list[int]], max_new_tokens: int
) -> list[list[int]]:
    """One sampled action for each context, with TRL's own generation path and settings.

    Each ends with its end-of-turn token unless `max_new_tokens` cut it off.
    """
    whole = trainer.generation_config
    trainer.generation_config = copy.deepcopy(whole)
    trainer.generation_config.max_new_tokens = max_new_tokens
    try:
        # Autocast keeps its casts of the weights until the outermost context ends; without this
        # one it casts every weight again for each token (half of the decode time on CPU).
        with trainer.accelerator.autocast():
            # One completion a context: after the first turn each rollout has its own history.
            action_ids, _ = trainer._generate_single_turn(
                list(contexts), None, {}, num_generations=1
            )
    finally:
        trainer.generation_config = whole
    return cast(list[list[int]], action_ids)


def _play(
    episode: Episode, action_ids: list[int], tokenizer: PreTrainedTokenizerBase, *, is_last: bool
) -> None:
    """Carry out one sampled action and append what the environment answers."""
    text = cast(str, tokenizer.decode(action_ids, skip_special_tokens=True))
    observation = episode.environment._step_text(text)
    if observation.error is not None:
        episode.hint_sites.append(_hint_site(episode, text, action_ids, observation))
    episode.completion_ids += action_ids
    episode.env_mask += [1] * len(action_ids)
    episode.messages.append(Message("assistant", text))
    episode.is_done = observation.is_done or is_last
    answer = Message("tool", observation.content)
    if not episode.is_done:
        has_ended = action_ids[-1] in end_of_turn_ids(tokenizer)
        next_turn = render_next_turn(tokenizer, answer, has_ended)
        episode.completion_ids += next_turn
        episode.env_mask += [0] * len(next_turn)
    if observation.content:
        episode.messages.append(answer)


def _hint_site(
    episode: Episode, text: str, action_ids: list[int], observation: Observation
) -> HintSite:
    error = observation.error
    assert error is not None
    return HintSite(
        state=tuple(episode.messages),
        hint=hint_from_error(TurnError(error.kind, error.message, error.example)),
        action=text,
        state_ids=tuple(episode.context_ids),
        action_ids=tuple(action_ids),
        is_on_policy=True,
        error_kind=error.kind,
        source=episode.source,
    )


def _prompt_key(prompt: Prompt) -> str:
    return json.dumps([[row["role"], row["content"]] for row in prompt])
