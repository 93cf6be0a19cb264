"""`sweep --on modal`: the members as calls of one function, side by side, under one cap."""

import argparse
import contextlib
import hashlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from composer_replication.cli.modal_calls import ask, finish, settle_without_result
from composer_replication.cli.modal_run import plan_on_modal, with_limits
from composer_replication.cli.recorded_run import RUNS_FOLDER
from composer_replication.cli.verb import EXIT_STOPPED
from composer_replication.errors import ComposerError, InputError

if TYPE_CHECKING:
    from composer_replication.config.run_config import RunConfig
    from composer_replication.experiments.sweep import StartMember
    from composer_replication.experiments.sweep_grid import SweepMember
    from composer_replication.launch.job import Job
    from composer_replication.launch.ledger import Ledger
    from composer_replication.launch.modal_job import RemoteFunction
    from composer_replication.launch.records import LaunchRecord
    from composer_replication.planner.candidate import Candidate

_POLL_S = 2.0


@dataclass(frozen=True, slots=True)
class SweepBill:
    """What a sweep may cost: its dearest member stands for each."""

    candidate: "Candidate"
    """The place of the member that needs the most memory; all members run there."""
    config: "RunConfig"
    """Of a member; its `[modal]` holds for all."""
    num_members: int
    budget_usd: float | None

    @property
    def worst_usd(self) -> float:
        """Of all members, or the cap where that is less."""
        worst_usd = self.num_members * self.candidate.worst_usd
        return worst_usd if self.budget_usd is None else min(worst_usd, self.budget_usd)

    def slots(self, asked: int) -> int:
        """Members at a time whose worst cases fit the cap together."""
        if self.budget_usd is None:
            return asked
        return max(min(asked, int(self.budget_usd // self.candidate.worst_usd)), 1)


def sweep_bill(options: argparse.Namespace, members: "Sequence[SweepMember]") -> SweepBill:
    """Plan every point and answer whether to spend.

    Raises:
        BudgetError: the cap is under the worst case of one member.
        InputError: a member that fits nowhere, or the answer was no.
    """
    distinct = {m.config.model_dump_json(exclude={"name", "seed"}): m for m in members}
    plans = [plan_on_modal("train", options, member.config) for member in distinct.values()]
    chosen = [plan.chosen for plan in plans if plan.chosen is not None]
    candidate = max(chosen, key=lambda c: (c.memory.peak_gib, c.worst_usd))
    bill = SweepBill(candidate, members[0].config, len(members), plans[0].budget_usd)
    sys.stderr.write(
        f"sweep   {len(members)} members on {candidate.place.label}, each at most "
        f"{candidate.worst_usd:.2f} USD\n"
    )
    expected_usd = len(members) * candidate.expected_usd
    if not ask(options, f"Spend about {expected_usd:.2f} USD, at most {bill.worst_usd:.2f} USD?"):
        raise InputError("The answer was no, so nothing was sent.")
    return bill


@contextlib.contextmanager
def modal_members(
    options: argparse.Namespace, bill: SweepBill, sweep_folder: Path, num_parallel: int
) -> "Iterator[StartMember]":
    """What carries a member out, while the function of the sweep exists.

    Raises:
        ComposerError: Modal refused, or cannot be reached.
    """
    from composer_replication.launch import modal_job
    from composer_replication.launch.function_spec import function_spec
    from composer_replication.launch.job import Job
    from composer_replication.launch.ledger import Ledger

    # The same for the same folder, so that a sweep that goes on finds what its members committed.
    digest = hashlib.sha256(str(sweep_folder.resolve()).encode()).hexdigest()[:6]
    sweep_id = f"{sweep_folder.name}-{digest}"
    ledger = Ledger(options.ledger or sweep_folder / "ledger.json")
    blank = Job(job_id=sweep_id, verb="train")
    limits = with_limits(blank, options.gpu, bill.candidate, bill.config)
    spec = function_spec(
        limits,
        run_id=sweep_id,
        hub_secret=options.hub_secret,
        region=bill.config.modal.region,
        max_containers=num_parallel,
    )
    with modal_job.launched(spec, shows_output=False) as remote:

        def start(member: "SweepMember", folder: Path, stops: threading.Event) -> int:
            from composer_replication.launch.bundle import bundle

            packed = bundle(sweep_folder / "configs" / f"{member.name}.toml", [], member.config)
            job = replace(
                limits,
                job_id=f"{sweep_id}-{member.name}",
                arguments=packed.arguments,
                files=packed.files,
                deadline_s=time.time() + (limits.retries + 1) * (limits.timeout_s or 0.0),
            )
            return _carry_out(job, folder, remote, ledger, bill, stops)

        yield start


def _carry_out(
    job: "Job",
    folder: Path,
    remote: "RemoteFunction",
    ledger: "Ledger",
    bill: SweepBill,
    stops: threading.Event,
) -> int:
    """One attempt of one member: reserved, sent, awaited, brought home, settled."""
    from composer_replication.launch import modal_job
    from composer_replication.launch.records import save_record

    record = _record(job, folder, ledger, bill)
    if record.call_id is None or record.status != "running":
        ledger.reserve(job.job_id, bill.candidate.worst_usd, cap_usd=bill.budget_usd)
        record.call_id = remote.spawn(job.to_payload())
        record.app_id, record.url, record.status = remote.app_id, remote.url, "running"
        save_record(RUNS_FOLDER, record, job)
    folder.mkdir(parents=True, exist_ok=True)
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
