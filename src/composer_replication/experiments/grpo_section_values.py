"""`[grpo]`, key by key: known, set in the right place, of the right type, in bounds.

TRL and transformers check few of their values when they are given; the others fail after the model
is loaded, or train on without a word.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from types import NoneType
from typing import Any, cast, get_args, get_type_hints

from pydantic import JsonValue, TypeAdapter, ValidationError

from composer_replication.errors import shown
from composer_replication.training.composer_config import ComposerConfig
from composer_replication.training.trl_hooks import GRPOConfig

# Set by other keys of the file, so a second place for them would only contradict.
_OWNED_KEYS = {
    "output_dir": "--out",
    "resume_from_checkpoint": "--resume",
    "seed": "seed",
    "alpha_sdpo": "alpha_sdpo",
    "beta_replay": "beta_replay",
    "channel_weights": "[channels]",
    "channel_schedule": "batch.channel_schedule",
    "teacher": "teacher",
    "teacher_ema_rate": "sdpo.teacher_ema_rate",
    "tree": "tree",
    "hint_site_actions": "sdpo.actions",
    "hint_sites_per_step": "sdpo.sites_per_step",
    "dpo_beta": "dpo.beta",
    "dpo_label_smoothing": "dpo.label_smoothing",
    "pairs_per_step": "dpo.pairs_per_step",
    "max_context_tokens": "batch.max_context_tokens",
    "tree_max_tokens": "batch.tree_max_tokens",
    "truncation": "batch.truncation",
}
_SHARED_KEYS = frozenset({"loss_type", "scale_rewards"})
"""TRL's keys whose defaults are ours."""

_ELSEWHERE = {
    "use_peft": "[lora]: the section turns the adapter on",
    "peft_config": "[lora]",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "model_name_or_path": "model",
    "model": "model",
    "attn_implementation": "nothing: it is sdpa",
    "dtype": "grpo.model_init_kwargs.dtype",
    "tools": "rollout.environment: an environment's methods are its tools",
    "reward_funcs": "rollout.reward",
    "environment_factory": "rollout.environment",
    "max_prompt_length": "nothing: prompts are never cut",
    "peak_lr": "grpo.learning_rate",
    "lr": "grpo.learning_rate",
    "batch_size": "grpo.per_device_train_batch_size",
}
"""Keys that other trainers or older versions have, and where the setting is here."""

Bound = tuple[tuple[str, ...], str, Callable[[float], bool]]
_BOUNDS: tuple[Bound, ...] = (
    (
        (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "max_completion_length",
            "num_iterations",
            "steps_per_generation",
            "generation_batch_size",
        ),
        "at least 1",
        lambda value: value >= 1,
    ),
    (("num_generations",), "at least 2", lambda value: value >= 2),
    (("max_steps",), "at least 1, or -1 for num_train_epochs", lambda v: v >= 1 or v == -1),
    (
        ("temperature", "repetition_penalty", "num_train_epochs", "epsilon", "epsilon_high",
         "delta", "adam_epsilon", "save_steps", "sapo_temperature_neg", "sapo_temperature_pos"),
        "above 0",
        lambda value: value > 0,
    ),
    (
        ("learning_rate", "weight_decay", "max_grad_norm", "beta", "warmup_steps", "top_k",
         "dataloader_num_workers"),
        "at least 0",
        lambda value: value >= 0,
    ),
    (("top_p", "vllm_gpu_memory_utilization"), "above 0 and at most 1", lambda v: 0 < v <= 1),
    (("adam_beta1", "adam_beta2"), "at least 0 and below 1", lambda value: 0 <= value < 1),
    (
        ("min_p", "top_entropy_quantile", "ref_model_mixup_alpha"),
        "from 0 to 1",
        lambda value: 0 <= value <= 1,
    ),
)  # fmt: skip

