"""Reading what a row of `prompts.jsonl` says about its episode into a task's own dataclass."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import TypeVar, get_type_hints

from composer_replication.errors import DataError, nearest

Spec = TypeVar("Spec")


def read_spec(row: Mapping[str, object], spec_class: type[Spec], what: str) -> Spec:
    """The spec in a row; `prompt` and TRL's `environment` are left to others.

    Example: `read_spec({"task_seed": 3}, EpisodeSpec, "A row")` -> `EpisodeSpec(task_seed=3)`.

    Args:
        row: of `prompts.jsonl`.
        spec_class: a dataclass whose fields are plain types.
        what: the row, as the start of a sentence.

    Raises:
        DataError: a field that is missing, unknown or of the wrong type.
    """
    known = get_type_hints(spec_class)
    values = {key: value for key, value in row.items() if key not in ("prompt", "environment")}
    for key, value in values.items():
        if key not in known:
            raise DataError(f"{what} has the unknown key {key!r}. {nearest(key, known)}")
        # type() and not isinstance: True is an int, and would be taken for seed 1.
        if type(value) is not known[key]:
            name = known[key].__name__
            raise DataError(f"{what} has {key} = {value!r}; it must be {name}.")
    for part in fields(spec_class):  # pyright: ignore[reportArgumentType]
        if part.default is MISSING and part.name not in values:
            raise DataError(f"{what} has no {part.name!r}. Each row of prompts.jsonl has one.")
    return spec_class(**values)
