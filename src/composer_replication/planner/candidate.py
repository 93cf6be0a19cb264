"""`Candidate`: one place to run, with the memory, the seconds and the dollars of the run there."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from composer_replication.config.execution_sections import MAX_MODAL_MEMORY_GIB, ModalConfig
from composer_replication.planner.calibration import calibrated
from composer_replication.planner.cost import SMOKE_TIMEOUT_S, estimate, timeout_s
from composer_replication.planner.hardware import Gpu
from composer_replication.planner.layer_memory import BF16
from composer_replication.planner.memory import predict
from composer_replication.planner.model_shape import model_shape
from composer_replication.planner.prices import PriceTable
from composer_replication.planner.resumed_calls import (
    Calls,
    Stretch,
    calls_to_end,
    stretch_of,
)
from composer_replication.planner.run_memory import (
    Predictor,
    RunMemory,
    run_memory,
    sharded_memory,
    weights_gib,
)
from composer_replication.planner.run_shape import RunShape
from composer_replication.planner.throughput import (
    Range,
    Speed,
    evaluation_range,
    gpu_speed,
    measuring_range,
    step_range,
    step_terms,
)
from composer_replication.planner.wall_clock import WallClock, Where, num_steps, wall_clock
from composer_replication.units import gib

_MODAL_MEMORY_GIB = 16.0
_MEMORY_PER_WEIGHTS = 1.5
"""RAM that a remote run asks for where its configuration does not say."""

_VLLM_OVERHEAD_GIB = 1.0
"""Beside the weights: activations of its largest batch and some keys and values; not measured."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run could go.

    Example: `Place("modal", "L4", GPUS["L4"], 1, 22.03)`.
    """

    where: Where
    name: str
    """The card's name, or `cpu`."""
    gpu: Gpu | None
    """Its rates; None for a CPU."""
    num_gpus: int
    capacity_gib: float
    speed: Speed | None = None
    """Of a CPU."""
    is_assumed: bool = False
    """A local card that was asked for and is not in this machine."""

    @property
    def label(self) -> str:
        """`L4` or `H100:2`."""
        return self.name if self.num_gpus <= 1 else f"{self.name}:{self.num_gpus}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A run in one place."""

    place: Place
    shape: RunShape
    memory: RunMemory
    whole_gib: float
    """Of each card where every one holds the whole step, as `train` does it."""
    is_sharded: bool
    """Several cards of which none holds the whole step: `memory` spreads it by formula (FSDP)."""
    terms_s: dict[str, Range]
    step_s: Range
    bare_step_s: float
    """Expected seconds of a step before calibration."""
    clock: WallClock
    """Of the whole run in one call, however long."""
    stretch: Stretch
    calls: Calls
    """That it needs within its time-out."""
    expected_usd: float
    worst_usd: float
    usd_per_hour: float
    timeout_s: float
    num_attempts: int
    """The first and its retries."""
    memory_request_gib: float
    """RAM that a container asks for."""
    is_calibrated: bool

    @property
    def fits(self) -> bool:
        """Whether the memory suffices."""
        return self.memory.peak_gib <= self.place.capacity_gib

    @property
    def obstacle(self) -> str | None:
        """Why a run cannot go there, its memory aside, in two words; None: it can."""
        if self.device_obstacle is None and self.fits and self.calls.num_calls is None:
            return "time-out"
        return self.device_obstacle

    @property
    def device_obstacle(self) -> str | None:
        """What is the same however long the run may take."""
        engine = self.shape.vllm
        if engine is not None and (self.place.gpu is None or self.place.where == "modal"):
            return "no vLLM"
        if engine is not None and 0 < engine.card_share * self.place.capacity_gib < self.vllm_gib:
            return "vLLM share"
        if _lacks_bf16(self.place, self.shape):
            return "no bf16"
        return "FSDP only" if self.is_sharded else None

    @property
    def vllm_gib(self) -> float:
        """The least that vLLM needs: the weights in half precision, and room to compute."""
        half_bytes = BF16 * model_shape(self.shape.case.model).num_parameters
        return gib(half_bytes) + _VLLM_OVERHEAD_GIB

    @property
    def is_launchable(self) -> bool:
        """Whether `train` and `smoke` can run it there: it fits, and nothing else forbids it."""
        return self.fits and self.obstacle is None

    @property
    def wall_s(self) -> float:
        """Expected seconds of all calls, from the command to the end of the whole run."""
        return self.calls.total_s

    @property
    def call_s(self) -> float:
        """The most that one call is expected to take: a time-out; a local run has none.

        Retries add nothing to it: they follow an attempt that died, and one that reached its
        time-out has ended.
        """
        return math.inf if self.place.where == "local" else self.timeout_s

    @property
    def call_usd(self) -> float:
        """Expected dollars of the first call, which may end before the run does."""
        return min(self.expected_usd, self.worst_usd / self.num_attempts)

    @property
    def holding_usd(self) -> float:
        """The cap under which every call can be made, the worst case of the last included."""
        return ((self.calls.num_calls or 1) - 1) * self.call_usd + self.worst_usd

    @property
    def ends_in_one_call(self) -> bool:
        """Whether the expected run is done before its first attempt is asked to end."""
        return self.calls.num_calls == 1


