"""`plan`: the bill before the run."""

import argparse
from typing import TYPE_CHECKING, cast

from composer_replication.cli.verb import JSON, SET, Answer, Argument, Option, Verb
from composer_replication.errors import InputError, nearest

if TYPE_CHECKING:
    from composer_replication.planner.calibration import Measured
    from composer_replication.planner.places import On
    from composer_replication.planner.plan import PlanRequest
    from composer_replication.planner.prices import PriceTable
    from composer_replication.planner.run_memory import Predictor

_PLACES = ("local", "modal", "all")
_TABLE_WIDTH = 100

_EPILOG = """\
Runs nothing and writes nothing but, with --refresh, the fetched prices. A file whose [grpo] sets
max_steps is planned as a train run, any other as a smoke (1,800 s and 5 USD by default).

examples:
  composer-replication plan configs/smoke_qwen2.5_0.5b.toml
  composer-replication plan configs/train_qwen2.5_7b.toml --on modal --gpu H100 --budget 150
  composer-replication plan configs/smoke_qwen2.5_0.5b.toml --gpu L4 --solve max_length

exit codes: 0 there is a place, 1 nothing fits or would end, 2 your input, or all is over the cap"""


def _plan(options: argparse.Namespace) -> Answer:
    from datetime import UTC, datetime

    from rich.console import Console

    from composer_replication.config.loading import load_config
    from composer_replication.planner.local_machine import this_machine
    from composer_replication.planner.plan import Planner, make_plan
    from composer_replication.planner.plan_json import plan_json
    from composer_replication.planner.plan_table import NextOptions, print_plan
    from composer_replication.planner.solving import solve

    config = load_config(options.config, options.set)
    request = _request(options, config)
    today = datetime.now(UTC).date()
    prices = _prices(options, today)
    machine, runs = this_machine(), _runs(options, request)
    predictor = _predictor(options)
    plan = make_plan(request, machine, prices=prices, today=today, predictor=predictor, runs=runs)
    solved = []
    if options.solve is not None:
        planner = Planner(request, machine, prices=prices, runs=runs)
        solved = solve(planner, options.solve, plan.candidates)
    if not options.json:
        # A pipe has no width, and a table that breaks its lines cannot be read.
        console = Console()
        console.width = max(console.width, _TABLE_WIDTH)
        along = NextOptions(options.set, request.budget_usd, options.gpu)
        print_plan(plan, console, config_path=options.config, solved=solved, next_options=along)
    return plan_json(plan, solved), plan.exit_code


def _predictor(options: argparse.Namespace) -> "Predictor":
    from composer_replication.planner.memory import predict

    if not options.simulate:
        return predict
    from composer_replication.experiments.simulate import simulate_once_a_case

    return simulate_once_a_case()


def _request(options: argparse.Namespace, config: object) -> "PlanRequest":
    from composer_replication.config.run_config import RunConfig
    from composer_replication.planner.hardware import parse_gpu
    from composer_replication.planner.plan import PlanRequest
    from composer_replication.planner.run_shape import verb_of

    run_config = cast(RunConfig, config)
    on = options.on or "all"
    if on not in _PLACES:
        raise InputError(f"--on is {on!r}; it says where. {nearest(on, _PLACES)}")
    budget = None
    if options.budget is not None:
        try:
            budget = float(options.budget)
        except ValueError:
            raise InputError(
                f"--budget is {options.budget!r}; it is the most to spend in USD and must be a "
                "number. Write for example --budget 5."
            ) from None
    return PlanRequest(
        config=run_config,
        on=cast("On", on),
        gpu=None if options.gpu is None else parse_gpu(options.gpu),
        budget_usd=budget,
        # A smoke alone runs without a file, in sizes that suit the device.
        fills_smoke_defaults=options.config is None and verb_of(run_config) == "smoke",
    )


def _prices(options: argparse.Namespace, today: object) -> "PriceTable":
    from datetime import date

    from composer_replication.planner.prices import current_prices, refresh_prices

    return refresh_prices(cast(date, today)) if options.refresh else current_prices()


def _runs(options: argparse.Namespace, request: "PlanRequest") -> "list[Measured]":
    from composer_replication.cli.recorded_run import RUNS_FOLDER
    from composer_replication.planner.calibration import measured_runs

    found = measured_runs(RUNS_FOLDER)
    if options.probe:
        from composer_replication.experiments.probe import run_probe

        found.append(run_probe(request.config))
    return found


PLAN = Verb(
    name="plan",
    summary="where to run it: memory, time and dollars in each place, before anything runs",
    purpose="Says where a run fits, how long it takes and what it costs, and which place to take.",
    epilog=_EPILOG,
    options=(
        Option("--on", "PLACE", "local, modal or all; default all"),
        Option("--gpu", "NAME[:N]", "look at this card alone, such as L4 or H100:2"),
        Option("--budget", "USD", "cap on the worst case, every attempt at its time-out"),
        Option("--solve", "KEY", "the largest value that fits: max_length or any whole number"),
        Option(
            "--simulate",
            None,
            "run the step on fake tensors instead of formulas; some seconds",
            "switch",
        ),
        Option("--probe", None, "run ten steps here first and take their seconds", "switch"),
        Option(
            "--refresh", None, "read today's prices from Modal; needs its credentials", "switch"
        ),
        SET,
        JSON,
    ),
    carry_out=_plan,
    argument=Argument("config", "CONFIG.toml", is_required=False),
    computes=False,
)
"""Starts without torch; `--probe` and `--simulate` import it."""
