"""`[grpo]`, key by key: known, set in the right place, of the right type, in bounds.

TRL and transformers check few of their values when they are given; the others fail after the model
is loaded, or train on without a word.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from enum import Enum
from types import NoneType
from typing import Any, cast, get_args, get_type_hints

from pydantic import JsonValue, TypeAdapter, ValidationError

from composer_replication.config.grpo_keys import broken_bounds, key_problem, unknown_key
from composer_replication.errors import shown
from composer_replication.training.composer_config import ComposerConfig

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
    hints = get_type_hints(ComposerConfig)
    problems: list[str] = []
    for key, value in grpo.items():
        # Other versions of TRL and transformers have other fields.
        problem = key_problem(key) if key in hints else unknown_key(key)
        if problem is not None:
            problems.append(problem)
        elif not _has_type(value, hints[key]) and not _is_old_boolean(key, value):
            problems.append(_line(key, value, _type_name(hints[key])))
        else:
            problems += [_line(key, value, wanted) for wanted in broken_bounds(key, value)]
            problems += _choice_problem(key, value, hints[key])
    return problems


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
