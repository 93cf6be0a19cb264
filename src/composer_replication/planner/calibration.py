"""Earlier runs on the same device narrow the range of a step's seconds."""

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from composer_replication.planner.hardware import gpu_of_driver
from composer_replication.planner.throughput import Range

_SPREAD = 0.15
"""Around a calibrated expectation: what the next fifty steps' median stays within."""

_KEPT_RUNS = 5


@dataclass(frozen=True, slots=True)
class Measured:
    """A finished run beside what was predicted for it.

    Example: `measured_runs(Path("runs"))[0].step_ratio` -> 1.2, a fifth slower than predicted.
    """

    run: str
    verb: str
    device: str
    model: str
    predicted_step_s: Range
    median_step_s: float
    predicted_tensor_gib: float
    peak_tensor_gib: float | None
    predicted_wall_s: float
    total_s: float | None
    bare_step_s: float
    """Expected without calibration."""
    phases_s: dict[str, float]
    """Seconds of each phase that was timed."""
    status: str = "passed"
    """That it ended with."""
    where: str = "local"
    """This machine, or a container on Modal."""
    is_probe: bool = False
    """Ten steps of the very run that is planned, made for its plan."""

    @property
    def step_ratio(self) -> float:
        """Measured over predicted without calibration."""
        return self.median_step_s / self.bare_step_s


def measured_runs(folder: Path) -> list[Measured]:
    """Every run in a folder that was planned and ended, oldest first; others are passed over."""
    found = [run for path in _run_folders(folder) if (run := _read(path)) is not None]
    return [run for _, run in sorted(found, key=lambda pair: pair[0])]


def device_key(label: str) -> str:
    """What a summary's `device` is called in a plan: a card's name, or `cpu`.

    Example: `device_key("NVIDIA L4")` -> `"L4"`.
    """
    if label.endswith("CPU"):
        return "cpu"
    gpu = gpu_of_driver(label, 80.0 if "80GB" in label else 40.0)
    return label if gpu is None else gpu.name


def factor_from(runs: list[Measured], *, device: str, model: str) -> float | None:
    """How many times longer than predicted steps take on a device; None: nothing is known.

    A probe counts alone, for it is of this very run; then runs of the same model before those of
    others.
    """
    here = [run for run in runs if device_key(run.device) == device]
    probes = [run for run in here if run.is_probe]
    same = [run for run in here if run.model == model and run.status == "passed"]
    ratios = [run.step_ratio for run in (probes or same or here)[-_KEPT_RUNS:]]
    return statistics.median(ratios) if ratios else None


def is_same_run(runs: list[Measured], *, device: str, model: str) -> bool:
    """Whether a passed run of that model, or a probe, is among those that calibrate a device."""
    here = [run for run in runs if device_key(run.device) == device]
    return any(run.is_probe or (run.model == model and run.status == "passed") for run in here)


def phases_from(
    runs: list[Measured], *, device: str, model: str, where: str = "local"
) -> dict[str, float]:
    """Median seconds of each phase of runs of that model on that device, here or on Modal."""
    same = [
        run
        for run in runs
        if device_key(run.device) == device and run.model == model and run.where == where
    ]
    recent = [run.phases_s for run in same[-_KEPT_RUNS:]]
    names = {name for phases in recent for name in phases}
    return {
        name: statistics.median(phases[name] for phases in recent if name in phases)
        for name in sorted(names)
    }


def calibrated(step_s: Range, factor: float) -> Range:
    """The range around what was measured."""
    expected = step_s.expected * factor
    return Range((1 - _SPREAD) * expected, expected, (1 + _SPREAD) * expected)


def _run_folders(folder: Path) -> Iterator[Path]:
    if (folder / "planned.json").is_file():
        yield folder
    elif folder.is_dir():
        yield from (path.parent for path in sorted(folder.glob("*/planned.json")))


def _read(path: Path) -> tuple[float, Measured] | None:
    try:
        planned = json.loads((path / "planned.json").read_text("utf-8"))
        summary = json.loads((path / "summary.json").read_text("utf-8"))
        written_s = (path / "summary.json").stat().st_mtime
        median_s = summary["median_step_s"]
        if summary["status"] == "stopped" or not median_s:
            return None
        measured = Measured(
            run=path.name,
            verb=planned["verb"],
            device=planned["device"],
            model=planned["model"],
            predicted_step_s=Range(*cast("list[float]", planned["step_s"])),
            median_step_s=median_s,
            predicted_tensor_gib=planned["peak_tensor_gib"],
            peak_tensor_gib=summary["peak_tensor_gib"],
            predicted_wall_s=planned["wall_s"],
            total_s=summary["total_s"],
            bare_step_s=planned["bare_step_s"],
            phases_s={name: s for name, s in summary["phases_s"].items() if s is not None},
            status=summary["status"],
            where="modal" if summary.get("cost_usd") is not None else "local",
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # A run that is going on, was killed, or comes from a version without plans; a damaged file.
        return None
    return (written_s, measured) if _is_whole(measured) else None


def _is_whole(run: Measured) -> bool:
    """Whether its figures are what a run writes: files may be damaged, or edited by hand."""
    steps_s: list[object] = [*run.predicted_step_s, run.median_step_s, run.bare_step_s]
    others: list[object] = [run.predicted_tensor_gib, run.predicted_wall_s, *run.phases_s.values()]
    others += [figure for figure in (run.peak_tensor_gib, run.total_s) if figure is not None]
    texts: list[object] = [run.verb, run.device, run.model, run.status]
    return (
        all(_is_figure(value) and cast(float, value) > 0 for value in steps_s)
        and all(_is_figure(value) for value in others)
        and all(isinstance(value, str) for value in texts)
    )


def _is_figure(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value >= 0
