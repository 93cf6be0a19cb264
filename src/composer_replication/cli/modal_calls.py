"""A job on Modal from the question to the run directory at home: asked, sent, awaited, settled."""

import argparse
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from composer_replication.cli.recorded_run import EXIT_CODES, RUNS_FOLDER
from composer_replication.cli.verb import EXIT_FAILED, EXIT_STOPPED, Answer
from composer_replication.errors import (
    CallCancelledError,
    InputError,
    LaunchError,
    UnreachableError,
)

if TYPE_CHECKING:
    from composer_replication.launch.function_spec import FunctionSpec
    from composer_replication.launch.job import Job
    from composer_replication.launch.records import LaunchRecord, Status

_HOUR_S = 3600.0

_ENDINGS = {
    "deadline": (
        "The run reached the deadline that its cap allows and was asked to end. It goes on under "
        "the same cap with `composer-replication runs resume {job_id}`."
    ),
    "timeout": (
        "The run reached its time-out and was asked to end. It goes on from its newest checkpoint "
        "with `composer-replication runs resume {job_id}`, and for longer with "
        "`--set modal.timeout_s=SECONDS` after that."
    ),
    "out_of_memory": (
        "The run was killed because it needed more RAM than its container has. It goes on with "
        "more by `composer-replication runs resume {job_id} --set modal.memory_gib=GIB`."
    ),
    "volume_full": (
        "The volume composer-replication-runs has no room left, so the run stopped. What was "
        "committed is whole. `modal volume ls composer-replication-runs` lists what is there; make "
        "room with `modal volume rm -r composer-replication-runs NAME`, then go on with "
        "`composer-replication runs resume {job_id}`."
    ),
}
"""What to do about an ending that is not the run's own."""


def ask(options: argparse.Namespace, question: str) -> bool:
    """Whether to spend; no is the default.

    Raises:
        InputError: nobody is there to answer and `--yes` was not given.
    """
    refuse_nobody(options)
    if options.yes:
        return True
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def refuse_nobody(options: argparse.Namespace) -> None:
    """A question needs somebody at a terminal, or `--yes`.

    Raises:
        InputError: there is neither.
    """
    if not options.yes and (options.json or not sys.stdin.isatty()):
        raise InputError(
            "Nobody is at a terminal to answer whether to spend, so nothing was sent. Give --yes "
            "to go ahead, or --dry-run to look at what would be."
        )


def carry_out_on_modal(
    job: "Job",
    spec: "FunctionSpec",
    record: "LaunchRecord",
    *,
    detaches: bool,
    say: Callable[[str], None],
) -> Answer:
    """Reserve the worst case, send the job, wait for it unless detached, and bring it home.

    Raises:
        BudgetError: over the cap; nothing was sent.
        ComposerError: Modal refused, or the run ended without a result.
    """
    from composer_replication.launch import modal_job
    from composer_replication.launch.job import with_deadline
    from composer_replication.launch.ledger import Ledger
    from composer_replication.launch.records import save_record

    assert record.ledger is not None
    assert record.worst_usd is not None
    ledger = Ledger(Path(record.ledger))
    modal_job.check_credentials()
    ledger.reserve(job.job_id, record.worst_usd, cap_usd=record.budget_usd)
    record.call_id, record.app_id, record.status = None, None, "launching"
    note_sending(record)
    save_record(RUNS_FOLDER, record, job)
    say("contacting Modal ...")
    try:
        with modal_job.launched(spec) as remote:
            # On record before the call is: whoever is killed in between can still end the app.
            record.app_id, record.url = remote.app_id, remote.url
            save_record(RUNS_FOLDER, record)
            record.call_id = remote.spawn(with_deadline(job, time.time()).to_payload())
            record.status = "running"
            save_record(RUNS_FOLDER, record)
            say(f"started {job.job_id}: {record.call_id}, {record.url}")
            say(f"        composer-replication runs logs {job.job_id}")
            if detaches:
                return _still_running(record), 0
            try:
                result = result_of(record)
            except KeyboardInterrupt:
                return _interrupted(record, say)
    except KeyboardInterrupt:
        if record.call_id is not None:
            return _interrupted(record, say)
        end_orphan(record)
        say(f"Ctrl-C while {job.job_id} was being started: nothing of it runs or is set aside.")
        return _still_running(record), EXIT_STOPPED
    except Exception:
        if record.call_id is None:
            # An answer may have been lost of a call that has begun.
            end_orphan(record)
        raise
    return finish(record, result, say)


