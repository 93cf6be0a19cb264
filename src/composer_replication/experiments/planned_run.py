"""`planned.json`: what the planner says of the run that is about to start, and what it missed."""

from datetime import UTC, datetime

import psutil
import torch

from composer_replication.config.run_config import RunConfig
from composer_replication.errors import ConfigError, InputError
from composer_replication.experiments.trainer_setup import RunParts, device, device_label
from composer_replication.planner.candidate import Candidate, Place
from composer_replication.planner.evaluation_shape import EvaluationSize
from composer_replication.planner.local_machine import LocalCard, LocalMachine, this_machine
from composer_replication.planner.memory import predict
from composer_replication.planner.places import cpu_place
from composer_replication.planner.plan import Planner, PlanRequest
from composer_replication.planner.plan_json import candidate_answer
from composer_replication.planner.prices import shipped_prices
from composer_replication.planner.run_memory import STATED_ERROR
from composer_replication.planner.run_shape import RunVerb
from composer_replication.runs.run_directory import RunDirectory
from composer_replication.runs.summary import Summary
from composer_replication.units import gib

PLANNED_FILE = "planned.json"


def plan_run(
    config: RunConfig, run: RunDirectory, verb: RunVerb, parts: RunParts
) -> Candidate | None:
    """Write `planned.json` and judge it, before the model loads.

    Args:
        config: of the run.
        run: gets the file.
        verb: that runs it.
        parts: get a note where the longest rows may not fit.

    Returns:
        See `write_planned`.

    Raises:
        ConfigError: what stays from step to step is already more than this device has. A CPU would
            not say so: the system kills what takes all memory.
    """
    planned = write_planned(config, run, verb, parts.model_spec)
    if planned is None:
        return None
    if not has_room(planned):
        asked = PlanRequest(config.model_copy(update={"model": parts.model_spec}), verb=verb)
        change = _planner(asked, this_machine()).fitting_change(planned)
        raise no_room_error(planned, parts.model_spec, change)
    memory, place = planned.memory, planned.place
    free_gib = _free_gib(place.capacity_gib)
    if memory.peak_gib > free_gib:
        parts.notes.append(
            f"The longest rows may not fit: by the plan they take {memory.peak_gib:.1f} GiB in the "
            f"{memory.phase_words}, and {free_gib:.1f} of the {place.name}'s "
            f"{place.capacity_gib:.1f} are free."
        )
    return planned


def has_room(planned: Candidate) -> bool:
    """Whether a run's device holds what stays from step to step, however short its rows are."""
    return planned.memory.kept_gib <= planned.place.capacity_gib


def no_room_error(planned: Candidate, model: str, change: str | None = None) -> ConfigError:
    """What a run that has no room is told.

    Args:
        planned: it, on this device.
        model: that it loads.
        change: a sentence with the settings under which it would fit.
    """
    kept = "weights" if planned.shape.verb == "evaluate" else "weights, teacher and optimizer"
    return ConfigError(
        f"{model} has no room here: {kept} alone take {planned.memory.kept_gib:.1f} GiB, and the "
        f"{planned.place.name} has {planned.place.capacity_gib:.1f}. "
        + (f"The {change} " if change else "")
        + "`composer-replication plan` says where it fits as it is."
    )


def write_planned(
    config: RunConfig, run: RunDirectory, verb: RunVerb, model_spec: str
) -> Candidate | None:
    """Plan the run for the device it is on and write `planned.json`, before its first step.

    Args:
        config: of the run.
        run: gets the file.
        verb: that runs it.
        model_spec: that it trains.

    Returns:
        The prediction; None where the formulas do not know the model or the card: the run itself
        may well work.
    """
    try:
        candidate = planned_here(config.model_copy(update={"model": model_spec}), verb)
    except InputError:
        return None
    if candidate is not None:
        write_plan(candidate, run, verb, model_spec)
    return candidate


def write_plan(candidate: Candidate, run: RunDirectory, verb: RunVerb, model: str) -> None:
    """Write `planned.json`.

    Args:
        candidate: the prediction for this device.
        run: gets the file.
        verb: that runs it.
        model: by which later plans know runs of it.
    """
    run.write_json(
        PLANNED_FILE,
        {
            "verb": verb,
            "device": device_label(),
            "model": model,
            "planned_on": datetime.now(UTC).date().isoformat(),
            **candidate_answer(candidate).model_dump(),
            "peak_tensor_gib": candidate.memory.peak_tensor_gib,
            "bare_step_s": candidate.bare_step_s,
            "timeout_s": candidate.timeout_s,
        },
    )


def plan_misses(planned: Candidate | None, summary: Summary) -> list[str]:
    """A sentence for each figure of a run that is outside what the plan promised."""
    if planned is None:
        return []
    found: list[str] = []
    low, _, high = planned.step_s
    median = summary.median_step_s
    if median is not None and not low <= median <= high:
        found.append(
            f"The plan missed: it said {low:.2g} to {high:.2g} s a step and the median was "
            f"{median:.2g} s. The next plan on this device is calibrated with it."
        )
    peak, said = summary.peak_tensor_gib, planned.memory.peak_tensor_gib
    if peak is not None and peak > (1 + STATED_ERROR) * said:
        found.append(
            f"The plan missed: it said {said:.2f} GiB of tensors at most and {peak:.2f} were "
            f"there, over its stated {STATED_ERROR:.0%}. Rows were longer than planned for, or "
            "something is kept that the formulas do not know."
        )
    return found


def planned_here(
    config: RunConfig, verb: RunVerb, *, evaluation: EvaluationSize | None = None
) -> Candidate | None:
    """The prediction for the device that this process computes on; None: an unknown card.

    Raises:
        InputError: a model or data that the formulas do not know.
    """
    machine = this_machine()
    place = _this_place(machine)
    if place is None:
        return None
    request = PlanRequest(config, verb=verb, evaluation=evaluation)
    return _planner(request, machine).candidate(place, config, predict)


def _planner(request: PlanRequest, machine: LocalMachine) -> Planner:
    return Planner(request, machine, prices=shipped_prices())


def _free_gib(room_gib: float) -> float:
    """Of a CPU's memory what no other process holds; a card is this run's alone."""
    if device().type != "cpu":
        return room_gib
    return min(room_gib, gib(psutil.virtual_memory().available))


def _this_place(machine: LocalMachine) -> Place | None:
    if device().type == "cpu":
        return cpu_place(machine)
    _, total = torch.cuda.mem_get_info(device())
    card = LocalCard(torch.cuda.get_device_name(), gib(total))
    gpu = card.gpu
    return None if gpu is None else Place("local", gpu.name, gpu, 1, card.capacity_gib)
