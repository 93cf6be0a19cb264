"""One rollout in the making: its exact ids, what the environment wrote between them, its errors."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict, cast

from transformers import PreTrainedTokenizerBase

from composer_replication.batch.render import end_of_turn_ids, render_next_turn
from composer_replication.environments.protocol import Observation
from composer_replication.traces.hints import HintSite, hint_from_error
from composer_replication.traces.trace import Message
from composer_replication.training.action_sampling import SampledAction
from composer_replication.training.environment_pool import Failure


class RolloutBatch(TypedDict):
    """What TRL's `rollout_func` returns; one entry a rollout."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logprobs: list[list[float]] | None
    env_mask: list[list[int]]
    environment_reward: list[float | None]
    """None where the environment failed: such a rollout moves nothing."""
    environment_failure: list[str]
    """What failed, such as `timeout: no answer within 60 s`; empty where nothing did."""
    turns: list[list[dict[str, str]]]
    rollout_hint_sites: list[list[HintSite]]


@dataclass(slots=True)
class Episode:
    """One rollout in the making."""

    seat: int
    """Of its environment in the pool."""
    messages: list[Message]
    prompt_ids: list[int]
    source: str
    completion_ids: list[int] = field(default_factory=list[int])
    env_mask: list[int] = field(default_factory=list[int])
    logps: list[float] = field(default_factory=list[float])
    """The sampler's, 0 where the environment wrote; left empty where it gives none."""
    hint_sites: list[HintSite] = field(default_factory=list[HintSite])
    error_kinds: list[str] = field(default_factory=list[str])
    """Of each action that the environment refused; an empty one is no hint site."""
    num_cut: int = 0
    """Actions that reached their token limit before they ended."""
    num_prompt_messages: int = 0
    is_done: bool = False
    failure: Failure | None = None
    reward: float | None = None

    @property
    def context_ids(self) -> list[int]:
        """Everything the model has seen, exactly as it saw it."""
        return [*self.prompt_ids, *self.completion_ids]

    def append(
        self, ids: Sequence[int], logps: Sequence[float] | None, *, is_sampled: bool
    ) -> None:
        """More tokens of the completion; only sampled ones train."""
        self.completion_ids += ids
        self.env_mask += [int(is_sampled)] * len(ids)
        if logps is not None:
            self.logps += logps

    def fail(self, failure: Failure) -> None:
        """End it here, without a reward."""
        self.failure, self.is_done = failure, True


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a rollout may get: TRL's completion length, and the model's context."""

    max_action_tokens: int
    max_completion_tokens: int
    max_context_tokens: int | None
    """Positions that the model has; None: as many as there is memory for."""

    def action_tokens(self, episode: Episode) -> int:
        """Tokens that its next action may have; below 1: there is no room for one."""
        return min(self.max_action_tokens, self.room(episode))

    def room(self, episode: Episode) -> int:
        """Tokens that may be added to a rollout."""
        room = self.max_completion_tokens - len(episode.completion_ids)
        if self.max_context_tokens is None:
            return room
        return min(room, self.max_context_tokens - len(episode.context_ids))


def take_turn(episode: Episode, action: SampledAction, text: str, observation: Observation) -> None:
    """Record a sampled action; an error turn becomes a hint site with the exact ids."""
    if observation.error is not None:
        episode.error_kinds.append(observation.error.kind)
        # An empty action has no token to score.
        if action.ids:
            episode.hint_sites.append(_hint_site(episode, text, action.ids, observation))
    episode.append(action.ids, action.logps, is_sampled=True)
    episode.messages.append(Message("assistant", text))


def lead_to_next_turn(
    episode: Episode,
    action: SampledAction,
    observation: Observation,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
) -> None:
    """Append the environment's answer; one that leaves no room for an action ends the rollout."""
    answer = Message("tool", observation.content)
    if not episode.is_done:
        has_ended = bool(action.ids) and action.ids[-1] in end_of_turn_ids(tokenizer)
        next_turn = render_next_turn(tokenizer, answer, has_ended)
        if limits.room(episode) > len(next_turn):
            zeros = None if action.logps is None else [0.0] * len(next_turn)
            episode.append(next_turn, zeros, is_sampled=False)
        else:
            episode.is_done = True
    # One that the next turn follows is in its state, empty or not.
    if observation.content or not episode.is_done:
        episode.messages.append(answer)


def to_batch(episodes: Sequence[Episode], tokenizer: PreTrainedTokenizerBase) -> RolloutBatch:
    """The finished episodes in the form that TRL takes; no completion is empty."""
    has_logps = any(episode.logps for episode in episodes)
    for episode in episodes:
        if not episode.completion_ids:
            # TRL looks at the last token of every completion; this one was not sampled.
            end = [cast(int, tokenizer.eos_token_id)]
            episode.append(end, [0.0] if has_logps else None, is_sampled=False)
    return {
        "prompt_ids": [episode.prompt_ids for episode in episodes],
        "completion_ids": [episode.completion_ids for episode in episodes],
        "logprobs": [episode.logps for episode in episodes] if has_logps else None,
        "env_mask": [episode.env_mask for episode in episodes],
        "environment_reward": [episode.reward for episode in episodes],
        "environment_failure": [str(episode.failure or "") for episode in episodes],
        "turns": [
            [{"role": m.role, "content": m.content} for m in e.messages[e.num_prompt_messages :]]
            for e in episodes
        ],
        "rollout_hint_sites": [episode.hint_sites for episode in episodes],
    }


def _hint_site(
    episode: Episode, text: str, action_ids: list[int], observation: Observation
) -> HintSite:
    error = observation.error
    assert error is not None
    return HintSite(
        state=tuple(episode.messages),
        hint=hint_from_error(error),
        action=text,
        state_ids=tuple(episode.context_ids),
        action_ids=tuple(action_ids),
        is_on_policy=True,
        error_kind=error.kind,
        source=episode.source,
    )
