"""`--on modal`: the plan as a bill, the question, and the job that the answer sends."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from composer_replication.cli.modal_calls import ask, carry_out_on_modal, refuse_nobody
from composer_replication.cli.recorded_run import RUNS_FOLDER, open_run
from composer_replication.cli.sweep_plan import NOTHING_SENT
from composer_replication.cli.verb import Answer, Option
from composer_replication.errors import BudgetError, ConfigError, InputError

if TYPE_CHECKING:
    from composer_replication.config.run_config import RunConfig
    from composer_replication.launch.bundle import Bundle
    from composer_replication.launch.job import Job
    from composer_replication.planner.candidate import Candidate
    from composer_replication.planner.evaluation_shape import EvaluationSize
    from composer_replication.planner.plan import Plan

DRY_RUN_SCHEMA = 1

MODAL_OPTIONS = (
    Option("--gpu", "NAME[:N]", "on modal: this card, such as L4 or H100!:2; default: the plan's"),
    Option("--budget", "USD", "on modal: cap on the worst case, and the run's deadline"),
    Option("--yes", None, "on modal: spend without asking", "switch"),
    Option("--dry-run", None, "on modal: print what would be created; sends nothing", "switch"),
    Option("--detach", None, "on modal: start it and return", "switch"),
    Option("--hub-secret", "NAME", "on modal: secret there that holds HF_TOKEN"),
    Option("--ledger", "FILE", "on modal: accounts of jobs that share --budget", "path"),
)


def run_on_modal(
    verb: Literal["smoke", "train"],
    options: argparse.Namespace,
    config: "RunConfig",
    overrides: Sequence[str],
) -> Answer:
    """Plan the run, ask, and carry it out in a container.

    Raises:
        BudgetError: over the cap; nothing was sent.
        InputError: what cannot run there, nobody to ask, or no credentials.
    """
    from composer_replication.launch.bundle import bundle

    plan = plan_on_modal(verb, options, config)
    return send_to_modal(verb, options, config, plan, bundle(options.config, overrides, config))[0]


def send_to_modal(
    verb: str, options: argparse.Namespace, config: "RunConfig", plan: "Plan", packed: "Bundle"
) -> tuple[Answer, Path | None]:
    """Show the plan, ask, and carry it out; or with `--dry-run` show what would be created.

    Args:
        verb: of the job.
        options: `out`, `resume`, `json`, and those of `MODAL_OPTIONS`.
        config: its `name` and `[modal]`.
        plan: with a place.
        packed: the job's arguments and files.

    Returns:
        The answer, and the run directory; None where nothing was sent.

    Raises:
        BudgetError: over the cap; nothing was sent.
        InputError: nobody to ask, or no credentials.
    """
    from composer_replication.launch.function_spec import function_spec
    from composer_replication.launch.job import Job, new_job_id
    from composer_replication.launch.records import LaunchRecord
    from composer_replication.runs.run_folders import latest_folder

    if options.resume:
        _refuse_begun(options.out or latest_folder(RUNS_FOLDER, config.name))
    chosen = plan.chosen
    assert chosen is not None, "a plan without a place was refused"
    job = Job(
        job_id=new_job_id(config.name), verb=verb, arguments=packed.arguments, files=packed.files
    )
    job = with_limits(job, options.gpu, chosen, config)
    spec = function_spec(job, hub_secret=options.hub_secret, region=config.modal.region)
    if options.dry_run:
        return _dry_run(options, plan, chosen, spec.to_payload()), None
    say = _sayer(options)
    _show(options, plan)
    worst = f"at most {chosen.worst_usd:.2f} USD"
    check_can_spend(options)
    if not ask(options, f"Spend about {chosen.call_usd:.2f} USD, {worst}?"):
        say("Nothing was sent.")
        return ("{}", 0), None
    with open_run(options, config.name) as run:
        folder = run.path
    record = LaunchRecord(
        job_id=job.job_id,
        verb=verb,
        where="modal",
        folder=str(folder),
        created_s=time.time(),
        gpu=job.gpu,
        usd_per_hour=chosen.usd_per_hour,
        expected_usd=chosen.call_usd,
        worst_usd=chosen.worst_usd,
        budget_usd=plan.budget_usd,
        ledger=str(options.ledger or RUNS_FOLDER / ".jobs" / f"{job.job_id}.ledger"),
        hub_secret=options.hub_secret,
        region=config.modal.region,
        moved=dict(packed.moved),
    )
    return carry_out_on_modal(job, spec, record, detaches=options.detach, say=say), folder


def _refuse_begun(folder: Path) -> None:
    """What has begun goes on where it is; a job of its own would start from nothing and be paid.

    Raises:
        InputError: the folder holds a run, or a job comes home to it.
    """
    from composer_replication.launch.records import newest_record_of
    from composer_replication.runs.run_directory import SCHEMA_FILE

    record = newest_record_of(RUNS_FOLDER, folder)
    if record is not None and record.where == "modal":
        raise InputError(
            f"{folder} is of {record.job_id}, whose checkpoints are on Modal. It goes on with "
            f"`composer-replication runs resume {record.job_id}`."
        )
    if (folder / SCHEMA_FILE).exists():
        raise InputError(
            f"{folder} holds a run of this machine, whose checkpoints a container does not have. "
            "Resume it without --on modal, or start one there with another --out."
        )


def plan_on_modal(
    verb: Literal["smoke", "train", "evaluate"],
    options: argparse.Namespace,
    config: "RunConfig",
    evaluation: "EvaluationSize | None" = None,
) -> "Plan":
    """The plan of a run there, with a place chosen.

    Args:
        verb: that runs.
        options: `gpu` and `budget`, and `config` of a smoke.
        config: of the run; of an evaluation its `model` and `[modal]`.
        evaluation: what an evaluation plays.

    Raises:
        BudgetError: every place is over the cap.
        ConfigError: it fits nowhere, or the card cannot compute what the configuration asks for.
    """
    from datetime import UTC, datetime

    from composer_replication.planner.calibration import measured_runs
    from composer_replication.planner.hardware import parse_gpu
    from composer_replication.planner.local_machine import this_machine
    from composer_replication.planner.plan import PlanRequest, make_plan
    from composer_replication.planner.prices import current_prices

    gpu = None if options.gpu is None else parse_gpu(options.gpu)
    request = PlanRequest(
        config=config,
        on="modal",
        gpu=gpu,
        budget_usd=None if options.budget is None else budget_usd(options.budget),
        fills_smoke_defaults=verb == "smoke" and options.config is None,
        verb=verb,
        evaluation=evaluation,
    )
    today = datetime.now(UTC).date()
    runs = measured_runs(RUNS_FOLDER)
    plan = make_plan(request, this_machine(), prices=current_prices(), today=today, runs=runs)
    _refuse_no_place(plan)
    return plan


def budget_usd(text: str) -> float:
    """What `--budget` says, in USD.

    Raises:
        InputError: no amount that could be spent.
    """
    from composer_replication.planner.cost import check_budget

    try:
        amount_usd = float(text)
    except ValueError:
        raise InputError(
            f"--budget is {text!r}; it is the most to spend in USD and must be a number. "
            "Write for example --budget 5."
        ) from None
    return check_budget(amount_usd)


def _refuse_no_place(plan: "Plan") -> None:
    from composer_replication.planner.decision import EXIT_OVER_CAP

    if plan.chosen is None:
        raised = BudgetError if plan.exit_code == EXIT_OVER_CAP else ConfigError
        change = f" {plan.cheaper_fit}" if plan.cheaper_fit is not None else ""
        raise raised(f"{plan.decision.reason}{change} Nothing was sent.")


def with_limits(
    job: "Job", asked_gpu: str | None, chosen: "Candidate", config: "RunConfig"
) -> "Job":
    """The job with the plan's card and time-out, and what `[modal]` asks for."""
    from dataclasses import replace

    return replace(
        job,
        gpu=_card_name(asked_gpu, chosen, is_measured=job.verb == "smoke"),
        num_processes=max(chosen.place.num_gpus, 1),
        cpu_cores=config.modal.cpu_cores,
        memory_gib=chosen.memory_request_gib,
        timeout_s=chosen.timeout_s,
        retries=config.modal.retries,
    )


