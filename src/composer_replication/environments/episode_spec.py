"""What one row of `prompts.jsonl` says about its API-drift episode."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_type_hints

from composer_replication.environments.api_drift_rules import TOOL_KEYS
from composer_replication.errors import DataError, nearest


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
    """What a row of `prompts.jsonl` says about its episode, besides `prompt`.

    Example: `EpisodeSpec(task_seed=3, split="train")`.
    """

    task_seed: int
    split: str = "train"
    """Content pool: `train` or `heldout`."""
    drift_seed: int = 0
    """0 is the shipped drift."""
    num_drifted_tools: int = len(TOOL_KEYS)
    num_spare_turns: int = 1
    """Turns beyond the plan's length: how many errors an episode forgives."""
    is_example_shown: bool = True
    """Whether the model sees an error's example; a recorded error carries it either way."""

    def __post_init__(self) -> None:
        if self.num_spare_turns < 0:
            raise DataError(
                f"num_spare_turns is {self.num_spare_turns}; it must be 0 or more. "
                "With fewer turns than the task has steps, no reward above 0.6 could be reached."
            )


def spec_from_row(row: Mapping[str, object]) -> EpisodeSpec:
    """The spec in a row; `prompt` and TRL's `environment` are left to others.

    Raises:
        DataError: a field that is missing, unknown or of the wrong type.
    """
    known = get_type_hints(EpisodeSpec)
    values = {key: value for key, value in row.items() if key not in ("prompt", "environment")}
    for key, value in values.items():
        if key not in known:
            raise DataError(f"An API-drift row has the unknown key {key!r}. {nearest(key, known)}")
        # type() and not isinstance: True is an int, and would be taken for seed 1.
        if type(value) is not known[key]:
            name = known[key].__name__
            raise DataError(f"An API-drift row has {key} = {value!r}; it must be {name}.")
    if "task_seed" not in values:
        raise DataError("An API-drift row has no 'task_seed'. Each row of prompts.jsonl has one.")
    return EpisodeSpec(**values)  # pyright: ignore[reportArgumentType]
