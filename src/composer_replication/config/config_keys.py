"""The configuration's dotted keys: their descriptions, and how two configurations differ."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import cast, get_args

from pydantic import BaseModel

from composer_replication.config.config_model import ConfigModel
from composer_replication.config.run_config import RunConfig

_SAFE_KEYS = frozenset(
    {
        "grpo.max_steps",
        "grpo.num_train_epochs",
        "grpo.save_steps",
        "grpo.save_strategy",
        "grpo.save_total_limit",
        "smoke.steps",
        "smoke.time_budget_s",
    }
)
"""They say how long a run is and what is kept of it, not what a step does."""

_SAFE_SECTIONS = ("diagnostics.", "guards.", "modal.")
"""They watch a run, or say where it goes, and change nothing that it computes."""


@cache
def known_keys() -> dict[str, str]:
    """Every dotted key of `RunConfig` with its description on one line."""
    return dict(_walk_fields(RunConfig, ""))


def changed_keys(before: RunConfig, after: RunConfig, *, with_length: bool = False) -> list[str]:
    """Dotted keys whose values differ, without those that a resumed run may change.

    Args:
        before: of the run as it was started.
        after: as it would go on.
        with_length: also how long a run is and what is kept of it; runs that are compared are
            equally long.
    """
    old = dict(_walk_values(before.model_dump(), ""))
    new = dict(_walk_values(after.model_dump(), ""))
    different = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    if not with_length:
        different -= _SAFE_KEYS
    return sorted(key for key in different if not key.startswith(_SAFE_SECTIONS))


def _walk_fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        yield key, " ".join((field.description or "").split())
        for candidate in (field.annotation, *get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, ConfigModel):
                yield from _walk_fields(candidate, f"{key}.")


def _walk_values(table: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for name, value in table.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _walk_values(cast("dict[str, object]", value), f"{key}.")
        else:
            yield key, value
