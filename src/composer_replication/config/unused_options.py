"""Options that the chosen path would ignore: refused, or noted where a sweep may hold them.

A value is compared with its default and not asked whether it was set, so that a resolved
configuration, which holds every key, loads again.
"""

from composer_replication.config.channel_sections import BatchConfig, DpoConfig, SdpoConfig
from composer_replication.config.config_model import ConfigModel
from composer_replication.config.execution_sections import RolloutConfig
from composer_replication.config.run_config import RunConfig
from composer_replication.errors import ConfigError, listed, shown

_DEFAULT_ROWS = 8
"""TRL's `per_device_train_batch_size`."""


def check_used_options(config: RunConfig) -> list[str]:
    """Notes on what has no effect in this run.

    A weight of 0 beside its channel's settings is a note, since sweeps go through it; whatever
    else would be ignored is refused.

    Args:
        config: as the verb runs it: `train` has put `smoke` at its defaults.

    Raises:
        ConfigError: every option that could not do what it says.
    """
    problems = [*_fixed_shape_problems(config), *_rollout_problems(config)]
    problems += _teacher_problems(config)
    if problems:
        raise ConfigError(listed(problems))
    return _notes(config)


def _fixed_shape_problems(config: RunConfig) -> list[str]:
    shape = config.smoke.fixed_shapes
    if shape is None:
        return []
    num_rows, num_tokens = shape
    problems = [
        f"rollout.{key} is {shown(value)} and smoke.fixed_shapes is {list(shape)}: nothing is "
        f"sampled or judged then. Leave one of them out."
        for key, value in _changed(config.rollout, RolloutConfig()).items()
    ]
    if config.data is not None:
        problems.append(
            f"data is {shown(config.data)} and smoke.fixed_shapes is {list(shape)}: rows of that "
            "length are made up, and no data is read. Leave one of them out."
        )
    limit = config.batch.max_context_tokens
    if limit is not None and limit < num_tokens:
        problems.append(
            f"batch.max_context_tokens is {limit} and smoke.fixed_shapes is {list(shape)}: rows of "
            f"{num_tokens} tokens are over that limit. Leave batch.max_context_tokens out."
        )
    rows = config.grpo.get("per_device_train_batch_size", _DEFAULT_ROWS)
    if rows != num_rows:
        problems.append(
            f"smoke.fixed_shapes is {list(shape)}, which asks for {num_rows} rows, and "
            f"grpo.per_device_train_batch_size is {rows}. Make them equal."
        )
    return problems


def _rollout_problems(config: RunConfig) -> list[str]:
    if config.rollout.reward is None or config.smoke.fixed_shapes is not None:
        return []
    changed = _changed(config.rollout, RolloutConfig(reward=config.rollout.reward))
    return [
        f"rollout.{key} is {shown(value)} and rollout.reward is {config.rollout.reward!r}: without "
        "an environment a rollout is one turn of grpo.max_completion_length tokens. "
        f"Leave rollout.{key} out."
        for key, value in changed.items()
    ]


def _teacher_problems(config: RunConfig) -> list[str]:
    rate, default = config.sdpo.teacher_ema_rate, SdpoConfig().teacher_ema_rate
    kind = config.teacher or ("ema" if config.lora is None else "frozen")
    if kind == "ema" or rate == default or config.alpha_sdpo == 0:
        return []
    given = repr(config.teacher) if config.teacher else f"{kind!r} by default under [lora]"
    return [
        f"sdpo.teacher_ema_rate is {rate} and teacher is {given}, which follows no average. "
        "Set teacher = 'ema', or leave sdpo.teacher_ema_rate out."
    ]


def _notes(config: RunConfig) -> list[str]:
    notes: list[str] = []
    # A channel of one's own may read either section; which one is not known here.
    if any(config.channels.values()):
        return notes
    if config.alpha_sdpo == 0:
        keys = [f"sdpo.{key}" for key in _changed(config.sdpo, SdpoConfig())]
        keys += ["teacher"] if config.teacher is not None else []
        notes += _without_effect("alpha_sdpo", keys)
    if config.beta_replay == 0:
        keys = [f"dpo.{key}" for key in _changed(config.dpo, DpoConfig())]
        notes += _without_effect("beta_replay", keys)
    if config.alpha_sdpo == config.beta_replay == 0:
        keys = [f"batch.{key}" for key in _changed(config.batch, BatchConfig())]
        notes += _without_effect("alpha_sdpo and beta_replay", keys)
    elif 0 in (config.alpha_sdpo, config.beta_replay) and _alternates(config):
        notes.append("batch.channel_schedule is 'alternate' and only one channel is on.")
    return notes


def _alternates(config: RunConfig) -> bool:
    return config.batch.channel_schedule == "alternate"


def _without_effect(weight: str, keys: list[str]) -> list[str]:
    if not keys:
        return []
    verb = "are" if " and " in weight else "is"
    return [f"{weight} {verb} 0, so without effect: {', '.join(keys)}."]


def _changed(section: ConfigModel, default: ConfigModel) -> dict[str, object]:
    values, defaults = section.model_dump(), default.model_dump()
    return {key: value for key, value in values.items() if value != defaults[key]}