_CHOICES: dict[str, Sequence[str]] = {
    "loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "scale_rewards": ("none", "group", "batch"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_mode": ("colocate", "server"),
}
"""Texts that TRL takes and checks at the first step, if at all."""

_TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a table",
    list: "an array",
}


def value_problems(grpo: Mapping[str, JsonValue]) -> list[str]:
    """A sentence for each key of `[grpo]` that is unknown, elsewhere, mistyped or out of bounds."""
    known = {item.name for item in dataclasses.fields(ComposerConfig) if item.init}
    trls = {item.name for item in dataclasses.fields(GRPOConfig)} | _SHARED_KEYS
    hints = get_type_hints(ComposerConfig)
    problems: list[str] = []
    for key, value in grpo.items():
        if key not in known:
            problems.append(_unknown_key(key, known & trls))
        elif key in _OWNED_KEYS or key not in trls:
            problems.append(_owned_key(key))
        elif not _has_type(value, hints[key]) and not _is_old_boolean(key, value):
            problems.append(_line(key, value, _type_name(hints[key])))
        else:
            problems += _bound_problem(key, value) + _choice_problem(key, value, hints[key])
    return problems


def _unknown_key(key: str, known: set[str]) -> str:
    if key in _ELSEWHERE:
        return f"Unknown key grpo.{key}. What you want is set by {_ELSEWHERE[key]}."
    close = difflib.get_close_matches(key, sorted(known), n=1)
    if close:
        return f"Unknown key grpo.{key}. Did you mean {close[0]!r}?"
    return (
        f"Unknown key grpo.{key}, and no key of TRL's GRPOConfig is like it. "
        "Keys of other sections are listed in docs/configuration.md."
    )


def _owned_key(key: str) -> str:
    owner = _OWNED_KEYS.get(key)
    if owner is None:
        section, _, rest = key.partition("_")
        owner = f"{section}.{rest}" if section in ("sdpo", "dpo") else "a section of its own"
    return f"grpo.{key} is set, but {key} is owned by {owner}. Set it there."


def _has_type(value: JsonValue, hint: object) -> bool:
    try:
        TypeAdapter(cast(Any, hint)).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _is_old_boolean(key: str, value: JsonValue) -> bool:
    # TRL still reads true as "group" and false as "none".
    return key == "scale_rewards" and isinstance(value, bool)


def _type_name(hint: object) -> str:
    members = [getattr(member, "__origin__", member) for member in get_args(hint) or (hint,)]
    names = [_TYPE_NAMES.get(member, "text") for member in members if member is not NoneType]
    return " or ".join(dict.fromkeys(names))


def _bound_problem(key: str, value: JsonValue) -> list[str]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return []
    return [
        _line(key, value, text)
        for keys, text, is_allowed in _BOUNDS
        if key in keys and not is_allowed(value)
    ]


def _choice_problem(key: str, value: JsonValue, hint: object) -> list[str]:
    choices = _CHOICES.get(key)
    for member in get_args(hint):
        if isinstance(member, type) and issubclass(member, Enum):
            choices = [str(item.value) for item in member]
    if choices is None or not isinstance(value, str) or value in choices:
        return []
    close = difflib.get_close_matches(value, choices, n=1)
    suggestion = f"Did you mean {close[0]!r}? " if close else ""
    return [
        f"grpo.{key} is {value!r}, which TRL does not know. {suggestion}"
        f"It takes {', '.join(choices)}."
    ]


def _line(key: str, value: JsonValue, wanted: str) -> str:
    (field,) = (item for item in dataclasses.fields(ComposerConfig) if item.name == key)
    # TRL's own help, to its first full stop; transformers' fields have none.
    purpose = " ".join(str(field.metadata.get("help", "")).partition(". ")[0].split())
    return (
        f"grpo.{key} is {shown(value)}; it must be {wanted}. "
        f"{purpose.rstrip('.') + '. ' if purpose else ''}"
        f"Change it in the file or with --set grpo.{key}=VALUE."
    )
