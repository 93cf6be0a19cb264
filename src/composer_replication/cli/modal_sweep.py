"""`sweep --on modal`: the members as calls of one function, side by side, under one cap."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from composer_replication.cli.launched_job import end_orphans
from composer_replication.cli.modal_calls import ask
from composer_replication.cli.modal_members import ModalMembers
from composer_replication.cli.modal_run import check_can_spend, plan_on_modal, with_limits
from composer_replication.cli.recorded_run import RUNS_FOLDER
from composer_replication.cli.sweep_plan import (
    SweepBill,
    SweepPlan,
    distinct_members,
    plan_key,
    print_sweep,
)
from composer_replication.errors import BudgetError, ComposerError, ConfigError

if TYPE_CHECKING:
    from composer_replication.experiments.sweep_grid import SweepMember
    from composer_replication.launch.function_spec import FunctionSpec
    from composer_replication.launch.job import Job
    from composer_replication.planner.candidate import Candidate
    from composer_replication.planner.plan import Plan

_SWEEP_ID_FILE = "sweep_id"
"""In the sweep's folder: its name on Modal, under which its members committed and it is billed."""


def plan_sweep_on_modal(
    options: argparse.Namespace, members: "list[SweepMember]", *, asked: int
) -> SweepPlan:
    """Every point on the card of the one that needs the most memory, or on one that takes all.

    Raises:
        BudgetError: the cap is under the worst case of one member.
        ConfigError: no card takes every member.
        InputError: a member that fits nowhere.
    """
    distinct = distinct_members(members)
    plans = {
        key: plan_on_modal("train", options, member.config) for key, member in distinct.items()
    }
    there = _on_one_card(plans)
    key_of_largest = max(there, key=lambda key: (there[key].memory.peak_gib, there[key].worst_usd))
    largest = there[key_of_largest]
    alone = plans[key_of_largest].chosen
    if alone is not None and alone.place.label != largest.place.label:
        sys.stderr.write(
            f"note  all members go to {largest.place.label}: not all of them can run on "
            f"{alone.place.label}, which the largest alone would take.\n"
        )
    # The function has one time-out: that of the longest member, on the card of the largest.
    longest = max(there.values(), key=lambda c: c.timeout_s)
    candidate = replace(largest, timeout_s=longest.timeout_s, worst_usd=longest.worst_usd)
    candidates = {member.name: there[plan_key(member)] for member in members}
    budget_usd = next(iter(plans.values())).budget_usd
    if budget_usd is not None and candidate.worst_usd > budget_usd:
        raise BudgetError(
            f"A member may cost {candidate.worst_usd:.2f} USD on {candidate.place.label}, over the "
            f"cap of {budget_usd:g} USD. Raise --budget, or set modal.timeout_s. Nothing was sent."
        )
    bill = SweepBill(
        candidate,
        members[0].config,
        len(members),
        sum(each.call_usd for each in candidates.values()),
        budget_usd,
        plans[key_of_largest],
    )
    return SweepPlan(members, candidates, bill.slots(asked), bill)


def asks_for_sweep(options: argparse.Namespace, plan: SweepPlan, *, num_done: int) -> bool:
    """Show what the sweep would do and may cost, and ask; False: the answer was no.

    Raises:
        InputError: nobody is there to answer.
    """
    from rich.console import Console

    from composer_replication.planner.plan_table import print_plan

    bill = plan.bill
    assert bill is not None, "a sweep on Modal has a bill"
    console = Console(stderr=True)
    console.width = max(console.width, 100)
    print_plan(bill.plan, console, config_path=options.config, solved=[])
    print_sweep(plan, num_done, sys.stderr)
    each = f"each at most {bill.candidate.worst_usd:.2f}"
    check_can_spend(options)
    question = f"Spend about {plan.expected_usd:.2f} USD, at most {plan.worst_usd:.2f} ({each})?"
    if ask(options, question):
        return True
    (sys.stderr if options.json else sys.stdout).write("Nothing was sent.\n")
    return False