def make_candidate(
    place: Place,
    shape: RunShape,
    modal: ModalConfig,
    prices: PriceTable,
    *,
    predictor: Predictor = predict,
    factor: float | None = None,
    narrows: bool = True,
    measured_s: Mapping[str, float] | None = None,
) -> Candidate:
    """The run in that place.

    Args:
        place: where.
        shape: of the run on that kind of device.
        modal: what a remote run asks for.
        prices: of a remote run.
        predictor: of a step's memory; formulas do where the run is not taken for want of bf16.
        factor: measured seconds over predicted ones on this device; None: not known.
        narrows: the factor is of runs of this very model that passed; others shift the range alone.
        measured_s: seconds of phases that earlier runs of this model took there.
    """
    speed = place.speed if place.gpu is None else gpu_speed(place.gpu, shape)
    assert speed is not None, "a CPU place knows its speed"
    num_gpus = max(place.num_gpus, 1)
    whole, memory = _memory(place, shape, predict if _lacks_bf16(place, shape) else predictor)
    is_sharded = memory is not whole
    seconds = step_terms(shape, speed, num_gpus, is_sharded=is_sharded)
    bare = step_range(seconds)
    step_s = bare
    if factor is not None:
        seconds = {name: term.times(factor) for name, term in seconds.items()}
        step_s = calibrated(bare, factor) if narrows else bare.times(factor)
    weights = weights_gib(shape.case)
    clock = wall_clock(
        shape,
        step_s,
        weights,
        where=place.where,
        evaluations_s=evaluation_range(shape, speed).times(factor or 1.0),
        measuring_s=measuring_range(shape, seconds),
        measured_s=measured_s or {},
    )
    is_remote = place.where == "modal"
    limit_s = modal.timeout_s or _timeout(shape, clock)
    one_call_s = limit_s if is_remote else math.inf
    stretch = stretch_of(shape, clock, num_steps(shape, step_s))
    calls = calls_to_end(stretch, total_s=clock.total_s.expected, limit_s=one_call_s)
    memory_gib = modal.memory_gib or _memory_request_gib(weights * num_gpus)
    bill = partial(
        estimate,
        place.name,
        num_gpus,
        cpu_cores=modal.cpu_cores,
        memory_gib=memory_gib,
        region=modal.region,
        retries=modal.retries,
        prices=prices,
    )
    return Candidate(
        place=place,
        shape=shape,
        memory=memory,
        whole_gib=whole.peak_gib,
        is_sharded=is_sharded,
        terms_s=seconds,
        step_s=step_s,
        bare_step_s=bare.expected,
        clock=clock,
        stretch=stretch,
        calls=calls,
        expected_usd=bill(calls.total_s).usd if is_remote else 0.0,
        worst_usd=bill(limit_s).worst_usd if is_remote else 0.0,
        usd_per_hour=bill(0.0).usd_per_hour if is_remote else 0.0,
        timeout_s=limit_s,
        num_attempts=modal.retries + 1,
        memory_request_gib=memory_gib,
        is_calibrated=factor is not None and narrows,
    )


def _memory(place: Place, shape: RunShape, predictor: Predictor) -> tuple[RunMemory, RunMemory]:
    """Of each card that holds the whole step, and what is planned: sharded where that is too much.

    Both are one object where no sharding is needed, or none can be.
    """
    num_gpus = max(place.num_gpus, 1)
    whole = run_memory(shape, num_gpus, predictor, card_gib=place.capacity_gib)
    may_shard = num_gpus > 1 and shape.verb != "evaluate"
    if may_shard and whole.peak_gib > place.capacity_gib:
        return whole, sharded_memory(shape, num_gpus)
    return whole, whole


def _lacks_bf16(place: Place, shape: RunShape) -> bool:
    return place.gpu is not None and not place.gpu.has_bf16 and shape.uses_bf16


def _memory_request_gib(weights_gib: float) -> float:
    """RAM for the weights that each card's process reads, where the file names none."""
    wanted_gib = max(_MODAL_MEMORY_GIB, _MEMORY_PER_WEIGHTS * weights_gib)
    return min(wanted_gib, MAX_MODAL_MEMORY_GIB)


def _timeout(shape: RunShape, clock: WallClock) -> float:
    """Twice the high estimate; a smoke has half an hour, as the founding note gives it."""
    return SMOKE_TIMEOUT_S if shape.verb == "smoke" else timeout_s(clock.total_s.high)