def _card_name(asked: str | None, chosen: "Candidate", *, is_measured: bool) -> str:
    """As Modal spells it; a measured run pins H100, which may become an H200 otherwise.

    `B200+` takes a B300 too, at the same price.
    """
    place, asked_name = chosen.place, (asked or "").partition(":")[0]
    name = place.name
    if name == "H100" and (is_measured or asked_name.endswith("!")):
        name = "H100!"
    elif name == "B200" and asked_name.endswith("+"):
        name = "B200+"
    return name if place.num_gpus <= 1 else f"{name}:{place.num_gpus}"


def _dry_run(
    options: argparse.Namespace, plan: "Plan", chosen: "Candidate", function: dict[str, object]
) -> Answer:
    from composer_replication.planner.plan_json import candidate_answer
    from composer_replication.runs.json_text import to_json_text

    payload = {
        "schema": DRY_RUN_SCHEMA,
        "function": function,
        "plan": candidate_answer(chosen).model_dump(mode="json"),
        "worst_usd": round(chosen.worst_usd, 4),
    }
    if not options.json:
        _show(options, plan)
        sys.stdout.write(to_json_text({"function": function}, indent=2) + "\n")
        sys.stdout.write(NOTHING_SENT)
    return to_json_text(payload, indent=2), 0


def _show(options: argparse.Namespace, plan: "Plan") -> None:
    from rich.console import Console

    from composer_replication.planner.plan_table import print_plan

    console = Console(stderr=options.json)
    console.width = max(console.width, 100)
    print_plan(plan, console, config_path=vars(options).get("config"), solved=[])


def _sayer(options: argparse.Namespace) -> Callable[[str], None]:
    stream = sys.stderr if options.json else sys.stdout

    def say(text: str) -> None:
        stream.write(text + "\n")
        stream.flush()

    return say


def check_can_spend(options: argparse.Namespace) -> None:
    """Refuse what cannot go ahead before somebody is asked to spend, or a folder is made.

    Raises:
        InputError: nobody to ask, or no credentials.
        MissingDependencyError: Modal's client is not installed.
    """
    import importlib.util

    from composer_replication.errors import MissingDependencyError

    refuse_nobody(options)
    if importlib.util.find_spec("modal") is None:
        raise MissingDependencyError(
            "--on modal needs the package modal, which is not installed. "
            'pip install "modal>=1.6,<1.7"; --dry-run needs neither it nor credentials.'
        )
    from composer_replication.launch import modal_job

    modal_job.check_credentials()
