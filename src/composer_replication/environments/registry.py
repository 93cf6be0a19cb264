"""Environments by name: the shipped ones, and the user's own as `package.module:Class`."""

from importlib import import_module

from composer_replication.environments.api_drift import ApiDrift
from composer_replication.errors import ConfigError, nearest

ENVIRONMENTS: dict[str, type] = {"api_drift": ApiDrift}
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
    module_name, colon, class_name = name.partition(":")
    if not (module_name and colon and class_name):
        raise ConfigError(
            f"There is no environment {name!r}. {nearest(name, ENVIRONMENTS)} "
            "Your own is written 'package.module:Class'."
        )
    try:
        found = getattr(import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"The environment {name!r} cannot be imported: {error}. "
            "Install its package, or put its folder on PYTHONPATH."
        ) from error
    missing = [part for part in ("reset", "get_reward") if not hasattr(found, part)]
    if not isinstance(found, type) or missing:
        raise ConfigError(
            f"{name!r} is not an environment class: it lacks {' and '.join(missing) or 'a class'}. "
            "composer_replication.environments.protocol shows what one needs."
        )
    return found
