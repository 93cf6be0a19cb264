"""From a run's configuration to its largest micro-batch, its rollouts and its number of steps."""

import math
from dataclasses import dataclass, replace
from typing import Literal, cast

from pydantic import JsonValue

from composer_replication.config.grpo_keys import group_problem, grpo_count
from composer_replication.config.run_config import RunConfig
from composer_replication.errors import ConfigError
from composer_replication.planner.data_shape import DataShape
from composer_replication.planner.model_files import Settings
from composer_replication.planner.model_shape import check_targets
from composer_replication.planner.sampling_shape import (
    BATCH_SIZE,
    NOTHING_SAMPLED,
    RolloutShape,
    VllmEngine,
    heldout_shape,
    rollout_shape,
    vllm_engine,
)
from composer_replication.planner.step_case import OptimizerName, StepCase, TeacherKind

SMOKE_STEPS = 50
"""Most that a smoke takes where `smoke.steps` says nothing."""

RunVerb = Literal["smoke", "train", "evaluate"]

_TRL_EPOCHS = 3.0
_TRL_SAVE_STEPS = 500

_OPTIMIZERS: dict[str, OptimizerName] = {
    "adamw_torch_fused": "adamw_torch_fused",
    "adamw_torch": "adamw_torch",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "sgd": "sgd",
    "adafactor": "adafactor",
}


@dataclass(frozen=True, slots=True)
class RunShape:
    """A run as numbers, on one kind of device.

    Example: `run_shape(config, settings, data, device_type="cuda").num_steps`.
    """

    case: StepCase
    """The largest micro-batch that the run can meet."""
    rollouts: RolloutShape
    num_micro_batches: int
    num_steps: int
    steps_budget_s: float | None
    """A smoke on a CPU that names no number of steps takes as many as fit this; None: all."""
    steps_a_checkpoint: int
    """Steps between two of its checkpoints; all of them where its end alone is kept."""
    verb: RunVerb
    typical_share: float
    """Tokens of a typical row over those of the largest."""
    tree_share: float
    alternates: bool
    uses_bf16: bool
    """Its weights or its matrix products are in bf16."""
    is_padded: bool
    """Rows of unequal length are padded, which gives attention a mask to keep."""
    evaluation: RolloutShape = NOTHING_SAMPLED
    """What an evaluation on held-out prompts decodes together."""
    num_evaluation_batches: int = 0
    """Of those, in all evaluations of the run."""
    num_checkpoints: int = 0
    """Written in the run, that of its end included."""
    num_kept_checkpoints: int = 0
    """Of them, those that stay."""
    compares_reference: bool = False
    """GRPO has a KL term, which scores every rollout under the starting weights."""
    has_reference: bool = False
    """They are a second copy of the model; an adapter is turned off instead."""
    num_measured_steps: int = 0
    """Those at which each channel's own gradient is measured, and held."""
    num_credit_steps: int = 0
    """Those whose tokens' credit is written."""
    vllm: VllmEngine | None = None
    """Samples the rollouts in place of transformers."""

    @property
    def generations_a_step(self) -> float:
        """Rounds of sampling for one optimizer step; 0 where nothing is sampled."""
        if self.rollouts.num_rows == 0:
            return 0.0
        used = self.rollouts.num_rows * self.rollouts.num_iterations
        return self.num_micro_batches * self.case.num_rollouts / used