def result_of(
    record: "LaunchRecord",
    timeout_s: float = math.inf,
    *,
    stops: threading.Event | None = None,
) -> Mapping[str, object]:
    """What a call that this or another process started has returned, once it has.

    A call that ended without a result is settled. One that nobody can ask about is not: it may
    go on.

    Raises:
        TimeoutError: it has not after `timeout_s`, or `stops` is set.
        UnreachableError: nobody answers.
        InputError: Modal does not let this user ask.
        LaunchError: how it ended instead.
    """
    from composer_replication.launch import modal_job

    assert record.call_id is not None
    try:
        return modal_job.wait_for(record.call_id, timeout_s, stops=stops)
    except LaunchError as error:
        # An input error is of who asks, such as credentials; the call may go on.
        if record.status == "running" and not isinstance(error, UnreachableError):
            is_cancelled = isinstance(error, CallCancelledError)
            settle_without_result(record, status="cancelled" if is_cancelled else "failed")
        raise


def finish(
    record: "LaunchRecord", result: Mapping[str, object], say: Callable[[str], None]
) -> Answer:
    """Bring the run directory home, settle what it cost, and answer with its summary."""
    from composer_replication.launch import modal_job
    from composer_replication.launch.container import ended_s, held_s
    from composer_replication.launch.ledger import Ledger
    from composer_replication.launch.records import save_record
    from composer_replication.runs.summary import Summary

    assert record.call_id is not None
    assert record.ledger is not None
    folder = Path(record.folder)
    estimate_usd = held_s(result) * record.usd_per_hour / _HOUR_S
    billed_usd = modal_job.billed_usd(record.job_id, record.created_s)
    if billed_usd is not None and not _is_hour_over(ended_s(result)):
        # A part of the last hour's bill may be missing, so the cap counts the more of the two.
        billed_usd = billed_usd if billed_usd >= estimate_usd else None
    record.cost_usd = estimate_usd if billed_usd is None else billed_usd
    # All attempts of the job so far, so that its own name replaces what was settled before.
    Ledger(Path(record.ledger)).settle(record.job_id, "all", record.cost_usd)
    record.status = "failed"
    save_record(RUNS_FOLDER, record)
    num_files = _files_home(record)
    told = _ENDINGS.get(cast("str", result["ending"]))
    problem = None if told is None else told.format(job_id=record.job_id)
    source = "Modal's bill" if billed_usd is not None else "held seconds x prices"
    note = f"cost_usd is {source}; the container was held for {held_s(result):.0f} s in all."
    path = folder / "summary.json"
    payload = _priced(path, record.cost_usd, note)
    if problem is not None:
        said = cast("str | None", payload.get("error"))
        payload["error"] = problem if said is None else f"{problem} {said}"
    elif "schema" not in payload:
        payload["error"] = f"The run ended with exit code {result['exit_code']} and no summary."
    summary = Summary.model_validate(payload)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(summary.to_json() + "\n", encoding="utf-8")
    if summary.status == "passed":
        # Of an attempt that failed before.
        (folder / "error.txt").unlink(missing_ok=True)
    record.status = summary.status
    save_record(RUNS_FOLDER, record)
    worst = "" if record.worst_usd is None else f" of at most {record.worst_usd:.2f}"
    say(f"{summary.status}  {record.cost_usd:.4f} USD{worst} ({source})")
    say(f"files   {num_files} in {folder}")
    if summary.status != "passed":
        say(f"next    composer-replication runs resume {record.job_id}")
    if problem is not None:
        sys.stderr.write(f"error: {problem}\n")
        return summary.to_json(), EXIT_FAILED
    exit_code = cast("int", result["exit_code"])
    return summary.to_json(), exit_code if exit_code > 0 else EXIT_CODES[summary.status]


def bring_home(record: "LaunchRecord") -> int:
    """The committed run directory of a job, as if it had run here; returns how many files it has.

    Raises:
        InputError: nothing is committed yet.
    """
    from composer_replication.launch import modal_job
    from composer_replication.launch.bundle import CONFIG_FILE, name_own_paths

    folder = Path(record.folder)
    num_files = modal_job.fetch_run(record.job_id, folder)
    name_own_paths(folder / CONFIG_FILE, record.moved)
    return num_files


