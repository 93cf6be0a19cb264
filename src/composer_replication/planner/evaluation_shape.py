"""An evaluation as the numbers that a plan needs, as `run_shape` has them for a run that trains."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from composer_replication.planner.data_shape import RecordLengths, prompt_lengths
from composer_replication.planner.model_files import Settings
from composer_replication.planner.model_shape import model_shape
from composer_replication.planner.run_shape import RunShape
from composer_replication.planner.sampling_shape import BATCH_SIZE, RolloutShape
from composer_replication.planner.step_case import StepCase


@dataclass(frozen=True, slots=True)
class EvaluationSize:
    """How much an evaluation plays.

    Example: `EvaluationSize.of(rows, num_models=2, num_samples=4, max_turns=8, ...)`.
    """

    num_models: int
    num_episodes: int
    """Of each model, greedy and sampled ones."""
    prompts: RecordLengths
    max_turns: int
    """That an episode may take."""
    max_action_tokens: int

    @classmethod
    def of(
        cls,
        prompts: Sequence[Mapping[str, object]],
        *,
        num_models: int,
        episodes_a_prompt: int,
        max_turns: int,
        max_action_tokens: int,
    ) -> Self:
        """The size of an evaluation on these prompts.

        Args:
            prompts: rows with `prompt`.
            num_models: measured one after the other.
            episodes_a_prompt: greedy and sampled ones together.
            max_turns: that an episode may take.
            max_action_tokens: where an action is cut.
        """
        return cls(
            num_models=num_models,
            num_episodes=len(prompts) * episodes_a_prompt,
            prompts=prompt_lengths(prompts),
            max_turns=max_turns,
            max_action_tokens=max_action_tokens,
        )


def evaluated_kind(settings: Settings) -> str:
    """What models of one architecture and size share, wherever their weights lie.

    Example: `evaluated_kind(model_settings("smollm2-135m"))` -> `"llama 135M"`.
    """
    return f"{settings['model_type']} {model_shape(settings).num_parameters / 1e6:.0f}M"


def evaluation_shape(
    size: EvaluationSize, settings: Settings, *, device_type: Literal["cpu", "cuda"]
) -> RunShape:
    """The numbers of an evaluation; its steps are its models.

    Args:
        size: what is played.
        settings: the larger model's `config.json`.
        device_type: a card holds weights in bf16, a CPU in fp32.
    """
    sampled_tokens = size.max_turns * size.max_action_tokens
    num_rows = min(size.num_episodes, BATCH_SIZE)
    case = StepCase(
        settings,
        num_rollouts=num_rows,
        prompt_tokens=size.prompts.longest_state,
        completion_tokens=sampled_tokens,
        weights_dtype="bfloat16" if device_type == "cuda" else "float32",
        device_type=device_type,
    )
    return RunShape(
        case=case,
        rollouts=RolloutShape(
            num_rows=num_rows,
            # Samples of one prompt share it; in greedy decoding each has its own.
            num_contexts=num_rows,
            prompt_tokens=size.prompts.longest_state,
            sampled_tokens=sampled_tokens,
        ),
        num_micro_batches=math.ceil(size.num_episodes / num_rows),
        num_steps=size.num_models,
        steps_budget_s=None,
        steps_a_checkpoint=1,
        verb="evaluate",
        typical_share=1.0,
        tree_share=1.0,
        # Its weights are.
        uses_bf16=device_type == "cuda",
        alternates=False,
        is_padded=True,
    )
