"""`sweep --on modal`: the members as calls of one function, side by side, under one cap."""

import argparse
import contextlib
import hashlib
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from composer_replication.cli.modal_calls import ask, finish, settle_without_result
from composer_replication.cli.modal_run import plan_on_modal, with_limits
from composer_replication.cli.recorded_run import RUNS_FOLDER
from composer_replication.cli.sweep_plan import SweepBill, SweepPlan, distinct_members, plan_key
from composer_replication.cli.verb import EXIT_STOPPED
from composer_replication.errors import BudgetError, ComposerError, InputError

if TYPE_CHECKING:
    from composer_replication.experiments.sweep import StartMember
    from composer_replication.experiments.sweep_grid import SweepMember
    from composer_replication.launch.function_spec import FunctionSpec
    from composer_replication.launch.job import Job
    from composer_replication.launch.ledger import Ledger
    from composer_replication.launch.modal_job import RemoteFunction
    from composer_replication.launch.records import LaunchRecord
    from composer_replication.planner.candidate import Candidate
    from composer_replication.planner.plan import Plan

_POLL_S = 2.0


def plan_sweep_on_modal(
    options: argparse.Namespace, members: "list[SweepMember]", *, asked: int
) -> SweepPlan:
    """Every point on the card of the one that needs the most memory.

    Raises:
        BudgetError: the cap is under the worst case of one member.
        InputError: a member that fits nowhere.
    """
    distinct = distinct_members(members)
    plans = {
        key: plan_on_modal("train", options, member.config) for key, member in distinct.items()
    }
    chosen = [plan.chosen for plan in plans.values() if plan.chosen is not None]
    largest = max(chosen, key=lambda c: (c.memory.peak_gib, c.worst_usd))
    there = {key: _on_card(plan, largest) for key, plan in plans.items()}
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
        sum(each.expected_usd for each in candidates.values()),
        budget_usd,
    )
    return SweepPlan(members, candidates, bill.slots(asked), bill)


def ask_for_sweep(options: argparse.Namespace, bill: SweepBill) -> None:
    """Say what the sweep may cost, and go on where the answer is yes.

    Raises:
        InputError: it is no, or nobody is there to give it.
    """
    candidate = bill.candidate
    sys.stderr.write(
        f"sweep   {bill.num_members} members on {candidate.place.label}, each at most "
        f"{candidate.worst_usd:.2f} USD\n"
    )
    question = f"Spend about {bill.expected_usd:.2f} USD, at most {bill.worst_usd:.2f} USD?"
    if not ask(options, question):
        raise InputError("The answer was no, so nothing was sent.")


def sweep_function(
    options: argparse.Namespace, bill: SweepBill, sweep_folder: Path, num_parallel: int
) -> "tuple[Job, FunctionSpec]":
    """A member's job without its configuration, and the function that all members call.

    Args:
        options: those of `MODAL_OPTIONS`.
        bill: of the sweep.
        sweep_folder: names it: the same for the same folder, so that a sweep that goes on finds
            what its members committed.
        num_parallel: members at a time.
    """
    from composer_replication.launch.function_spec import function_spec
    from composer_replication.launch.job import Job

    digest = hashlib.sha256(str(sweep_folder.resolve()).encode()).hexdigest()[:6]
    blank = Job(job_id=f"{sweep_folder.name}-{digest}", verb="train")
    limits = with_limits(blank, options.gpu, bill.candidate, bill.config)
    spec = function_spec(
        limits,
        hub_secret=options.hub_secret,
        region=bill.config.modal.region,
        max_containers=num_parallel,
    )
    return limits, spec


def _on_card(plan: "Plan", largest: "Candidate") -> "Candidate":
    """The plan's candidate on the card that all members get."""
    same = (c for c in plan.candidates if c.place.label == largest.place.label)
    found = next(same, plan.chosen)
    assert found is not None, "a plan without a place was refused"
    return found


@contextlib.contextmanager
def modal_members(
    options: argparse.Namespace, bill: SweepBill, sweep_folder: Path, num_parallel: int
) -> "Iterator[StartMember]":
    """What carries a member out, while the function of the sweep exists.

    Raises:
        ComposerError: Modal refused, or cannot be reached.
    """
    from composer_replication.launch import modal_job
    from composer_replication.launch.ledger import Ledger

    ledger = Ledger(options.ledger or sweep_folder / "ledger.json")
    limits, spec = sweep_function(options, bill, sweep_folder, num_parallel)
    with modal_job.launched(spec, shows_output=False) as remote:

        def start(member: "SweepMember", folder: Path, stops: threading.Event) -> int:
            from composer_replication.launch.bundle import bundle

            packed = bundle(sweep_folder / "configs" / f"{member.name}.toml", [], member.config)
            job = replace(
                limits,
                job_id=f"{limits.job_id}-{member.name}",
                arguments=packed.arguments,
                files=packed.files,
                deadline_s=time.time() + (limits.retries + 1) * (limits.timeout_s or 0.0),
            )
            record = _record(job, folder, ledger, bill)
            record.moved = dict(packed.moved)
            return _carry_out(job, record, remote, ledger, bill, stops)

        yield start


def _carry_out(
    job: "Job",
    record: "LaunchRecord",
    remote: "RemoteFunction",
    ledger: "Ledger",
    bill: SweepBill,
    stops: threading.Event,
) -> int:
    """One attempt of one member: reserved, sent, awaited, brought home, settled."""
    from composer_replication.launch import modal_job
    from composer_replication.launch.records import save_record

    if record.call_id is None or record.status != "running":
        ledger.reserve(job.job_id, bill.candidate.worst_usd, cap_usd=bill.budget_usd)
        record.call_id = remote.spawn(job.to_payload())
        record.app_id, record.url, record.status = remote.app_id, remote.url, "running"
        save_record(RUNS_FOLDER, record, job)
    Path(record.folder).mkdir(parents=True, exist_ok=True)
    while True:
        try:
            result = modal_job.wait_for(record.call_id, _POLL_S)
        except TimeoutError:
            if not stops.is_set():
                continue
            modal_job.cancel(record.call_id)
            settle_without_result(record)
            return EXIT_STOPPED
        except ComposerError as error:
            settle_without_result(record)
            sys.stderr.write(f"error: {job.job_id}: {error}\n")
            return 1
        return finish(record, result, lambda _: None)[1]


def _record(job: "Job", folder: Path, ledger: "Ledger", bill: SweepBill) -> "LaunchRecord":
    """The member's record; that of a launcher that was killed is taken over, call and all."""
    from composer_replication.launch.records import LaunchRecord, load_records

    known = {record.job_id: record for record in load_records(RUNS_FOLDER)}
    if job.job_id in known:
        return known[job.job_id]
    return LaunchRecord(
        job_id=job.job_id,
        verb=job.verb,
        where="modal",
        folder=str(folder),
        created_s=time.time(),
        gpu=job.gpu,
        usd_per_hour=bill.candidate.usd_per_hour,
        expected_usd=bill.candidate.expected_usd,
        worst_usd=bill.candidate.worst_usd,
        budget_usd=bill.budget_usd,
        ledger=str(ledger.path),
    )
