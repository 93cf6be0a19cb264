"""Shipped tasks by name: their environment, knobs and data, made from seeds alone, without a model.

    rows = task_rows("call_format", "heldout", num_episodes=64, num_matching_demos=0)
    environment = environment_class("call_format")()
    environment.reset(**rows.prompts[0])

Success is a reward of 1 in every task, and held-out data has other content. Data of another seed
shares no prompt with this one's, but for `reasoning_gym`, where a question may come again.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from composer_replication.environments.call_format_tasks import FormatSpec
from composer_replication.environments.episode_spec import EpisodeSpec
from composer_replication.environments.reasoning_gym_task import GymSpec
from composer_replication.environments.spec_rows import read_spec
from composer_replication.errors import ConfigError, DataError, nearest
from composer_replication.experiments.api_drift_data import api_drift_rows
from composer_replication.experiments.call_format_data import call_format_rows
from composer_replication.experiments.fix_call_data import FixCallSpec, fix_call_rows
from composer_replication.experiments.reasoning_gym_data import reasoning_gym_rows
from composer_replication.experiments.run_data import DATA_SCHEMA
from composer_replication.experiments.task_rows import TaskRows, write_manifest, write_split
from composer_replication.traces.json_lines import Row

SPLITS = ("train", "validation", "heldout")
"""Settings are chosen on `validation`, so that `heldout` is seen by the last measurement only."""
WRITTEN_SPLITS = ("train", "heldout")
"""Those that a data folder holds."""
TASK_SEEDS_PER_SEED = 1000
"""Data of seed s uses the task seeds from 1000 s on."""


@dataclass(frozen=True, slots=True)
class Task:
    """One shipped task.

    Example: `TASKS["fix_call"].knobs()` -> `{"drift_seed": 0, "num_teachers": 3}`.
    """

    name: str
    """Also the name of its environment."""
    spec_class: type[Any]
    """Dataclass of one episode or recorded run: `task_seed`, `split`, and knobs."""
    make_rows: Callable[[Sequence[Any]], TaskRows]
    """The rows of the specs of one split."""
    num_episodes: Mapping[str, int]
    """Split -> how many episodes its data has."""

    def knobs(self) -> dict[str, object]:
        """The difficulty knobs with their defaults."""
        return {
            part.name: part.default
            for part in fields(self.spec_class)
            if part.name not in ("task_seed", "split")
        }

    def check_knobs(self, names: Iterable[str]) -> None:
        """Refuse what is no knob: split, seed and the number of episodes have options of their own.

        Raises:
            ConfigError: there is no such knob.
        """
        for name in names:
            if name not in self.knobs():
                raise ConfigError(
                    f"The task {self.name} has no knob {name!r}. {nearest(name, self.knobs())}"
                )


_SHIPPED = (
    Task("api_drift", EpisodeSpec, api_drift_rows, {"train": 64, "heldout": 24}),
    Task("call_format", FormatSpec, call_format_rows, {"train": 96, "heldout": 48}),
    Task("fix_call", FixCallSpec, fix_call_rows, {"train": 64, "heldout": 24}),
    Task("reasoning_gym", GymSpec, reasoning_gym_rows, {"train": 48, "heldout": 24}),
)
TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _SHIPPED})


def find_task(name: str) -> Task:
    """The shipped task of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in TASKS:
        raise ConfigError(f"There is no task {name!r}. {nearest(name, TASKS)}")
    return TASKS[name]


def task_rows(
    name: str, split: str, *, seed: int = 0, num_episodes: int | None = None, **knobs: object
) -> TaskRows:
    """Prompts, hint sites, pairs and episodes of one split.

    Args:
        name: of the task.
        split: `train`, `validation` or `heldout`.
        seed: which episodes; 0 or more.
        num_episodes: up to 1000; None: the task's own number.
        knobs: fields of the task's spec.

    Raises:
        ConfigError: no such task, split or knob.
        DataError: a number out of its range.
    """
    task = find_task(name)
    if split not in SPLITS:
        raise ConfigError(f"There is no split {split!r}. {nearest(split, SPLITS)}")
    task.check_knobs(knobs)
    like = "heldout" if split == "validation" else split
    count = task.num_episodes[like] if num_episodes is None else num_episodes
    if seed < 0:
        raise DataError(f"seed is {seed}; it must be 0 or more.")
    if not 1 <= count <= TASK_SEEDS_PER_SEED:
        raise DataError(
            f"num_episodes is {count}; it must be 1 to {TASK_SEEDS_PER_SEED}, since more would be "
            "those of the next seed. Use several seeds."
        )
    first = seed * TASK_SEEDS_PER_SEED
    what = f"An episode of {name}"
    common = {"split": split, **knobs}
    return task.make_rows(
        [read_spec({"task_seed": first + i, **common}, task.spec_class, what) for i in range(count)]
    )


def write_task(
    folder: Path,
    name: str,
    *,
    seed: int = 0,
    num_episodes: Mapping[str, int] | None = None,
    **knobs: object,
) -> Row:
    """Write a data folder for `data = "..."`, held-out split included; returns its manifest.

    Args:
        folder: made where it does not exist.
        name: of the task.
        seed: which episodes.
        num_episodes: split -> how many; None: the task's own numbers.
        knobs: fields of the task's spec.
    """
    counts: dict[str, object] = {}
    facts: Row = {}
    for split in WRITTEN_SPLITS:
        number = None if num_episodes is None else num_episodes[split]
        rows = task_rows(name, split, seed=seed, num_episodes=number, **knobs)
        counts[split] = write_split(folder if split == "train" else folder / split, rows)
        facts = facts or rows.facts
    manifest: Row = {
        "schema": DATA_SCHEMA,
        "task": name,
        "seed": seed,
        "counts": counts,
        **facts,
        "splits": {"train": ".", "heldout": "heldout"},
    }
    write_manifest(folder, manifest)
    return manifest
