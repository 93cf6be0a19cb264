"""Environments by name: the shipped ones, and the user's own as `package.module:Class`."""

import traceback
from importlib import import_module
from pathlib import Path

from composer_replication.environments.api_drift import ApiDrift
from composer_replication.environments.call_format import CallFormat
from composer_replication.environments.reasoning_gym_task import ReasoningGym
from composer_replication.environments.recorded_state import RecordedState
from composer_replication.errors import ConfigError, nearest

ENVIRONMENTS: dict[str, type] = {
    "api_drift": ApiDrift,
    "call_format": CallFormat,
    "fix_call": RecordedState,
    "reasoning_gym": ReasoningGym,
}
"""Shipped environments; the keys are what a configuration and a manifest may name."""


def environment_class(name: str) -> type:
    """The environment class of that name.

    Example: `environment_class("api_drift")` -> `ApiDrift`.

    Args:
        name: a key of `ENVIRONMENTS`, or `package.module:Class` of an installed module.

    Raises:
        ConfigError: an unknown name, a module that cannot be imported, or not an environment.
    """
    if name in ENVIRONMENTS:
        return ENVIRONMENTS[name]
    module_name, _, class_name = name.partition(":")
    if not (module_name and class_name):
        raise ConfigError(
            f"There is no environment {name!r}. {nearest(name, ENVIRONMENTS)} "
            "Your own is written 'package.module:Class'."
        )
    found = imported_object(name, f"The environment {name!r}")
    missing = [part for part in ("reset", "get_reward") if not hasattr(found, part)]
    if not isinstance(found, type) or missing:
        raise ConfigError(
            f"{name!r} is not an environment class: it lacks {' and '.join(missing) or 'a class'}. "
            "composer_replication.environments.protocol shows what one needs."
        )
    return found


def imported_object(path: str, what: str) -> object:
    """What `package.module:Name` names.

    Args:
        path: with a colon.
        what: the thing and its name, as the start of a sentence.

    Raises:
        ConfigError: a module that is not there or fails, or has nothing of that name.
    """
    module_name, _, name = path.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{what} cannot be imported: {error}. "
            "Install its package, or put its folder on PYTHONPATH."
        ) from error
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"{what} cannot be imported: {module_name} raised {type(error).__name__}: {error} "
            f"({Path(frame.filename).name}, line {frame.lineno}). Correct that module."
        ) from error
    if not hasattr(module, name):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise ConfigError(
            f"{what} cannot be imported: {module_name} has no {name!r}. "
            f"{nearest(name, public)} Correct the name."
        )
    return getattr(module, name)
