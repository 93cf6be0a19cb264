"""JSON lines with a step each, whole up to the last one whenever their writer is killed."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar, cast

from composer_replication.errors import RunDirectoryError
from composer_replication.runs.atomic_files import write_text_atomically
from composer_replication.runs.json_text import to_json_text

StepRow = dict[str, float | int | str | None]

Value = TypeVar("Value")

_MEASURED = frozenset({"step_time", "peak_gib", "cost_usd"})
"""Beside whatever is in seconds."""


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Add one line, synced; `row` holds its `step`."""
    assert "step" in row, f"a metrics row needs its step: {sorted(row)}"
    with path.open("a", encoding="utf-8") as file:
        file.write(to_json_text(row) + "\n")
        file.flush()
        # A checkpoint is synced, and resume expects the row of every step before it.
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[StepRow]:
    """The rows in order, none where there is no file; after `truncate_rows` all are whole."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def is_measured(name: str) -> bool:
    """Whether a figure of that name says how a run went and not what it computed.

    Example: `is_measured("rollout_s")` -> True.
    """
    return name.endswith("_s") or name in _MEASURED


def without_measurements(row: Mapping[str, Value]) -> dict[str, Value]:
    """What a run repeats exactly when it is run again or goes on after a stop."""
    return {name: value for name, value in row.items() if not is_measured(name)}


def truncate_rows(path: Path, last_step: int) -> None:
    """Drop the lines after `last_step` and a torn last line.

    Raises:
        RunDirectoryError: a line before the last one that is not JSON.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    steps = [_step_of(line, path, number, len(lines)) for number, line in enumerate(lines, 1)]
    kept = [
        f"{line}\n"
        for line, step in zip(lines, steps, strict=True)
        if step is not None and step <= last_step
    ]
    write_text_atomically(path, "".join(kept))


def _step_of(line: str, path: Path, number: int, num_lines: int) -> int | None:
    """The row's step; None for a last line that a killed writer left unfinished."""
    try:
        return cast("int", json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        if number == num_lines:
            return None
        raise RunDirectoryError(
            f"{path}, line {number}, is not a metrics row ({error!r}), so it is not known which "
            "steps the file holds. Remove that line, or start a new run with another --out."
        ) from None
