"""What judges the rollouts, found and tried on the prompts before the model loads."""

import inspect
import json
import time
from typing import cast

from composer_replication.config.run_config import RunConfig
from composer_replication.environments.registry import environment_class, imported_object
from composer_replication.errors import ConfigError, DataError, RewardError
from composer_replication.experiments.run_data import PROMPTS_FILE, RunData
from composer_replication.traces.json_lines import Row
from composer_replication.training.checked_environment import CheckedEnvironment
from composer_replication.training.rewards import RewardFunction, checked_reward

RESETS_BUDGET_S = 5.0
"""Seconds for trying `reset` on the prompts; an environment that starts a sandbox is tried once."""

# What TRL hands to a reward function beside the columns of the data.
_TRL_KEYWORDS = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
)


def find_judge(config: RunConfig, data: RunData) -> tuple[type | None, RewardFunction | None]:
    """The environment, or the reward function, that judges rollouts; neither for fixed shapes.

    Raises:
        ConfigError: none is named, or the named one cannot be imported, made or called.
        DataError: prompts that it does not take.
    """
    if config.smoke.fixed_shapes is not None:
        return None, None
    if config.rollout.reward is not None:
        return None, _reward(config.rollout.reward, data)
    name = config.rollout.environment or data.task
    if name is None:
        raise ConfigError(
            f"{data.folder} names no task and rollout.reward is not set, so rollouts would have no "
            "reward. Set rollout.environment, or rollout.reward = 'package.module:function'."
        )
    try:
        environment = environment_class(name)
    except ConfigError as error:
        if config.rollout.environment is not None:
            raise
        raise ConfigError(f"{data.folder / 'manifest.json'}, task: {error}") from error
    _try_environment(environment, data)
    return environment, None


def _reward(path: str, data: RunData) -> RewardFunction:
    function = imported_object(path, f"rollout.reward is {path!r}, which")
    if not callable(function):
        raise ConfigError(
            f"rollout.reward is {path!r}, which is no function but {type(function).__name__}. "
            "Name a function in TRL's signature."
        )
    columns = prompt_columns(data)
    keywords = dict.fromkeys([*_TRL_KEYWORDS, *columns])
    try:
        inspect.signature(function).bind(**keywords)
    except TypeError as error:
        raise ConfigError(
            f"rollout.reward is {path!r}, which cannot be called: {error}. It gets "
            f"{', '.join(keywords)}. Take what you need and **kwargs for the rest."
        ) from error
    return checked_reward(cast(RewardFunction, function), path)


def prompt_columns(data: RunData) -> list[str]:
    """The keys of the prompts beside `prompt`; every row has them.

    Raises:
        DataError: a row that lacks a key of another: its value would be None.
    """
    keys = dict.fromkeys(key for row in data.prompts for key in row)
    for index, row in enumerate(data.prompts):
        lacking = [key for key in keys if key not in row]
        if lacking:
            raise DataError(
                f"{data.place(PROMPTS_FILE, index)}: there is no {lacking[0]!r}, which other rows "
                "have, and a reward function would be given None. Add it to every row."
            )
    return [key for key in keys if key != "prompt"]


def _try_environment(environment: type, data: RunData) -> None:
    """Make one, and reset it as the rollouts will."""
    instance = CheckedEnvironment(environment)
    _refuse_ambiguous_prompts(data)
    started_s = time.perf_counter()
    for index, row in enumerate(data.prompts):
        try:
            instance.reset(**{key: value for key, value in row.items() if key != "prompt"})
        except (DataError, RewardError) as error:
            raise type(error)(f"{data.place(PROMPTS_FILE, index)}: {error}") from error
        if time.perf_counter() - started_s > RESETS_BUDGET_S:
            return


def _refuse_ambiguous_prompts(data: RunData) -> None:
    """A rollout finds its row again by its prompt, so equal prompts must be equal rows."""
    seen: dict[str, tuple[int, Row]] = {}
    for index, row in enumerate(data.prompts):
        key = json.dumps(row["prompt"])
        first, first_row = seen.setdefault(key, (index, row))
        if first_row != row:
            raise DataError(
                f"{data.place(PROMPTS_FILE, index)} has the same prompt as line "
                f"{data.lines[PROMPTS_FILE][first]} and other values beside it. A rollout finds "
                "its row by its prompt, so one of them would play the other's task. Make the "
                "prompts differ, or drop one."
            )
