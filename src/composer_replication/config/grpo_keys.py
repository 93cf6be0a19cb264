"""`[grpo]` as far as it can be judged without TRL: names, numbers, switches and whole groups.

The rest is checked with TRL at hand, when a run starts (`experiments/grpo_section_values.py`).
"""

import difflib
from collections.abc import Callable, Mapping
from typing import cast

from pydantic import JsonValue

from composer_replication.config.trl_fields import OWN_FIELDS, TRL_FIELDS
from composer_replication.errors import shown

TRL_DEFAULTS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 8,
    "max_completion_length": 512,
    "num_iterations": 1,
}
"""Whole numbers that a step needs, where the file has none."""

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

_DTYPES = ("float32", "bfloat16", "float16")
_UNSUPPORTED: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("deepspeed", "fsdp", "fsdp_config", "parallelism_config"),
        "and sharded weights are not supported: losses read the output head as one tensor. Leave "
        "it out; [lora] and grpo.gradient_checkpointing need less memory.",
    ),
    (
        ("torch_compile", "torch_compile_backend", "torch_compile_mode"),
        "and a compiled model does not run the hook that captures hidden states. Leave it out.",
    ),
)

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

_COUNTS = (*TRL_DEFAULTS, "steps_per_generation", "generation_batch_size", "max_steps")
_SWITCHES = ("bf16", "fp16", "gradient_checkpointing", "use_vllm")
_NUMBERS = ("num_train_epochs", "beta")


def section_problems(grpo: Mapping[str, JsonValue]) -> list[str]:
    """A sentence for each unknown key and for each number or switch that a step cannot have."""
    problems: list[str] = []
    for key, value in grpo.items():
        problem = key_problem(key) or _type_problem(key, value)
        if problem is not None:
            problems.append(problem)
        else:
            problems += [_line(key, value, wanted) for wanted in broken_bounds(key, value)]
    return [*problems, *unsupported(grpo)]


def unsupported(grpo: Mapping[str, JsonValue]) -> list[str]:
    """What no run does and what changes its memory and time: a plan refuses it too."""
    problems = [
        f"grpo.{key} is {shown(grpo[key])}, {why}"
        for keys, why in _UNSUPPORTED
        for key in keys
        if grpo.get(key)
    ]
    init = grpo.get("model_init_kwargs")
    given = init if isinstance(init, dict) else {} if init is None else {"": init}
    problems += [
        f"grpo.model_init_kwargs has {key!r}, and the model is loaded by this package, which "
        "reads dtype alone. Leave it out."
        for key in given
        if key != "dtype"
    ]
    dtype = given.get("dtype", "float32")
    if dtype not in _DTYPES:
        problems.append(
            f"grpo.model_init_kwargs.dtype is {shown(dtype)}; it must be 'float32', 'bfloat16' "
            "or 'float16'. Leave it out for float32 master weights."
        )
    return problems


def key_problem(key: str) -> str | None:
    """What is wrong with a key's name; None: nothing."""
    if key not in TRL_FIELDS | OWN_FIELDS:
        return unknown_key(key)
    return _owned_key(key) if key in _OWNED_KEYS or key not in TRL_FIELDS else None


def broken_bounds(key: str, value: JsonValue) -> list[str]:
    """The bounds that a number is outside of, in words."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return []
    return [text for keys, text, is_allowed in _BOUNDS if key in keys and not is_allowed(value)]


def grpo_count(grpo: Mapping[str, JsonValue], key: str) -> int:
    """A whole number of the section, or TRL's default."""
    return cast(int, grpo.get(key, TRL_DEFAULTS[key]))


def steps_per_generation(grpo: Mapping[str, JsonValue], num_processes: int) -> int:
    """Micro-batches that one generation of rollouts is cut into, as TRL has it.

    Args:
        grpo: the section, without a `group_problem`.
        num_processes: cards that share a step.
    """
    given, whole = grpo.get("steps_per_generation"), grpo.get("generation_batch_size")
    if isinstance(given, int):
        return given
    if isinstance(whole, int):
        return whole // (grpo_count(grpo, "per_device_train_batch_size") * num_processes)
    return grpo_count(grpo, "gradient_accumulation_steps")


def group_problem(grpo: Mapping[str, JsonValue], num_processes: int) -> str | None:
    """Why the rollouts of a step are no whole groups or generations; None: they are.

    Args:
        grpo: the section, its numbers checked.
        num_processes: cards that share a step.
    """
    rows = grpo_count(grpo, "per_device_train_batch_size")
    accumulation = grpo_count(grpo, "gradient_accumulation_steps")
    group = grpo_count(grpo, "num_generations")
    given, whole = grpo.get("steps_per_generation"), grpo.get("generation_batch_size")
    processes = f" x {num_processes} processes" if num_processes > 1 else ""
    if given is not None and whole is not None:
        return (
            f"grpo.steps_per_generation is {given} and grpo.generation_batch_size {whole}, which "
            "both say how many rollouts are sampled at a time. Leave one of them out."
        )
    if isinstance(whole, int) and whole % (rows * num_processes):
        return (
            f"grpo.generation_batch_size is {whole}, and micro-batches of "
            f"grpo.per_device_train_batch_size {rows}{processes} do not divide it. Make it a "
            f"multiple of {rows * num_processes}."
        )
    per_generation = steps_per_generation(grpo, num_processes)
    if per_generation % accumulation:
        name = "steps_per_generation" if whole is None else "generation_batch_size"
        cut = "" if whole is None else f", which makes {per_generation} micro-batches,"
        return (
            f"grpo.{name} is {given or whole}{cut} and grpo.gradient_accumulation_steps "
            f"is {accumulation}, so an optimizer step would span several generations and could not "
            "count its tokens before it starts. Make the first a multiple of "
            f"{accumulation * (1 if whole is None else rows * num_processes)}."
        )
    rollouts = rows * per_generation * num_processes
    if rollouts % group == 0:
        return None
    if given is not None or whole is not None:
        return (
            f"A generation has {rollouts} rollouts (grpo.per_device_train_batch_size {rows}"
            f"{processes} x {per_generation} micro-batches), and a group has grpo.num_generations "
            f"= {group}: one would be cut. Make it a multiple of {group}."
        )
    return (
        f"grpo.per_device_train_batch_size {rows} x gradient_accumulation_steps {accumulation}"
        f"{processes} makes {rollouts} rollouts a step, and a group has grpo.num_generations = "
        f"{group}: one would be cut. Set grpo.per_device_train_batch_size = {group}, or make the "
        f"product another multiple of {group}."
    )


def unknown_key(key: str) -> str:
    """What to say of a key that is none."""
    if key in _ELSEWHERE:
        return f"Unknown key grpo.{key}. What you want is set by {_ELSEWHERE[key]}."
    close = difflib.get_close_matches(key, sorted(TRL_FIELDS), n=1)
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


def _type_problem(key: str, value: JsonValue) -> str | None:
    is_switch = isinstance(value, bool)
    if key in _SWITCHES and not is_switch:
        return _line(key, value, "true or false")
    if key in _COUNTS and (is_switch or not isinstance(value, int)):
        return _line(key, value, "a whole number")
    if key in _NUMBERS and (is_switch or not isinstance(value, int | float)):
        return _line(key, value, "a number")
    return None


def _line(key: str, value: JsonValue, wanted: str) -> str:
    return (
        f"grpo.{key} is {shown(value)}; it must be {wanted}. "
        f"Change it in the file or with --set grpo.{key}=VALUE."
    )
