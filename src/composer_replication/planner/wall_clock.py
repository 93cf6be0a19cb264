"""From seconds of a step to seconds of a run: start, download, load, steps, evaluations, save."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from composer_replication.planner.layer_memory import BF16
from composer_replication.planner.memory import checkpoint_bytes, trained_bytes
from composer_replication.planner.model_shape import model_shape
from composer_replication.planner.run_shape import RunShape
from composer_replication.planner.throughput import Range

Where = Literal["local", "modal"]

_START = {
    # A container starts in a second; for the rest its image is pulled.
    "modal": Range(15.0, 45.0, 90.0),
    "local": Range(1.0, 2.0, 5.0),
}
_IMPORTS = {"modal": Range(8.0, 20.0, 40.0), "local": Range(4.0, 8.0, 30.0)}
"""torch and transformers from a disk that has not read them, and the device's first use."""

_DOWNLOAD_BYTES_PER_S = (200e6, 60e6, 20e6)
"""From the hub into a container; the founding note has 15 to 45 s for 1 GB."""

_READ_BYTES_PER_S = (1.5e9, 400e6, 60e6)
"""Of a disk, which is taken to write as fast as it reads."""
_WRITE_FILES = Range(0.2, 1.0, 5.0)
_GIB = 2**30
_MEASURED_SPREAD = (0.7, 1.0, 1.5)
"""Around what earlier runs took: a cache may be warm, or a disk busy."""

_SMOKE_MIN_STEPS = 8
_SMOKE_CHECK_STEPS = 8
"""A smoke's checks, extra steps and resumed run take about as long as so many steps."""


@dataclass(frozen=True, slots=True)
class WallClock:
    """Seconds of each phase of a run, by the names that a summary gives them."""

    phases_s: dict[str, Range]

    @property
    def total_s(self) -> Range:
        """All of it."""
        total = Range(0.0, 0.0, 0.0)
        for phase in self.phases_s.values():
            total = total.plus(phase)
        return total

    @property
    def setup_s(self) -> float:
        """Expected seconds before the first step."""
        return sum(self.phases_s[name].expected for name in ("cold_start", "download", "load"))


def wall_clock(
    shape: RunShape,
    step_s: Range,
    weights_gib: float,
    *,
    where: Where,
    evaluations_s: Range,
    measuring_s: Range,
    measured_s: Mapping[str, float],
) -> WallClock:
    """The phases of a run.

    Args:
        shape: of the run.
        step_s: of one step.
        weights_gib: read at the start.
        where: on this machine, which has the weights already, or in a container that has to start
            and, in the first run, to download them in half precision.
        evaluations_s: of all held-out evaluations of the run.
        measuring_s: of all that `[diagnostics]` asks for.
        measured_s: of phases that runs of this model on this device took; they replace guesses.
    """
    num_bytes = weights_gib * _GIB
    steps = step_s.times(num_steps(shape, step_s))
    if shape.verb == "smoke":
        steps = steps.plus(step_s.times(_SMOKE_CHECK_STEPS))
    half_bytes = BF16 * model_shape(shape.case.model).num_parameters
    download = _over(half_bytes, _DOWNLOAD_BYTES_PER_S)
    load = _over(num_bytes, _READ_BYTES_PER_S)
    save = _over(trained_bytes(shape.case), _READ_BYTES_PER_S).plus(_WRITE_FILES)
    if shape.verb == "evaluate":
        # Its steps are the models, one loaded after the other; of it only text is written.
        download, load = download.times(shape.num_steps), load.times(shape.num_steps)
        save = Range(0.0, 0.1, 1.0)
    phases = {
        "cold_start": _START[where],
        "download": download if where == "modal" else Range(0.0, 0.0, 0.0),
        "load": load.plus(_IMPORTS[where]),
        "step": steps,
        "save": save,
    }
    if shape.num_checkpoints:
        one = _over(checkpoint_bytes(shape.case), _READ_BYTES_PER_S).plus(_WRITE_FILES)
        phases["checkpoint"] = one.times(shape.num_checkpoints)
    if evaluations_s.high > 0:
        phases["evaluate"] = evaluations_s
    if measuring_s.high > 0:
        phases["diagnostics"] = measuring_s
    for name in ("cold_start", "download", "load", "save"):
        if name in measured_s:
            phases[name] = Range(*(share * measured_s[name] for share in _MEASURED_SPREAD))
    return WallClock(phases)


def num_steps(shape: RunShape, step_s: Range) -> int:
    """Steps of the run; where a smoke may end early, as many as are expected to fit its time."""
    if shape.steps_budget_s is None:
        return shape.num_steps
    fitting = int(shape.steps_budget_s / step_s.expected)
    return max(_SMOKE_MIN_STEPS, min(shape.num_steps, fitting))


def _over(num_bytes: float, rates: tuple[float, float, float]) -> Range:
    return Range(*(num_bytes / rate for rate in rates))
