"""Members of a sweep as calls of one function on Modal, side by side, under one cap."""

import contextlib
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from composer_replication.cli.modal_calls import (
    finish,
    note_sending,
    result_of,
    settle_without_result,
    wants_to_cancel,
)
from composer_replication.cli.recorded_run import RUNS_FOLDER
from composer_replication.cli.sweep_plan import SweepBill
from composer_replication.cli.verb import EXIT_FAILED, EXIT_STOPPED
from composer_replication.errors import (
    BudgetError,
    CallCancelledError,
    ComposerError,
    UnreachableError,
)

if TYPE_CHECKING:
    from composer_replication.experiments.sweep_grid import SweepMember
    from composer_replication.launch.job import Job
    from composer_replication.launch.modal_job import RemoteFunction
    from composer_replication.launch.records import LaunchRecord

_POLL_S = 2.0


class ModalMembers:
    """Members as calls of one function, under one cap."""

    def __init__(
        self,
        remote: "RemoteFunction",
        limits: "Job",
        bill: SweepBill,
        sweep_folder: Path,
        ledger_path: Path,
    ) -> None:
        """Nothing is sent yet.

        Args:
            remote: the function.
            limits: a member's job without its configuration.
            bill: of the sweep.
            sweep_folder: its `configs/` are there; gets `members/` and `logs/`.
            ledger_path: of the accounts.
        """
        from composer_replication.launch.ledger import Ledger

        self._remote = remote
        self._limits = limits
        self._bill = bill
        self._folder = sweep_folder
        self._ledger = Ledger(ledger_path)
        self._prepared: dict[str, tuple[Job, Mapping[str, str]]] = {}
        """By member: its job, and the paths that have another name there."""
        self._deadline_s: dict[str, float] = {}
        """By job: a second attempt keeps the first one's, and so costs no more with it."""
        self._spent_before_usd: dict[str, float] = {}
        self._running: set[str] = set()
        self._lock = threading.Lock()
        self._cancels = True

    def ask_on_interrupt(self) -> None:
        """Ctrl-C: whether the members that run are ended or left alone."""
        usd_per_hour = len(self._running) * self._bill.candidate.usd_per_hour
        sys.stderr.write(
            f"Ctrl-C. {len(self._running)} members are running and cost {usd_per_hour:.2f} USD an "
            "hour.\n"
        )
        self._cancels = wants_to_cancel("them")
        if not self._cancels:
            sys.stderr.write("left running; the same command with --resume waits for them\n")

    def start(self, member: "SweepMember", folder: Path, stops: threading.Event) -> int:
        """One attempt of one member: reserved, sent, awaited, brought home, settled."""
        if member.name not in self._prepared:
            self._prepared[member.name] = self._prepare(member)
        job, moved = self._prepared[member.name]
        record = self._record(job, folder, moved)
        is_to_be_sent = record.call_id is None or record.status != "running"
        if is_to_be_sent:
            self._reserve(job, stops)
        self._running.add(job.job_id)
        try:
            if is_to_be_sent:
                self._send(job, record)
            return self._await(record, self._folder / "logs" / f"{member.name}.log", stops)
        finally:
            self._running.discard(job.job_id)

    def _prepare(self, member: "SweepMember") -> "tuple[Job, Mapping[str, str]]":
        from composer_replication.launch.bundle import bundle

        packed = bundle(self._folder / "configs" / f"{member.name}.toml", [], member.config)
        job = replace(
            self._limits,
            job_id=f"{self._limits.job_id}-{member.name}",
            arguments=packed.arguments,
            files=packed.files,
        )
        return job, packed.moved

    def _reserve(self, job: "Job", stops: threading.Event) -> None:
        """Set the worst case aside, or wait for members that run to give back what they leave.

        A second attempt has the deadline of the first, and so only what that left of its worst.
        """
        while True:
            with self._lock:
                account = self._ledger.accounts().get(job.job_id)
                spent_usd = 0.0 if account is None else sum(account.spent_usd.values())
                before_usd = self._spent_before_usd.setdefault(job.job_id, spent_usd)
                left_usd = max(self._bill.candidate.worst_usd - (spent_usd - before_usd), 0.0)
                try:
                    self._ledger.reserve(job.job_id, left_usd, cap_usd=self._bill.budget_usd)
                except BudgetError:
                    if not self._running or stops.is_set():
                        raise
                else:
                    self._running.add(job.job_id)
                    return
            stops.wait(_POLL_S)

    def _send(self, job: "Job", record: "LaunchRecord") -> None:
        from composer_replication.launch.job import with_deadline
        from composer_replication.launch.records import save_record

        job = with_deadline(job, time.time())
        assert job.deadline_s is not None
        job = replace(job, deadline_s=self._deadline_s.setdefault(job.job_id, job.deadline_s))
        record.app_id, record.url = self._remote.app_id, self._remote.url
        record.call_id, record.status = None, "launching"
        note_sending(record)
        save_record(RUNS_FOLDER, record, job)
        record.call_id, record.status = self._remote.spawn(job.to_payload()), "running"
        save_record(RUNS_FOLDER, record)

    def _await(self, record: "LaunchRecord", log_path: Path, stops: threading.Event) -> int:
        from composer_replication.launch import modal_job

        assert record.call_id is not None
        Path(record.folder).mkdir(parents=True, exist_ok=True)
        try:
            result = result_of(record, stops=stops)
        except TimeoutError:
            if self._cancels:
                modal_job.cancel(record.call_id)
                settle_without_result(record)
            return EXIT_STOPPED
        except ComposerError as error:
            sys.stderr.write(f"error: {record.job_id}: {error}\n")
            if isinstance(error, UnreachableError):
                return EXIT_STOPPED if stops.is_set() else EXIT_FAILED
            _keep_log(record.call_id, log_path)
            # Whoever cancelled it does not want it to be paid for again.
            return EXIT_STOPPED if isinstance(error, CallCancelledError) else EXIT_FAILED
        _keep_log(record.call_id, log_path)
        return finish(record, result, lambda _: None)[1]

    def _record(self, job: "Job", folder: Path, moved: Mapping[str, str]) -> "LaunchRecord":
        """The member's record; the call of a launcher that was killed is taken over."""
        from composer_replication.launch.records import LaunchRecord, members_of

        sweep_id = self._limits.job_id
        known = {record.job_id: record for record in members_of(RUNS_FOLDER, sweep_id)}
        record = known.get(job.job_id)
        if record is not None and record.status == "running":
            return record
        candidate = self._bill.candidate
        return LaunchRecord(
            job_id=job.job_id,
            verb=job.verb,
            where="modal",
            folder=str(folder),
            sweep=sweep_id,
            created_s=time.time() if record is None else record.created_s,
            gpu=job.gpu,
            usd_per_hour=candidate.usd_per_hour,
            expected_usd=candidate.call_usd,
            worst_usd=candidate.worst_usd,
            cost_usd=None if record is None else record.cost_usd,
            budget_usd=self._bill.budget_usd,
            ledger=str(self._ledger.path),
            moved=dict(moved),
        )


def _keep_log(call_id: str, path: Path) -> None:
    """What an ended call printed, after what those before it did."""
    from composer_replication.launch import modal_job

    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as log, contextlib.suppress(ComposerError):
        log.writelines(modal_job.stream_logs(call_id))
