"""Figures of finished runs side by side: predicted and measured, or one run and another."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from composer_replication.errors import DataError, shown
from composer_replication.planner.calibration import Measured, measured_runs

REPORT_SCHEMA = 1


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Prediction(_Answer):
    """One figure of one run."""

    predicted: float
    """What `planned.json` said."""
    measured: float | None
    """What the run measured; null where it did not."""
    error: float | None
    """Predicted over measured, less 1; null where nothing was measured."""


class PlannedRun(_Answer):
    """A finished run beside its plan."""

    run: str
    """Name of its folder."""
    device: str
    """The actual device."""
    model: str
    """That was trained."""
    step_s: Prediction
    """Median seconds of a step."""
    planned_range_s: tuple[float, float]
    """The least and the most seconds of a step that the plan gave."""
    is_in_range: bool
    """Whether the median was within the plan's low and high."""
    tensor_gib: Prediction
    """Peak of tensors alone."""
    wall_s: Prediction
    """Seconds of the whole run."""


class PlannerReport(_Answer):
    """What `report planner --json` prints."""

    schema_version: Literal[1] = Field(default=REPORT_SCHEMA, alias="schema")
    """Version of this layout."""
    runs: list[PlannedRun]
    """Oldest first."""
    median_absolute_error: dict[str, float | None]
    """Of `step_s`, `tensor_gib` and `wall_s`; null where nothing was measured."""


class ComparedFigure(_Answer):
    """A figure of two runs."""

    name: str
    """Such as `median_step_s`."""
    a: float | None
    """Of the first run."""
    b: float | None
    """Of the second."""
    ratio: float | None
    """b over a; null where either is unknown or a is 0."""


class RunComparison(_Answer):
    """What `report compare --json` prints."""

    schema_version: Literal[1] = Field(default=REPORT_SCHEMA, alias="schema")
    """Version of this layout."""
    runs: dict[str, dict[str, str | None]]
    """`a` and `b`: folder, status, model and device."""
    figures: list[ComparedFigure]
    """First-step loss, seconds, memory and dollars."""


def planner_report(folders: Sequence[Path]) -> PlannerReport:
    """Predicted against measured of every planned and finished run in the folders.

    Args:
        folders: run directories, or folders of them.

    Raises:
        DataError: none of them holds such a run.
    """
    found = [measured for folder in folders for measured in measured_runs(folder)]
    runs = [run for run in found if run.verb != "evaluate"]
    if not runs:
        raise DataError(
            f"{', '.join(map(str, folders))} holds no run with planned.json and a finished "
            "summary.json. Give run directories of smoke or train, or the folder they are in."
        )
    rows = [_planned_run(run) for run in runs]
    return PlannerReport(
        runs=rows,
        median_absolute_error={
            "step_s": _median([row.step_s for row in rows]),
            "tensor_gib": _median([row.tensor_gib for row in rows]),
            "wall_s": _median([row.wall_s for row in rows]),
        },
    )


def compare_runs(a: Path, b: Path) -> RunComparison:
    """Two runs side by side, such as a local and a remote smoke of one configuration.

    Raises:
        DataError: a folder without a summary.
    """
    one, other = _ended(a), _ended(b)
    names = [*one.figures, *(name for name in other.figures if name not in one.figures)]
    return RunComparison(
        runs={"a": one.facts, "b": other.facts},
        figures=[_compared(name, one.figures.get(name), other.figures.get(name)) for name in names],
    )


def planner_report_schema() -> dict[str, JsonValue]:
    """The JSON schema of `report planner --json`."""
    return PlannerReport.model_json_schema(by_alias=True, mode="serialization")


def run_comparison_schema() -> dict[str, JsonValue]:
    """The JSON schema of `report compare --json`."""
    return RunComparison.model_json_schema(by_alias=True, mode="serialization")


@dataclass(frozen=True, slots=True)
class _Ended:
    facts: dict[str, str | None]
    figures: dict[str, float | None]


_FIGURES = ("steps", "median_step_s", "p95_step_s", "total_s")
_MEMORY_FIGURES = ("peak_gib", "peak_tensor_gib", "peak_gib_max_shape", "cost_usd")


def _ended(folder: Path) -> _Ended:
    try:
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder} holds no readable summary.json ({type(error).__name__}), so there is no run "
            "to compare. Give two run directories that ended."
        ) from None
    figures = {"first_step_loss": _first_loss(folder / "metrics.jsonl")}
    try:
        phases = cast("Mapping[str, float | None]", summary["phases_s"])
        figures |= {name: _number(name, summary[name]) for name in _FIGURES}
        figures |= {f"phases_s/{name}": _number(name, s) for name, s in phases.items()}
        figures |= {name: _number(name, summary[name]) for name in _MEMORY_FIGURES}
        facts = {name: _text(name, summary[name]) for name in ("status", "model", "device")}
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder / 'summary.json'} is no summary of a run ({type(error).__name__}: {error}). "
            "Give two run directories that ended."
        ) from None
    return _Ended({"run": str(folder), **facts}, figures)


def _number(name: str, value: object) -> float | None:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise TypeError(f"{name} is {shown(value)}, which is no number")


def _text(name: str, value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise TypeError(f"{name} is {shown(value)}, which is no text")


def _first_loss(path: Path) -> float | None:
    if not path.is_file():
        return None
    try:
        first = path.read_text("utf-8").partition("\n")[0]
        row = json.loads(first) if first.strip() else {}
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as lines of JSON ({type(error).__name__}), so the first step's "
            "loss is not known. Give two run directories that ended."
        ) from None
    loss = cast("Mapping[str, object]", row).get("loss") if isinstance(row, dict) else None
    return float(loss) if isinstance(loss, int | float) else None


def _planned_run(run: Measured) -> PlannedRun:
    low, _, high = run.predicted_step_s
    return PlannedRun(
        run=run.run,
        device=run.device,
        model=run.model,
        step_s=_prediction(run.predicted_step_s.expected, run.median_step_s),
        planned_range_s=(low, high),
        is_in_range=low <= run.median_step_s <= high,
        tensor_gib=_prediction(run.predicted_tensor_gib, run.peak_tensor_gib),
        wall_s=_prediction(run.predicted_wall_s, run.total_s),
    )


def _prediction(predicted: float, measured: float | None) -> Prediction:
    error = None if not measured else predicted / measured - 1
    return Prediction(predicted=predicted, measured=measured, error=error)


def _median(predictions: Sequence[Prediction]) -> float | None:
    errors = [abs(each.error) for each in predictions if each.error is not None]
    return statistics.median(errors) if errors else None


def _compared(name: str, a: float | None, b: float | None) -> ComparedFigure:
    ratio = b / a if a and b is not None else None
    return ComparedFigure(name=name, a=a, b=b, ratio=ratio)