def run_shape(
    config: RunConfig,
    settings: Settings,
    data: DataShape,
    *,
    device_type: Literal["cpu", "cuda"],
    computes_bf16: bool,
    has_flash: bool = True,
    num_processes: int = 1,
    verb: RunVerb | None = None,
) -> RunShape:
    """The numbers of a run.

    Args:
        config: of the run, the smoke's defaults filled in.
        settings: the model's `config.json`.
        data: lengths of its rows; not read where the shapes are fixed.
        device_type: decides precision and tiles.
        computes_bf16: the device multiplies bf16, so the run computes in it unless it is told
            otherwise.
        has_flash: the card runs torch's flash attention.
        num_processes: cards that share a step, each with rows of its own.
        verb: that runs it; None: `train` where `[grpo]` sets a length, `smoke` otherwise.

    Raises:
        ConfigError: an optimizer whose memory is not known, or rollouts that are no whole groups.
    """
    micro_batches = grpo_count(config.grpo, "gradient_accumulation_steps")
    cut = group_problem(config.grpo, num_processes)
    if cut is not None and config.smoke.fixed_shapes is None:
        raise ConfigError(cut)
    verb = verb or verb_of(config)
    setting = _setting(config, settings, device_type, computes_bf16, has_flash)
    case = _with_rows(setting, config, data, verb)
    num_steps = _num_steps(config, data, verb, num_processes)
    every_steps = config.evaluation.every_steps if verb == "train" else None
    steps_a_checkpoint = _steps_a_checkpoint(config, data, num_steps, verb, num_processes)
    has_none = verb != "train" or config.grpo.get("save_strategy") == "no"
    num_checkpoints = 0 if has_none else math.ceil(num_steps / steps_a_checkpoint)
    most_kept = cast(int | None, config.grpo.get("save_total_limit")) or num_checkpoints
    takes_what_fits = verb == "smoke" and config.smoke.steps is None and device_type == "cpu"
    return RunShape(
        case=replace(case, accumulates=micro_batches > 1),
        rollouts=rollout_shape(config, case, num_processes),
        num_micro_batches=micro_batches,
        num_steps=num_steps,
        steps_budget_s=config.smoke.time_budget_s if takes_what_fits else None,
        steps_a_checkpoint=steps_a_checkpoint,
        num_checkpoints=num_checkpoints,
        num_kept_checkpoints=min(num_checkpoints, most_kept),
        verb=verb,
        typical_share=_typical_share(config, case, data),
        tree_share=data.tree_share,
        uses_bf16=_has_bf16(config, computes_bf16) or _asked_dtype(config) == "bfloat16",
        alternates=config.batch.channel_schedule == "alternate",
        is_padded=config.smoke.fixed_shapes is None,
        evaluation=heldout_shape(config, case) if every_steps else NOTHING_SAMPLED,
        num_evaluation_batches=_num_evaluation_batches(config, num_steps) if every_steps else 0,
        has_reference=bool(config.grpo.get("beta")) and config.lora is None,
        compares_reference=bool(config.grpo.get("beta")),
        num_measured_steps=num_steps // (config.diagnostics.gradients_every or num_steps + 1),
        num_credit_steps=num_steps // (config.diagnostics.credit_every or num_steps + 1),
        vllm=vllm_engine(config),
    )


def _setting(
    config: RunConfig,
    settings: Settings,
    device_type: Literal["cpu", "cuda"],
    computes_bf16: bool,
    has_flash: bool,
) -> StepCase:
    """The case without its rows."""
    has_bf16 = _has_bf16(config, computes_bf16)
    autocasts = has_bf16 or bool(config.grpo.get("fp16"))
    lora, asked = config.lora, _asked_dtype(config)
    is_half = asked in ("bfloat16", "float16") or (asked is None and lora is not None and has_bf16)
    name = str(config.grpo.get("optim", "adamw_torch_fused"))
    if name not in _OPTIMIZERS:
        raise ConfigError(
            f"grpo.optim is {name!r}, whose memory is not known here. Known: "
            f"{', '.join(_OPTIMIZERS)}. Plan with one of them for an upper bound."
        )
    targets = "all-linear" if lora is None else _targets(lora.target_modules)
    check_targets(targets)
    # With both extra channels off TRL runs its own forward, unless asked not to.
    has_channels = config.alpha_sdpo > 0 or config.beta_replay > 0
    is_packed = config.tree == "always" or (config.tree == "auto" and has_channels)
    default_teacher: TeacherKind = "ema" if lora is None else "frozen"
    return StepCase(
        settings,
        teacher=config.teacher or default_teacher,
        weights_dtype="bfloat16" if is_half else "float32",
        autocasts=autocasts,
        optimizer=_OPTIMIZERS[name],
        lora_r=None if lora is None else lora.r,
        lora_targets=targets,
        checkpoints=bool(config.grpo.get("gradient_checkpointing", False)),
        executor="packed" if is_packed else "separate",
        tree_max_tokens=config.batch.tree_max_tokens if is_packed else None,
        device_type=device_type,
        has_flash=has_flash,
    )


def _has_bf16(config: RunConfig, computes_bf16: bool) -> bool:
    """Whether the run's forwards are under bf16 autocast."""
    return bool(config.grpo.get("bf16", computes_bf16 and not config.grpo.get("fp16")))


def _asked_dtype(config: RunConfig) -> JsonValue:
    """Of the weights, where the file says."""
    kwargs = config.grpo.get("model_init_kwargs")
    return kwargs.get("dtype") if isinstance(kwargs, dict) else None


def _targets(targets: list[str] | str) -> tuple[str, ...] | str:
    return targets if isinstance(targets, str) else tuple(targets)