def sweep_function(
    options: argparse.Namespace, bill: SweepBill, sweep_folder: Path, num_parallel: int
) -> "tuple[Job, FunctionSpec]":
    """A member's job without its configuration, and the function that all members call.

    Args:
        options: those of `MODAL_OPTIONS`.
        bill: of the sweep.
        sweep_folder: one that goes on keeps the name under which its members committed.
        num_parallel: members at a time.
    """
    from composer_replication.launch.function_spec import function_spec
    from composer_replication.launch.job import Job, new_job_id

    sweep_id = _known_sweep_id(sweep_folder) or new_job_id(sweep_folder.name)
    limits = with_limits(
        Job(job_id=sweep_id, verb="train"), options.gpu, bill.candidate, bill.config
    )
    spec = function_spec(
        limits,
        hub_secret=options.hub_secret,
        region=bill.config.modal.region,
        max_containers=num_parallel,
    )
    return limits, spec


def _known_sweep_id(sweep_folder: Path) -> str | None:
    path = sweep_folder / _SWEEP_ID_FILE
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def sweep_billed_usd(sweep_folder: Path) -> float | None:
    """What Modal has billed for all members so far; None where it says nothing, or is not asked.

    A bill is one app's, so that what each member cost is reckoned from its seconds.
    """
    sweep_id = _known_sweep_id(sweep_folder)
    if sweep_id is None:
        return None
    from composer_replication.launch import modal_job

    begun_s = (sweep_folder / _SWEEP_ID_FILE).stat().st_mtime
    try:
        modal_job.check_credentials()
        modal_job.check_reachable()
    except ComposerError:
        return None
    return modal_job.billed_usd(sweep_id, begun_s)


def _on_one_card(plans: "dict[str, Plan]") -> "dict[str, Candidate]":
    """The candidates of all points on one card.

    That is what the point with the most memory would take; where another point cannot run there,
    for its time-out say, the cheapest that all can take.
    """
    chosen = [plan.chosen for plan in plans.values() if plan.chosen is not None]
    first = max(chosen, key=lambda c: (c.memory.peak_gib, c.worst_usd)).place.label
    there: dict[str, dict[str, Candidate]] = {}
    for key, plan in plans.items():
        for candidate in plan.candidates:
            there.setdefault(candidate.place.label, {})[key] = candidate
    takes_all = {
        label: found
        for label, found in there.items()
        if len(found) == len(plans) and all(each.is_launchable for each in found.values())
    }
    if first in takes_all:
        return takes_all[first]
    if not takes_all:
        labels = ", ".join(sorted({candidate.place.label for candidate in chosen}))
        raise ConfigError(
            f"The members of a sweep share one card, and none takes them all: alone they would "
            f"take {labels}. Raise modal.timeout_s, save checkpoints more often, or sweep what "
            "needs another card by itself. Nothing was sent."
        )
    return min(takes_all.values(), key=lambda found: sum(c.expected_usd for c in found.values()))


@contextlib.contextmanager
def modal_members(
    options: argparse.Namespace, bill: SweepBill, sweep_folder: Path, num_parallel: int
) -> "Iterator[ModalMembers]":
    """What carries the members out, while the function of the sweep exists.

    Raises:
        ComposerError: Modal refused, or cannot be reached.
    """
    from composer_replication.launch import modal_job
    from composer_replication.launch.records import members_of
    from composer_replication.runs.atomic_files import write_text_atomically

    limits, spec = sweep_function(options, bill, sweep_folder, num_parallel)
    end_orphans(members_of(RUNS_FOLDER, limits.job_id))
    write_text_atomically(sweep_folder / _SWEEP_ID_FILE, limits.job_id + "\n")
    ledger_path = options.ledger or sweep_folder / "ledger.json"
    with modal_job.launched(spec, shows_output=False) as remote:
        yield ModalMembers(remote, limits, bill, sweep_folder, ledger_path)
