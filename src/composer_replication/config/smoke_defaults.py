"""What a smoke without a configuration file runs: sizes that fit the device, in minutes.

They are those of `configs/smoke_smollm2_135m.toml` and `configs/smoke_qwen2.5_0.5b.toml` (a test).
"""

from typing import Literal

from pydantic import JsonValue

from composer_replication.config.config_model import ConfigModel
from composer_replication.config.run_config import RunConfig

SectionValues = dict[str, dict[str, JsonValue]]

CPU_DEFAULTS: SectionValues = {
    "grpo": {"num_generations": 4, "max_completion_length": 72, "learning_rate": 1e-5},
    "rollout": {"max_turns": 2, "max_action_tokens": 24},
    "dpo": {"pairs_per_step": 1},
    "smoke": {"time_budget_s": 70.0},
}
CUDA_DEFAULTS: SectionValues = {
    "grpo": {
        "num_generations": 2,
        "max_completion_length": 256,
        "learning_rate": 5e-6,
        "gradient_checkpointing": True,
    },
    "rollout": {"max_turns": 2, "max_action_tokens": 96},
    "batch": {"max_context_tokens": 1024},
    "smoke": {"steps": 50, "max_shape_tokens": 1024},
}


def with_smoke_defaults(config: RunConfig, device_type: Literal["cpu", "cuda"]) -> RunConfig:
    """The configuration with every key that was not given set to suit that device.

    Example: `with_smoke_defaults(RunConfig(), "cpu").grpo["num_generations"]` -> 4.
    """
    defaults = CUDA_DEFAULTS if device_type == "cuda" else CPU_DEFAULTS
    grpo = {**defaults["grpo"], **_group_of(config), **config.grpo}
    # One whole group a step, whatever its size.
    grpo.setdefault("per_device_train_batch_size", grpo["num_generations"])
    sections = {
        name: _filled(getattr(config, name), defaults.get(name, {}))
        for name in ("rollout", "dpo", "batch", "smoke")
        if name not in _without_effect(config)
    }
    return config.model_copy(update={"grpo": grpo, **sections})


def _group_of(config: RunConfig) -> dict[str, JsonValue]:
    """Rows and group of a fixed shape; a group of two needs two steps of one row."""
    if config.smoke.fixed_shapes is None:
        return {}
    num_rows = config.smoke.fixed_shapes[0]
    if num_rows > 1:
        return {"per_device_train_batch_size": num_rows, "num_generations": num_rows}
    return {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "num_generations": 2,
    }


def _without_effect(config: RunConfig) -> set[str]:
    """Sections that this run does not read; a default in them would be taken for a wish."""
    unread: set[str] = set()
    if config.smoke.fixed_shapes is not None:
        unread |= {"rollout", "batch"}
    if config.rollout.reward is not None:
        unread.add("rollout")
    if config.beta_replay == 0:
        unread.add("dpo")
    return unread


def _filled(section: ConfigModel, values: dict[str, JsonValue]) -> ConfigModel:
    missing = {key: value for key, value in values.items() if key not in section.model_fields_set}
    given = section.model_dump(exclude_unset=True)
    if given.get("fixed_shapes") is not None:
        missing.pop("max_shape_tokens", None)
    return type(section).model_validate({**given, **missing})
