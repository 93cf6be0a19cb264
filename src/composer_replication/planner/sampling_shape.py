"""What a run samples together: its rollouts, and its evaluations on held-out prompts."""

import math
from dataclasses import dataclass
from typing import cast

from composer_replication.config.grpo_keys import grpo_count, steps_per_generation
from composer_replication.config.run_config import RunConfig
from composer_replication.planner.step_case import StepCase

BATCH_SIZE = 64
"""Contexts that an evaluation decodes at a time."""

MAX_EPISODE_TOKENS = 4096
"""That an episode of an evaluation may have after its prompt."""

_VLLM_SHARE = 0.3
"""TRL's `vllm_gpu_memory_utilization`."""


@dataclass(frozen=True, slots=True)
class RolloutShape:
    """What is sampled together, before a step or in an evaluation; 0 rows where nothing is."""

    num_rows: int
    """Sampled together, whatever the micro-batch is."""
    num_contexts: int
    """Distinct prompts among them: a group's is computed once."""
    prompt_tokens: int
    sampled_tokens: int
    """Most that one row samples, one after another; 0: the rows are given."""
    resampled_tokens: int = 0
    """Sampled for the actions at hint sites."""
    num_resampled: int = 0
    num_iterations: int = 1
    """Times that each micro-batch of them is trained on."""
    is_scored: bool = False
    """Their log-probs under the policy are kept: it moves before they are all used."""


NOTHING_SAMPLED = RolloutShape(0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class VllmEngine:
    """vLLM beside the training, as `grpo.use_vllm` asks for it."""

    card_share: float
    """Of the card's memory, which it takes whatever the model is; 0: it is a server elsewhere."""
    sleeps: bool
    """Gives its memory back between two rounds of sampling."""


def rollout_shape(config: RunConfig, case: StepCase, num_processes: int) -> RolloutShape:
    """The rollouts of one generation on one card.

    Args:
        config: of the run.
        case: its largest micro-batch.
        num_processes: cards that share a step, each with rollouts of its own.
    """
    is_given = config.smoke.fixed_shapes is not None
    per_generation = steps_per_generation(config.grpo, num_processes)
    iterations = grpo_count(config.grpo, "num_iterations")
    accumulation = grpo_count(config.grpo, "gradient_accumulation_steps")
    # TRL's own sampling, which a reward function judges, computes each row's prompt.
    shares = not is_given and config.rollout.reward is None
    resamples = not is_given and config.alpha_sdpo > 0 and config.sdpo.actions == "resampled"
    num_steps = per_generation * iterations // accumulation
    group = grpo_count(config.grpo, "num_generations")
    num_rows = case.num_rollouts * per_generation
    return RolloutShape(
        num_rows=num_rows,
        num_contexts=math.ceil(num_rows / group) if shares else num_rows,
        prompt_tokens=case.prompt_tokens,
        sampled_tokens=0 if is_given else _episode_tokens(config, case, case.completion_tokens),
        resampled_tokens=config.rollout.max_action_tokens if resamples else 0,
        num_resampled=num_steps * config.sdpo.sites_per_step if resamples else 0,
        num_iterations=iterations,
        # TRL scores them unless they are all used in the step that follows.
        is_scored=accumulation % (per_generation * iterations) != 0 or _corrects_vllm(config),
    )


def heldout_shape(config: RunConfig, case: StepCase) -> RolloutShape:
    """What an evaluation on held-out prompts decodes together."""
    num_rows = min(config.evaluation.prompts, BATCH_SIZE)
    return RolloutShape(
        num_rows=num_rows,
        num_contexts=num_rows,
        prompt_tokens=case.prompt_tokens,
        sampled_tokens=_episode_tokens(config, case, MAX_EPISODE_TOKENS),
    )


def vllm_engine(config: RunConfig) -> VllmEngine | None:
    """The engine that samples the rollouts; None: transformers does."""
    if not config.grpo.get("use_vllm"):
        return None
    if config.grpo.get("vllm_mode", "colocate") != "colocate":
        return VllmEngine(0.0, sleeps=False)
    share = config.grpo.get("vllm_gpu_memory_utilization", _VLLM_SHARE)
    sleeps = bool(config.grpo.get("vllm_enable_sleep_mode", False))
    return VllmEngine(cast(float, share), sleeps=sleeps)


def _episode_tokens(config: RunConfig, case: StepCase, limit: int) -> int:
    """Most that an episode samples: one answer for a reward function, otherwise all its turns."""
    if config.rollout.reward is not None:
        return case.completion_tokens
    return min(limit, config.rollout.max_turns * config.rollout.max_action_tokens)


def _corrects_vllm(config: RunConfig) -> bool:
    """TRL corrects for the difference between vLLM's log-probs and the policy's own."""
    is_corrected = config.grpo.get("vllm_importance_sampling_correction", True)
    return bool(config.grpo.get("use_vllm")) and bool(is_corrected)
