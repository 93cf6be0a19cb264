"""`FollowedRun`: the run directory as the other processes of a run see it: read, never written."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

from composer_replication.runs.run_directory import RunDirectory
from composer_replication.runs.summary import Summary


class FollowedRun(RunDirectory):
    """The folder that the main process has locked and writes; writes here do nothing.

    Example:
        >>> with FollowedRun(Path("runs/first")) as run:
        ...     run.append_metrics({"step": 1})  # the main process writes that row
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def close(self) -> None:
        """The lock is the main process's."""

    def __enter__(self) -> Self:
        return self

    def forget_ending(self) -> None:
        """Nothing; as are all below."""

    def write_config(self, text: str) -> None:
        """Nothing."""

    def write_json(self, name: str, payload: Mapping[str, object]) -> None:
        """Nothing."""

    def write_summary(self, summary: Summary) -> None:
        """Nothing."""

    def append_metrics(self, row: Mapping[str, object]) -> None:
        """Nothing."""

    def append_heldout(self, row: Mapping[str, object]) -> None:
        """Nothing."""

    def truncate_metrics(self, last_step: int) -> None:
        """Nothing."""

    def write_rollouts(self, step: int, rows: Iterable[Mapping[str, object]]) -> None:
        """Nothing."""