def bring_home_priced(record: "LaunchRecord") -> int:
    """`bring_home` of a run without a result; what it cost stays in its summary."""
    num_files = bring_home(record)
    path = Path(record.folder) / "summary.json"
    if record.cost_usd is not None and path.exists():
        note = "cost_usd is at most this: Modal gave no result to reckon it from."
        payload = _priced(path, record.cost_usd, note)
        path.write_text(json.dumps(payload, indent=2) + "\n", encoding="utf-8")
    return num_files


def _files_home(record: "LaunchRecord") -> int:
    """How many files came; 0 of a run that ended before it wrote one."""
    try:
        return bring_home(record)
    except InputError:
        return 0


def _priced(path: Path, cost_usd: float, note: str) -> dict[str, object]:
    """A summary's values with what the run cost; of a run that left none, only that it failed."""
    payload: dict[str, object] = {"status": "failed"}
    if path.exists():
        payload = json.loads(path.read_text(encoding="utf-8"))
    payload["cost_usd"] = cost_usd
    payload["notes"] = [*cast("list[str]", payload.get("notes", [])), note]
    return payload


def _is_hour_over(unix_s: float) -> bool:
    return time.time() >= (unix_s // _HOUR_S + 1) * _HOUR_S


def _settle_not_started(record: "LaunchRecord") -> None:
    """Nothing ran: what was set aside is free again."""
    from composer_replication.launch.ledger import Ledger
    from composer_replication.launch.records import save_record

    assert record.ledger is not None
    Ledger(Path(record.ledger)).settle(record.job_id, "not-started", 0.0)
    record.status = "failed"
    save_record(RUNS_FOLDER, record)


def end_orphan(record: "LaunchRecord") -> None:
    """End what a launcher left that came to its end while it started a run.

    Whether its call had begun is not known, so its app is stopped and the time since counts.

    Raises:
        LaunchError: its app cannot be stopped; what it may cost stays set aside.
    """
    from composer_replication.launch import modal_job

    if record.app_id is None:
        _settle_not_started(record)
        return
    modal_job.stop_app(record.app_id)
    settle_without_result(record)


def note_sending(record: "LaunchRecord") -> None:
    """A new call begins now; what those before it cost stays counted, however it ends."""
    record.sent_s, record.spent_before_usd = time.time(), record.cost_usd or 0.0


def settle_without_result(record: "LaunchRecord", *, status: "Status" = "failed") -> None:
    """A call that ended without a result has cost at most the time since it was sent."""
    from composer_replication.launch.ledger import Ledger
    from composer_replication.launch.records import save_record

    assert record.ledger is not None
    sent_s = record.created_s if record.sent_s is None else record.sent_s
    most_usd = max(time.time() - sent_s, 0.0) * record.usd_per_hour / _HOUR_S
    if record.worst_usd is not None:
        most_usd = min(most_usd, record.worst_usd)
    record.status, record.cost_usd = status, record.spent_before_usd + most_usd
    # The accounts first: a launcher that dies here finds the call unsettled and settles it again.
    Ledger(Path(record.ledger)).settle(record.job_id, "all", record.cost_usd)
    save_record(RUNS_FOLDER, record)


def _still_running(record: "LaunchRecord") -> str:
    return record.model_dump_json(by_alias=True, indent=2)


def wants_to_cancel(what: str) -> bool:
    """Ask after Ctrl-C; a second one is a yes."""
    sys.stderr.write(f"Cancel {what} (c), or leave {what} running (Enter)? ")
    sys.stderr.flush()
    try:
        return sys.stdin.readline().strip().lower().startswith("c")
    except KeyboardInterrupt:
        return True


def _interrupted(record: "LaunchRecord", say: Callable[[str], None]) -> Answer:
    """Ctrl-C: leave it running, or end it."""
    from composer_replication.launch import modal_job

    assert record.call_id is not None
    say(f"Ctrl-C. {record.job_id} is running and costs {record.usd_per_hour:.2f} USD an hour.")
    if wants_to_cancel("it"):
        modal_job.cancel(record.call_id)
        settle_without_result(record, status="cancelled")
        say(
            f"cancelled {record.job_id}; what it committed: composer-replication runs fetch "
            f"{record.job_id}"
        )
    else:
        say(f"left running; its files: composer-replication runs fetch {record.job_id}")
    return _still_running(record), EXIT_STOPPED
