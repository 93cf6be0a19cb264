"""`RunDirectory`: the one folder that a verb writes, locked while in use."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock

from composer_replication.errors import RunDirectoryError
from composer_replication.runs.atomic_files import (
    drop_torn_writes,
    is_temporary,
    write_text_atomically,
)
from composer_replication.runs.json_text import to_json_text
from composer_replication.runs.rollout_files import write_rollouts
from composer_replication.runs.run_lock import LOCK_FILE, OWNER_FILE, take_lock
from composer_replication.runs.step_rows import StepRow, append_row, read_rows, truncate_rows
from composer_replication.runs.summary import Summary

RUN_SCHEMA = 1
"""Version of the folder's layout and of its JSON files."""

SCHEMA_FILE = "schema.json"
"""Marks a folder as a run directory and says its layout's version."""

SUMMARY_FILE = "summary.json"

FIGURES_PREFIX = "figures_"
"""Begins the names of what an evaluation has finished of its parts."""

_ROLLOUTS, _CREDIT = "rollouts", "credit"
_NO_RESULTS = {SCHEMA_FILE, LOCK_FILE, OWNER_FILE, "config.toml", "error.txt", "planned.json"}


class RunDirectory:
    """An open run directory; a context manager that releases its lock.

    Example:
        >>> with RunDirectory.create(Path("runs/first"), resume=False) as run:
        ...     run.write_config(dump_config(config))
        ...     run.append_metrics({"step": 1, "loss": 0.7})
    """

    def __init__(self, path: Path, lock: FileLock) -> None:
        self.path = path
        """The folder itself."""
        self._lock = lock

    @classmethod
    def create(cls, path: Path, *, resume: bool) -> Self:
        """Open `path` as a new run, or with `resume` the run that was started there.

        With `resume` a folder without a run starts one: a job that is always told to resume may
        have been killed before it wrote anything. Without it a run that ended before its first
        result gives its folder to the next one: a refused configuration is corrected and run again.

        Raises:
            RunDirectoryError: the folder is in use, is not a run directory, holds results of a run
                that was not asked to resume, or has another schema version.
        """
        _refuse_foreign_folder(path)
        path.mkdir(parents=True, exist_ok=True)
        lock = take_lock(path)
        try:
            _check_schema(path, resume=resume)
            if not (path / SCHEMA_FILE).exists():
                write_text_atomically(path / SCHEMA_FILE, _with_schema({}))
            for folder in (path, path / _ROLLOUTS, path / _CREDIT):
                if folder.is_dir():
                    drop_torn_writes(folder)
        except BaseException:
            lock.release()
            raise
        return cls(path, lock)

    def close(self) -> None:
        """Release the lock; the files stay."""
        (self.path / OWNER_FILE).unlink(missing_ok=True)
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def config_path(self) -> Path:
        """The resolved configuration, `config.toml`."""
        return self.path / "config.toml"

    @property
    def metrics_path(self) -> Path:
        """One JSON object a step, `metrics.jsonl`."""
        return self.path / "metrics.jsonl"

    @property
    def heldout_path(self) -> Path:
        """One JSON object an evaluation, `heldout.jsonl`."""
        return self.path / "heldout.jsonl"

    @property
    def summary_path(self) -> Path:
        """How the run ended, `summary.json`."""
        return self.path / SUMMARY_FILE

    @property
    def error_path(self) -> Path:
        """The traceback of a run that failed, `error.txt`."""
        return self.path / "error.txt"

    @property
    def model_dir(self) -> Path:
        """The trained model, loadable by transformers; the writer creates the folder."""
        return self.path / "model"

    @property
    def checkpoints_dir(self) -> Path:
        """What resume needs; the writer creates the folder."""
        return self.path / "checkpoints"

    @property
    def rollouts_dir(self) -> Path:
        """One file of rollouts a step."""
        return self.path / _ROLLOUTS

    @property
    def credit_dir(self) -> Path:
        """Per-token credit, one file for each step that asked for it."""
        return self.path / _CREDIT

    def forget_ending(self) -> None:
        """Remove how an earlier attempt ended: it would be read as this one's if it is killed."""
        for stale in (self.summary_path, self.error_path):
            stale.unlink(missing_ok=True)

    def write_config(self, text: str) -> None:
        """Replace `config.toml`."""
        write_text_atomically(self.config_path, text)

    def write_json(self, name: str, payload: Mapping[str, object]) -> None:
        """Replace the JSON file `name` by `payload` with `schema` in front."""
        write_text_atomically(self.path / name, _with_schema(payload))

    def write_summary(self, summary: Summary) -> None:
        """Replace `summary.json`."""
        write_text_atomically(self.summary_path, summary.to_json() + "\n")

    def append_metrics(self, row: Mapping[str, object]) -> None:
        """Add one line to `metrics.jsonl`; `row` holds its `step`."""
        append_row(self.metrics_path, row)

    def append_heldout(self, row: Mapping[str, object]) -> None:
        """Add one line to `heldout.jsonl`; `row` holds the `step` it was measured after."""
        append_row(self.heldout_path, row)

    def read_metrics(self) -> list[StepRow]:
        """The rows of `metrics.jsonl`, in order; after `truncate_metrics` all of them are whole."""
        return read_rows(self.metrics_path)

    def read_heldout(self) -> list[StepRow]:
        """The rows of `heldout.jsonl`, in order."""
        return read_rows(self.heldout_path)

    def truncate_metrics(self, last_step: int) -> None:
        """Drop lines after `last_step` and a torn last line of both files, so resume can go on.

        Raises:
            RunDirectoryError: a line before the last one that is not JSON.
        """
        truncate_rows(self.metrics_path, last_step)
        truncate_rows(self.heldout_path, last_step)

    def write_rollouts(self, step: int, rows: Iterable[Mapping[str, object]]) -> None:
        """Replace the file of `step` by one JSON line for each rollout."""
        write_rollouts(self.rollouts_dir, step, rows)


