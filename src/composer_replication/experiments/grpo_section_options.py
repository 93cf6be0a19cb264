"""`[grpo]` as a whole: what this run would ignore, what it does not support, what is missing.

A value is compared with its default, so that a resolved configuration, which may hold every key,
loads again.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import cast

from pydantic import JsonValue
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from composer_replication.config.grpo_keys import group_problem, unsupported
from composer_replication.errors import (
    ConfigError,
    MissingDependencyError,
    listed,
    nearest,
    shown,
)
from composer_replication.experiments.grpo_section_values import value_problems
from composer_replication.training.composer_config import ComposerConfig

Grpo = Mapping[str, JsonValue]


@dataclass(frozen=True, slots=True)
class _Ignored:
    """Keys that change nothing, or cannot work, while `applies` holds for the section."""

    keys: tuple[str, ...]
    why: str
    """Continues "grpo.KEY is VALUE, "."""
    remedy: str
    applies: Callable[[Grpo], bool] | None = None
    """None: always."""


_LEAVE = "Leave it out."
_NO_EVALUATION = "and a run has no evaluation set, so nothing is evaluated"
_SHARDED = "and sharded weights are not supported: losses read the output head as one tensor"
_IGNORED: tuple[_Ignored, ...] = (
    _Ignored(
        ("eval_strategy", "do_eval", "eval_steps", "eval_delay", "eval_on_start",
         "per_device_eval_batch_size", "num_generations_eval", "eval_accumulation_steps",
         "prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "bf16_full_eval",
         "fp16_full_eval", "eval_do_concat_batches", "eval_use_gather_object",
         "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
        _NO_EVALUATION,
        _LEAVE,
    ),
    _Ignored(
        ("save_strategy",),
        _NO_EVALUATION,
        "Use 'steps' or 'epoch'.",
        lambda grpo: grpo["save_strategy"] == "best",
    ),
    _Ignored(
        ("lr_scheduler_type",),
        "which follows the figures of an evaluation, and a run has no evaluation set",
        "Use another schedule, such as 'constant_with_warmup'.",
        lambda grpo: grpo["lr_scheduler_type"] in ("reduce_lr_on_plateau", "greedy"),
    ),
    _Ignored(
        ("vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode",
         "vllm_structured_outputs_regex", "vllm_server_base_url", "vllm_server_host",
         "vllm_server_port", "vllm_server_timeout", "vllm_group_port",
         "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size",
         "vllm_importance_sampling_correction", "vllm_importance_sampling_mode",
         "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min",
         "vllm_importance_sampling_cap"),
        "which only vLLM reads, and grpo.use_vllm is false",
        "Set grpo.use_vllm = true, or leave it out.",
        lambda grpo: not grpo["use_vllm"],
    ),
    _Ignored(("ds3_gather_for_generation",), _SHARDED, _LEAVE),
    _Ignored(
        ("trust_remote_code",),
        "and code from a model repository is never run",
        "Leave it out; take a model that transformers knows.",
    ),
    _Ignored(
        ("chat_template_kwargs",),
        "and states, actions and hints are rendered without it: rollouts would see another text",
        "Write what you need into the tokenizer's chat template.",
    ),
    _Ignored(
        ("reward_weights",),
        "and a run has one reward, so there is nothing to weigh",
        "Leave it out; combine several rewards inside rollout.reward.",
    ),
    _Ignored(
        ("max_tool_calling_iterations",),
        "which counts calls of TRL's own tools, and a run has none",
        "Set rollout.max_turns.",
    ),
    _Ignored(
        ("remove_unused_columns",),
        "and it would take away the columns that the reward reads",
        _LEAVE,
    ),
    _Ignored(
        ("do_train", "do_predict"),
        "which transformers leaves to scripts, and nothing here reads it",
        _LEAVE,
    ),
    _Ignored(
        ("data_seed", "train_sampling_strategy", "length_column_name", "label_smoothing_factor",
         "label_names"),
        "and GRPO has its own sampler and loss, which do not read it",
        _LEAVE,
    ),
    _Ignored(
        ("sync_ref_model", "use_bias_correction_kl"),
        "and grpo.beta is 0, so there is no reference model for GRPO",
        "Set grpo.beta above 0, or leave it out.",
        lambda grpo: grpo["beta"] == 0,
    ),
    _Ignored(
        ("ref_model_mixup_alpha", "ref_model_sync_steps"),
        "and grpo.sync_ref_model is false, so the reference never moves",
        "Set grpo.sync_ref_model = true, or leave it out.",
        lambda grpo: not grpo["sync_ref_model"],
    ),
    _Ignored(
        ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
        "and grpo.use_adaptive_entropy is false, so the coefficient never moves",
        "Set grpo.use_adaptive_entropy = true, or leave it out.",
        lambda grpo: not grpo["use_adaptive_entropy"],
    ),
    _Ignored(
        ("sapo_temperature_neg", "sapo_temperature_pos"),
        "and grpo.loss_type is not 'sapo'",
        "Set grpo.loss_type = 'sapo', or leave it out.",
        lambda grpo: grpo["loss_type"] != "sapo",
    ),
    _Ignored(
        ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
        "and grpo.loss_type is not 'vespo'",
        "Set grpo.loss_type = 'vespo', or leave it out.",
        lambda grpo: grpo["loss_type"] != "vespo",
    ),
    _Ignored(
        ("delta",),
        "and grpo.loss_type is one that does not clip on two sides",
        _LEAVE,
        lambda grpo: grpo["loss_type"] in ("cispo", "sapo", "vespo"),
    ),
    _Ignored(
        ("num_completions_to_print", "log_unique_prompts", "log_completions_hub_repo"),
        "and grpo.log_completions is false; rollouts/ holds every completion",
        "Set grpo.log_completions = true, or leave it out.",
        lambda grpo: not grpo["log_completions"],
    ),
    _Ignored(
        ("transformers_continuous_batching_config",),
        "and grpo.use_transformers_continuous_batching is false",
        "Set that to true, or leave it out.",
        lambda grpo: not grpo["use_transformers_continuous_batching"],
    ),
    _Ignored(
        ("gradient_checkpointing_kwargs",),
        "and grpo.gradient_checkpointing is false",
        "Set that to true, or leave it out.",
        lambda grpo: not grpo["gradient_checkpointing"],
    ),
    _Ignored(
        ("hub_model_id", "hub_private_repo", "hub_strategy", "hub_always_push", "hub_revision"),
        "and grpo.push_to_hub is false",
        "Set that to true, or leave it out.",
        lambda grpo: not grpo["push_to_hub"],
    ),
    _Ignored(
        ("num_train_epochs",),
        "and grpo.max_steps is set too, which alone says how long the run is",
        "Leave one of them out.",
        lambda grpo: cast(int, grpo["max_steps"]) > 0,
    ),
)  # fmt: skip

_PACKAGES: tuple[tuple[str, Callable[[JsonValue], bool], str, str], ...] = (
    ("use_vllm", bool, "vllm", "trl[vllm]"),
    ("use_liger_kernel", bool, "liger_kernel", "liger-kernel"),
    ("report_to", lambda value: "wandb" in cast(str, value), "wandb", "wandb"),
    ("report_to", lambda value: "trackio" in cast(str, value), "trackio", "trackio"),
    ("report_to", lambda value: "tensorboard" in cast(str, value), "tensorboard", "tensorboard"),
    ("report_to", lambda value: "mlflow" in cast(str, value), "mlflow", "mlflow"),
    ("optim", lambda value: "bit" in cast(str, value) or "paged" in cast(str, value)
     or "bnb" in cast(str, value), "bitsandbytes", "bitsandbytes"),
    ("optim", lambda value: "galore" in cast(str, value), "galore_torch", "galore-torch"),
    ("optim", lambda value: "apollo" in cast(str, value), "apollo_torch", "apollo-torch"),
    ("optim", lambda value: "lomo" in cast(str, value), "lomo_optim", "lomo-optim"),
    ("optim", lambda value: "schedule_free" in cast(str, value), "schedulefree", "schedulefree"),
    ("optim", lambda value: value == "grokadamw", "grokadamw", "grokadamw"),
    ("optim", lambda value: value == "stable_adamw", "optimi", "torch-optimi"),
)  # fmt: skip
"""Key, whether its value needs the package, the module to find, and what to install."""


def check_grpo_section(grpo: Grpo, *, device_type: str) -> None:
    """Refuse every key of `[grpo]` that could not do what it says.

    Args:
        grpo: the section as given; what is not in it is at TRL's default.
        device_type: `cuda` or `cpu`.

    Raises:
        ConfigError: all problems at once.
        MissingDependencyError: an option whose package is not installed.
    """
    problems = [*value_problems(grpo), *unsupported(grpo)]
    if not problems:
        problems = [*_ignored(grpo), *_unsupported(grpo, device_type)]
        cut = group_problem(grpo, int(os.environ.get("WORLD_SIZE", "1")))
        problems += [] if cut is None else [cut]
        problems += _unknown_reports(grpo.get("report_to"))
    if problems:
        raise ConfigError(listed(problems))
    for key, needs, module, package in _PACKAGES:
        if key in grpo and needs(grpo[key]) and find_spec(module) is None:
            raise MissingDependencyError(
                f"grpo.{key} is {shown(grpo[key])}, and the package {package} is not installed. "
                f"Run `pip install {package}`, or leave grpo.{key} out."
            )


def _defaults() -> dict[str, JsonValue]:
    fields = [item for item in dataclasses.fields(ComposerConfig) if item.init]
    return {
        item.name: cast(
            JsonValue,
            item.default_factory()
            if item.default_factory is not dataclasses.MISSING
            else item.default,
        )
        for item in fields
    }


def _ignored(grpo: Grpo) -> list[str]:
    defaults = _defaults()
    # Checkpointing is off unless the file turns it on; in TRL it is on.
    effective = {**defaults, "gradient_checkpointing": False, **grpo}
    return [
        f"grpo.{key} is {shown(grpo[key])}, {rule.why}. {rule.remedy}"
        for rule in _IGNORED
        for key in rule.keys
        if key in grpo
        and grpo[key] != defaults[key]
        and (rule.applies is None or rule.applies(effective))
    ]


def _unsupported(grpo: Grpo, device_type: str) -> list[str]:
    problems = [
        f"grpo.{key} is {shown(grpo[key])}, and metrics.jsonl holds one row a step. "
        f"Set it to {only!r}, or leave it out."
        for key, only in (("logging_steps", 1), ("logging_strategy", "steps"))
        if grpo.get(key, only) != only
    ]
    if grpo.get("fp16") and device_type != "cuda":
        problems.append(
            "grpo.fp16 is True, and a CPU has no fp16 arithmetic to train with. "
            "Leave it out, or set grpo.bf16 = true."
        )
    if grpo.get("use_cpu") and device_type == "cuda":
        problems.append(
            "grpo.use_cpu is True, and this machine's GPU would be measured and not used. "
            "Leave it out, and hide the GPU with CUDA_VISIBLE_DEVICES= to run on the CPU."
        )
    return problems


def _unknown_reports(report_to: JsonValue) -> list[str]:
    names = [report_to] if isinstance(report_to, str) else report_to or []
    known = ["all", "none", *INTEGRATION_TO_CALLBACK]
    return [
        f"grpo.report_to is {name!r}, which transformers cannot report to. "
        f"{nearest(name, known)} Set it to 'none' to keep metrics.jsonl alone."
        for name in cast(list[str], names)
        if name not in known
    ]
