"""`make_plan`: every place a run could go, the one to take, and what a cheaper one would need."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Literal

from composer_replication.config.grpo_keys import group_problem
from composer_replication.config.run_config import RunConfig
from composer_replication.config.smoke_defaults import with_smoke_defaults
from composer_replication.errors import ConfigError
from composer_replication.planner.calibration import (
    Measured,
    factor_from,
    is_same_run,
    phases_from,
)
from composer_replication.planner.candidate import Candidate, Place, make_candidate
from composer_replication.planner.cost import SMOKE_BUDGET_USD, check_budget
from composer_replication.planner.data_shape import DataShape, data_shape
from composer_replication.planner.decision import EXIT_OVER_CAP, Decision, decide, next_cheaper
from composer_replication.planner.evaluation_shape import evaluated_kind, evaluation_shape
from composer_replication.planner.local_machine import LocalMachine
from composer_replication.planner.memory import predict
from composer_replication.planner.model_files import (
    EMBEDDED_SPEC,
    REFERENCE_SPEC,
    Settings,
    model_settings,
)
from composer_replication.planner.places import more_cards, places
from composer_replication.planner.plan_request import PlanRequest
from composer_replication.planner.plan_warnings import plan_warnings
from composer_replication.planner.prices import PriceTable
from composer_replication.planner.remedies import smallest_change
from composer_replication.planner.run_memory import Predictor
from composer_replication.planner.run_shape import RunShape, run_shape


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer.

    Example: `make_plan(request, machine, prices=prices, today=today).chosen`.
    """

    candidates: list[Candidate]
    decision: Decision
    cheaper_fit: str | None
    prices_as_of: str
    budget_usd: float | None
    warnings: list[str] = field(default_factory=list[str])

    @property
    def chosen(self) -> Candidate | None:
        """Where to run; None: nowhere."""
        return self.decision.chosen

    @property
    def exit_code(self) -> int:
        """0, 1 where nothing fits, 2 over the cap."""
        return self.decision.exit_code


class Planner:
    """A request with the model's sizes and the data's lengths read once."""

    def __init__(
        self,
        request: PlanRequest,
        machine: LocalMachine,
        *,
        prices: PriceTable,
        predictor: Predictor = predict,
        runs: Sequence[Measured] = (),
    ) -> None:
        """Keep what candidates are made of.

        Args:
            request: what is to be planned.
            machine: this one.
            prices: of Modal.
            predictor: of a step's memory: formulas, or a simulation.
            runs: that were measured, to calibrate with.
        """
        self.request = request
        self.machine = machine
        self.prices = prices
        self._predictor = predictor
        # Steps that train say nothing of episodes that are played, nor these of them.
        is_evaluation = request.evaluation is not None
        self._runs = [run for run in runs if (run.verb == "evaluate") == is_evaluation]
        self.cut_groups: dict[str, str] = {}
        """Why a number of cards is no candidate: a step on them would cut a group of rollouts."""
        self._settings: dict[str, Settings] = {}
        self._data: DataShape | None = None

    def candidates(self) -> list[Candidate]:
        """One for each place; where no single card suffices, the fewest that would if sharded.

        Raises:
            ConfigError: bf16 that was asked for, on the one card that was, which has none.
        """
        config = self.request.config
        asked = self.request.gpu
        if asked is not None and not asked.gpu.has_bf16 and config.grpo.get("bf16") is True:
            raise ConfigError(
                f"grpo.bf16 is true and {asked.gpu.name} has no bf16. Take an L4 or a newer card, "
                "or set grpo.bf16 = false."
            )
        found: list[Candidate] = []
        for place in places(self.machine, self.request.on, self.request.gpu):
            problem = self._cut_groups(place, config)
            if problem is None:
                found.append(self.candidate(place, config, self._predictor))
            else:
                self.cut_groups[place.label] = problem
        if not found:
            raise ConfigError(next(iter(self.cut_groups.values())))
        is_one_card = self.request.gpu is not None or self.request.evaluation is not None
        if is_one_card or any(c.fits and c.device_obstacle is None for c in found):
            return found
        for place in [candidate.place for candidate in found if candidate.obstacle is None]:
            several = (
                self.candidate(more, config, self._predictor)
                for more in more_cards(place)
                if self._cut_groups(more, config) is None
            )
            enough = next((candidate for candidate in several if candidate.fits), None)
            if enough is not None:
                found.append(enough)
        return found

    def candidate(self, place: Place, config: RunConfig, predictor: Predictor) -> Candidate:
        """A configuration in a place."""
        model, shape = self.model_spec(place, config), self.shape(place, config)
        measured_s: dict[str, float] = {}
        if self.request.evaluation is not None:
            # No phases: the load of an evaluation is that of as many models as it had.
            model = evaluated_kind(shape.case.model)
        else:
            measured_s = phases_from(self._runs, device=place.name, model=model, where=place.where)
        return make_candidate(
            place,
            shape,
            config.modal,
            self.prices,
            predictor=predictor,
            factor=factor_from(self._runs, device=place.name, model=model),
            narrows=is_same_run(self._runs, device=place.name, model=model),
            measured_s=measured_s,
        )

    def shape(self, place: Place, config: RunConfig) -> RunShape:
        """The run as numbers on that kind of device."""
        device_type, config = self._filled(place, config)
        spec = self.model_spec(place, config)
        if spec not in self._settings:
            self._settings[spec] = model_settings(spec)
        if self.request.evaluation is not None:
            return evaluation_shape(
                self.request.evaluation, self._settings[spec], device_type=device_type
            )
        if self._data is None:
            self._data = data_shape(config.data)
        # CUDA says that every card computes bf16, the T4, which emulates it, included.
        computes_bf16 = place.gpu is not None or self.machine.computes_bf16
        # Flash attention and bf16 came with the same generation.
        has_flash = place.gpu is None or place.gpu.has_bf16
        return run_shape(
            config,
            self._settings[spec],
            self._data,
            device_type=device_type,
            computes_bf16=computes_bf16,
            has_flash=has_flash,
            num_processes=max(place.num_gpus, 1),
            verb=self.request.verb,
        )

    def _filled(self, place: Place, config: RunConfig) -> tuple[Literal["cpu", "cuda"], RunConfig]:
        """The kind of device, and the configuration with the smoke's defaults for it."""
        device_type: Literal["cpu", "cuda"] = "cpu" if place.gpu is None else "cuda"
        if self.request.fills_smoke_defaults:
            config = with_smoke_defaults(config, device_type)
        return device_type, config

    def _cut_groups(self, place: Place, config: RunConfig) -> str | None:
        """Why a step on so many cards would cut a group of rollouts; None: it does not."""
        _, config = self._filled(place, config)
        if config.smoke.fixed_shapes is not None or self.request.evaluation is not None:
            return None
        return group_problem(config.grpo, max(place.num_gpus, 1))

    def model_spec(self, place: Place, config: RunConfig) -> str:
        """The run's model; without one, what a run takes on that device."""
        return config.model or (EMBEDDED_SPEC if place.gpu is None else REFERENCE_SPEC)

    def fitting_change(self, candidate: Candidate) -> str | None:
        """The smallest change after which a candidate fits, in words; None: none of the known."""
        if self.request.evaluation is not None:
            return None

        def fits(config: RunConfig) -> bool:
            return self.candidate(candidate.place, config, predict).is_launchable

        change = smallest_change(self.request.config, fits)
        if change is None:
            return None
        after = self.candidate(candidate.place, change.config, predict)
        return (
            f"{candidate.place.label} would fit with {change.setting} "
            f"({after.memory.peak_gib:.1f} of {candidate.place.capacity_gib:.1f} GiB)."
        )

    def least_change(self, candidates: Sequence[Candidate]) -> str | None:
        """`fitting_change` of the place that costs least of those that the smallest change opens.

        Args:
            candidates: of which none fits.
        """
        one_card = [c for c in candidates if c.device_obstacle is None]

        def expected_usd(candidate: Candidate, config: RunConfig) -> float:
            changed = self.candidate(candidate.place, config, predict)
            return changed.expected_usd if changed.is_launchable else math.inf

        def fits_any(config: RunConfig) -> bool:
            return any(expected_usd(candidate, config) < math.inf for candidate in one_card)

        change = smallest_change(self.request.config, fits_any)
        if change is None or self.request.evaluation is not None:
            return None
        config = change.config
        return self.fitting_change(min(one_card, key=lambda c: expected_usd(c, config)))

    def other_card(self) -> str | None:
        """The cheapest card of Modal that holds the run where one was asked for that does not."""
        asked = self.request.gpu
        if asked is None or self.request.on == "local":
            return None
        found = (
            self.candidate(other, self.request.config, predict)
            for other in places(self.machine, "modal", None)
        )
        enough = (candidate for candidate in found if candidate.is_launchable)
        cheapest = min(enough, key=lambda candidate: candidate.expected_usd, default=None)
        if cheapest is None:
            return None
        return (
            f"{cheapest.place.label} holds it on one card "
            f"({cheapest.memory.peak_gib:.1f} of {cheapest.place.capacity_gib:.1f} GiB)."
        )