def _with_schema(payload: Mapping[str, object]) -> str:
    return to_json_text({"schema": RUN_SCHEMA, **payload}, indent=2) + "\n"


def _refuse_foreign_folder(path: Path) -> None:
    """A folder of something else gets no file of ours, not even a lock."""
    if path.exists() and not path.is_dir():
        raise RunDirectoryError(f"{path} is a file; a run needs a folder. Choose another --out.")
    if not path.exists() or (path / SCHEMA_FILE).exists():
        return
    ours = {LOCK_FILE, OWNER_FILE}
    foreign = sorted(
        entry.name
        for entry in path.iterdir()
        if entry.name not in ours and not is_temporary(entry.name)
    )
    if foreign:
        raise RunDirectoryError(
            f"{path} is not empty and is not a run directory (it holds {foreign[0]!r}), so a run "
            "could overwrite what is there. Choose another --out."
        )


def _has_results(path: Path) -> bool:
    """Whether a run left more than its configuration and the words in which it ended."""
    for entry in path.iterdir():
        if entry.name == SUMMARY_FILE:
            if _status(entry) not in ("failed", "stopped"):
                return True
        elif entry.name not in _NO_RESULTS and not is_temporary(entry.name):
            return True
    return False


def has_passed(folder: Path) -> bool:
    """Whether the run there has ended and passed; a summary that is torn or absent says no."""
    try:
        return _status(folder / SUMMARY_FILE) == "passed"
    except FileNotFoundError:
        return False


def _status(summary_path: Path) -> object:
    """None where the file cannot be read, and so may hold anything."""
    try:
        return json.loads(summary_path.read_text(encoding="utf-8"))["status"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return None


def _check_schema(path: Path, *, resume: bool) -> None:
    schema_path = path / SCHEMA_FILE
    if not schema_path.exists():
        return
    if not resume and _has_results(path):
        raise RunDirectoryError(
            f"{path} already holds a run. A second one would mix with its files. "
            "Choose another --out, or continue that run with --resume."
        )
    try:
        schema = json.loads(schema_path.read_text(encoding="utf-8"))["schema"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise RunDirectoryError(
            f"{schema_path} does not say a schema version, so the folder cannot be trusted. "
            "Choose another --out."
        ) from None
    if schema != RUN_SCHEMA:
        raise RunDirectoryError(
            f"{path} was written with schema {schema} and this version reads {RUN_SCHEMA}. "
            "Resume it with the version that started it, or choose another --out."
        )