def _with_rows(case: StepCase, config: RunConfig, data: DataShape, verb: RunVerb) -> StepCase:
    """The rows of the largest micro-batch."""
    micro_batches = grpo_count(config.grpo, "gradient_accumulation_steps")
    rows = grpo_count(config.grpo, "per_device_train_batch_size")
    completion = grpo_count(config.grpo, "max_completion_length")
    sites = math.ceil(config.sdpo.sites_per_step / micro_batches) if config.alpha_sdpo > 0 else 0
    pairs = math.ceil(config.dpo.pairs_per_step / micro_batches) if config.beta_replay > 0 else 0
    shape, limit = config.smoke.fixed_shapes, config.batch.max_context_tokens
    if shape is not None:
        rows, row = shape
        completion = min(completion, row // 2)
        context, action, hint = row, min(32, row // 4), min(24, row // 4)
        pair_context, pair_action = row, action
    else:
        row = completion + data.prompts.longest_state
        if verb == "smoke" and config.smoke.max_shape_tokens is not None:
            row = config.smoke.max_shape_tokens
            completion = min(completion, row - 1)
        of_sites = data.hint_sites
        action = max(of_sites.longest_action, config.rollout.max_action_tokens)
        hint = max(of_sites.longest_hint, 48)
        context = max(of_sites.longest_state, row - config.rollout.max_action_tokens)
        context += action + hint
        pair_action = max(data.pairs.longest_action, 1)
        pair_context = data.pairs.longest_state + pair_action
        if limit is not None:
            is_smoke = verb == "smoke"
            # A smoke's step at the largest shape fills every row to the limit.
            context = limit if is_smoke else min(context, limit)
            pair_context = limit if is_smoke else min(pair_context, limit)
    action, hint = min(action, context // 2), min(hint, context // 4)
    pair_action = min(pair_action, pair_context // 2)
    state, prompt = max(context - hint - action, 1), max(row - completion, 1)
    # Recorded sites fill what error turns leave, and share nothing with the rollouts.
    has_recorded = data.hint_sites.longest_state > 0
    are_turns = shape is None and not has_recorded and prompt <= state <= row - action
    return replace(
        case,
        num_rollouts=rows,
        num_prompts=math.ceil(rows / grpo_count(config.grpo, "num_generations")),
        prompt_tokens=prompt,
        completion_tokens=completion,
        num_sites=sites,
        num_rollout_sites=sites if are_turns else 0,
        state_tokens=state,
        hint_tokens=hint,
        action_tokens=max(action, 1),
        num_pairs=pairs,
        pair_state_tokens=max(pair_context - pair_action, 1),
        pair_action_tokens=max(pair_action, 1),
    )


def _typical_share(config: RunConfig, case: StepCase, data: DataShape) -> float:
    if config.smoke.fixed_shapes is not None:
        return 1.0
    longest = case.prompt_tokens + case.completion_tokens
    typical = data.prompts.typical_row + 0.5 * case.completion_tokens
    return min(1.0, typical / longest)


def verb_of(config: RunConfig) -> RunVerb:
    """A run whose length `[grpo]` sets is a train run; any other is planned as a smoke."""
    is_train = any(key in config.grpo for key in ("max_steps", "num_train_epochs"))
    return "train" if is_train else "smoke"


def _num_evaluation_batches(config: RunConfig, num_steps: int) -> int:
    every_steps = config.evaluation.every_steps
    assert every_steps, "asked only where it is set"
    # One before the first step, one after the last.
    num_evaluations = 1 + math.ceil(num_steps / every_steps)
    return num_evaluations * math.ceil(config.evaluation.prompts / BATCH_SIZE)


def _num_steps(config: RunConfig, data: DataShape, verb: RunVerb, num_processes: int) -> int:
    if verb == "smoke":
        return config.smoke.steps or SMOKE_STEPS
    steps = config.grpo.get("max_steps", -1)
    if isinstance(steps, int) and steps > 0:
        return steps
    epochs = cast(float, config.grpo.get("num_train_epochs", _TRL_EPOCHS))
    return max(1, math.ceil(epochs * _epoch_steps(config, data, num_processes)))


def _epoch_steps(config: RunConfig, data: DataShape, num_processes: int) -> float:
    rows = grpo_count(config.grpo, "per_device_train_batch_size")
    rows_a_step = rows * grpo_count(config.grpo, "gradient_accumulation_steps") * num_processes
    group = grpo_count(config.grpo, "num_generations")
    all_rows = data.num_prompts * group * grpo_count(config.grpo, "num_iterations")
    return all_rows / rows_a_step


def _steps_a_checkpoint(
    config: RunConfig, data: DataShape, num_steps: int, verb: RunVerb, num_processes: int
) -> int:
    """As TRL reads `grpo.save_strategy` and `grpo.save_steps`; a smoke starts anew."""
    strategy = config.grpo.get("save_strategy", "steps")
    every = cast(float, config.grpo.get("save_steps", _TRL_SAVE_STEPS))
    if verb == "smoke" or strategy not in ("steps", "epoch"):
        return num_steps
    if strategy == "epoch":
        every = _epoch_steps(config, data, num_processes)
    elif every < 1:
        # A share of the run.
        every *= num_steps
    return min(max(1, math.ceil(every)), num_steps)