def make_plan(
    request: PlanRequest,
    machine: LocalMachine,
    *,
    prices: PriceTable,
    today: date,
    predictor: Predictor = predict,
    runs: Sequence[Measured] = (),
) -> Plan:
    """The plan of a run.

    Args:
        request: what is to be planned.
        machine: this one.
        prices: of Modal.
        today: to judge the age of the prices.
        predictor: of a step's memory.
        runs: that were measured.

    Raises:
        InputError: a model, data, card or cap that cannot be planned with.
    """
    planner = Planner(request, machine, prices=prices, predictor=predictor, runs=runs)
    candidates = planner.candidates()
    budget = _budget(request, candidates)
    retries = request.config.modal.retries
    decision = decide(candidates, budget_usd=budget, retries=retries)
    cheaper = next_cheaper(candidates, decision.chosen)
    is_over_cap = decision.exit_code == EXIT_OVER_CAP
    change = None if cheaper is None or is_over_cap else planner.fitting_change(cheaper)
    is_endless = any(c.obstacle == "time-out" for c in candidates)
    if decision.chosen is None and not is_over_cap and not is_endless:
        largest = max(candidates, key=lambda c: c.place.capacity_gib)
        change = planner.least_change(candidates) or planner.fitting_change(largest)
        ways = (change, planner.other_card())
        change = " ".join(way for way in ways if way is not None) or None
    return Plan(
        candidates=candidates,
        decision=decision,
        cheaper_fit=change,
        prices_as_of=prices.as_of.isoformat(),
        budget_usd=budget,
        warnings=[
            *plan_warnings(request, candidates, decision.chosen, machine, prices, today),
            *(f"{label} is left out: {text}" for label, text in planner.cut_groups.items()),
        ],
    )


def _budget(request: PlanRequest, candidates: Sequence[Candidate]) -> float | None:
    if request.budget_usd is not None:
        return check_budget(request.budget_usd)
    is_smoke = all(candidate.shape.verb == "smoke" for candidate in candidates)
    return SMOKE_BUDGET_USD if is_smoke else None
