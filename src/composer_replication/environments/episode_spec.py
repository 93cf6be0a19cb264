"""What one row of `prompts.jsonl` says about its API-drift episode."""

from collections.abc import Mapping
from dataclasses import dataclass

from composer_replication.environments.api_drift_rules import TOOL_KEYS
from composer_replication.environments.api_drift_tasks import NUM_DEMOS
from composer_replication.environments.spec_rows import read_spec
from composer_replication.errors import DataError


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
    """What a row of `prompts.jsonl` says about its episode, besides `prompt`.

    Example: `EpisodeSpec(task_seed=3, split="train")`.
    """

    task_seed: int
    split: str = "train"
    """Content pool: `train`, `validation` or `heldout`."""
    drift_seed: int = 0
    """0 is the shipped drift."""
    num_drifted_tools: int = len(TOOL_KEYS)
    num_spare_turns: int = 1
    """Turns beyond the plan's length: how many errors an episode forgives."""
    is_example_shown: bool = True
    """Whether the model sees an error's example; a recorded error carries it either way."""
    num_hint_demos: int = 0
    """How many of the prompt's requests, the last ones, a hint answers in today's form; 0: it has
    one example call and says no request."""

    def __post_init__(self) -> None:
        if self.num_spare_turns < 0:
            raise DataError(
                f"num_spare_turns is {self.num_spare_turns}; it must be 0 or more. "
                "With fewer turns than the task has steps, no reward above 0.6 could be reached."
            )
        if not 0 <= self.num_hint_demos <= NUM_DEMOS:
            raise DataError(
                f"num_hint_demos is {self.num_hint_demos}; a prompt shows {NUM_DEMOS} requests. "
                f"Choose 0 to {NUM_DEMOS}."
            )


def spec_from_row(row: Mapping[str, object]) -> EpisodeSpec:
    """The spec in a row of the API-drift task.

    Raises:
        DataError: a field that is missing, unknown or of the wrong type.
    """
    return read_spec(row, EpisodeSpec, "An API-drift row")
