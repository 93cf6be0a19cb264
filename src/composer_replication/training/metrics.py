"""Per-step measurements: channel totals over micro-batches and ranks, seconds, peak memory."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from composer_replication.training.peak_memory import peak_gib
from composer_replication.training.tensor_memory import TensorMemory, tensors_in_memory
from composer_replication.units import gib

_MEASURED_STEP = 2

MetricsRow = dict[str, float | int | str | None]


class MetricsSink(Protocol):
    """Where finished rows go, such as `RunDirectory.append_metrics`."""

    def __call__(self, row: Mapping[str, float | int | str | None]) -> None:
        """Take one optimizer step's row."""
        ...


def means_over_ranks(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The mean of each metric from every rank's sum and count; all ranks call it together.

    A rank may lack a metric, where its channel had no data. Means that are not finite are left out.
    """
    totals: dict[str, tuple[float, float]] = {}
    for ranks_sums in gather_object([sums]):
        for name, (total, count) in ranks_sums.items():
            old_total, old_count = totals.get(name, (0.0, 0.0))
            totals[name] = (old_total + total, old_count + count)
    means = {name: total / count for name, (total, count) in totals.items()}
    return {name: mean for name, mean in means.items() if math.isfinite(mean)}


class StepClock:
    """Seconds by phase, read after the device finished its work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.total_s: dict[str, float] = {}
        self._started_s: dict[str, float] = {}

    def start(self, phase: str) -> None:
        """Begin timing `phase`."""
        self._synchronize()
        self._started_s[phase] = time.perf_counter()

    def stop(self, phase: str) -> float:
        """Seconds since `start`, added to the phase's total."""
        self._synchronize()
        elapsed_s = time.perf_counter() - self._started_s.pop(phase)
        self.total_s[phase] = self.total_s.get(phase, 0.0) + elapsed_s
        return elapsed_s

    def _synchronize(self) -> None:
        # Without this a GPU's clock measures how long it took to queue the work.
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class StepMetricsCallback(TrainerCallback):
    """Writes one row for each optimizer step: what TRL logs, `step_s` and `peak_gib`."""

    def __init__(
        self,
        device: torch.device,
        sink: MetricsSink,
        on_row: Callable[[MetricsRow], None],
        *,
        earlier_rows: Sequence[MetricsRow] = (),
    ) -> None:
        """Keep where rows go.

        Args:
            device: whose memory and queue are read.
            sink: appends a row to the run directory.
            on_row: shows a row to the person watching.
            earlier_rows: of the steps before a resume, which the figures count too.
        """
        self.clock = StepClock(device)
        self.rows: list[MetricsRow] = list(earlier_rows)
        self._sink = sink
        self._on_row = on_row
        self._step_s: float | None = None

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Start the step's clock; generation happens inside the step."""
        del args, state, control, kwargs
        self.clock.start("step")

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Stop the step's clock."""
        del args, state, control, kwargs
        self._step_s = self.clock.stop("step")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Complete the row of the step that was just logged."""
        del args, control, kwargs
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        row: MetricsRow = {"step": state.global_step, **logs}
        row["step_s"] = self._step_s
        row["peak_gib"] = peak_gib(self.clock.device)
        self.rows.append(row)
        self._sink(row)
        self._on_row(row)


class TensorPeakCallback(TrainerCallback):
    """The tensor peak of a run: of its second step on a CPU, of all of it on CUDA.

    Every other step runs unwatched; the second is the first with the optimizer's state in memory.
    """

    def __init__(self, device: torch.device, *, is_on: bool = True) -> None:
        """Measure on `device`, or not at all."""
        self.peak_gib: float | None = None
        """None until something was measured."""
        self._device = device
        self._measured_step = _MEASURED_STEP if is_on else None
        self._memory: TensorMemory | None = None

    def on_step_begin(
        self, args: object, state: TrainerState, control: object, **kwargs: object
    ) -> None:
        """Start counting where the measured step starts."""
        del args, control, kwargs
        if self._device.type == "cpu" and state.global_step + 1 == self._measured_step:
            self._memory = TensorMemory(held=tensors_in_memory())
            self._memory.__enter__()

    def on_step_end(
        self, args: object, state: TrainerState, control: object, **kwargs: object
    ) -> None:
        """Stop counting where it ends."""
        del args, state, control, kwargs
        if self._memory is not None:
            self._memory.__exit__(None, None, None)
            self.peak_gib = gib(self._memory.peak_bytes)
            self._memory = None
        elif self._device.type == "cuda" and self._measured_step is not None:
            self.peak_gib = peak_gib(self._device)
