"""`runs`: the jobs that were launched, and what can be done about each by its id."""

import argparse
import os
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from composer_replication.cli.launched_job import cancel_job, fetch_job, follow
from composer_replication.cli.modal_calls import ask, carry_out_on_modal, end_orphan
from composer_replication.cli.modal_run import budget_usd
from composer_replication.cli.recorded_run import RUNS_FOLDER
from composer_replication.cli.resumed_limits import with_other_limits
from composer_replication.cli.sweep_calls import (
    SweepRow,
    cancel_sweep,
    fetch_sweep,
    follow_sweep,
    sweep_row,
    to_json,
)
from composer_replication.cli.verb import JSON, Answer, Argument, Option, Verb
from composer_replication.errors import InputError, nearest

if TYPE_CHECKING:
    from composer_replication.launch.records import LaunchRecord

_ACTIONS = ("list", "logs", "cancel", "fetch", "resume")

_EPILOG = """\
actions:
  list        every launched job, and every run directory in runs/
  logs ID     what the job has printed, and prints until it ends
  cancel ID   end it; what it committed stays
  fetch ID    bring its run directory home and settle what it cost
  resume ID   go on from its newest checkpoint, under the cap that it was launched with or --budget

The id of a sweep on Modal stands for all of its members.

examples:
  composer-replication runs list
  composer-replication runs resume first-3f2a1b --yes

exit codes: 0 done, 1 failed, 2 your input"""


def _runs(options: argparse.Namespace) -> Answer:
    from composer_replication.launch.records import load_record, members_of

    if options.action not in _ACTIONS:
        raise InputError(
            f"runs does not know {options.action!r}. {nearest(options.action, _ACTIONS)}"
        )
    if options.action == "list":
        return _list(options)
    if options.job_id is None:
        raise InputError(
            f"runs {options.action} needs the id of a job. "
            "Look it up with: composer-replication runs list"
        )
    members = members_of(RUNS_FOLDER, options.job_id)
    if members:
        return _sweep(options, members)
    record = load_record(RUNS_FOLDER, options.job_id)
    actions = {"logs": _logs, "cancel": _cancel, "fetch": _fetch, "resume": _resume}
    return actions[options.action](options, record)


def _sweep(options: argparse.Namespace, members: "list[LaunchRecord]") -> Answer:
    """An action on a sweep as one."""
    if options.action == "resume":
        raise InputError(
            f"{options.job_id} is a sweep: the command that started it goes on with --resume, and "
            "runs again what is not done."
        )
    if options.action == "logs":
        _print_all(options, follow_sweep(members))
        return to_json(members), 0
    act = cancel_sweep if options.action == "cancel" else fetch_sweep
    return act(members, lambda text: _say(options, text))


def _list(options: argparse.Namespace) -> Answer:
    from pathlib import Path

    from composer_replication.launch.records import load_records, run_status
    from composer_replication.runs.json_text import to_json_text

    records = load_records(RUNS_FOLDER)
    rows: list[dict[str, object]] = []
    for record in records:
        status = record.status
        if record.where == "local":
            status = run_status(Path(record.folder)) or status
        rows.append({**record.model_dump(by_alias=True, exclude={"schema_version"})})
        rows[-1]["status"] = status
    names = dict.fromkeys(record.sweep for record in records if record.sweep is not None)
    sweeps = [sweep_row([record for record in records if record.sweep == name]) for name in names]
    known = {str(Path(str(row["folder"])).resolve()) for row in [*rows, *sweeps]}
    for folder in sorted(RUNS_FOLDER.glob("*")):
        status = run_status(folder) if folder.is_dir() else None
        if status is not None and str(folder.resolve()) not in known:
            rows.append({"job_id": None, "where": "local", "folder": str(folder), "status": status})
    if not options.json:
        _print_list(rows, sweeps)
    return to_json_text({"schema": 1, "runs": rows, "sweeps": sweeps}, indent=2), 0


def _print_list(rows: Sequence[Mapping[str, object]], sweeps: Sequence[SweepRow]) -> None:
    """A line each, a sweep's members below it."""
    lines = [_line(row) for row in rows if row.get("sweep") is None]
    for sweep in sweeps:
        passed = f"{sweep['num_passed']} of {sweep['num_launched']} members passed"
        folder = f"{sweep['folder']}  {passed}"
        lines.append((sweep["status"], "modal", sweep["sweep"], sweep["cost_usd"], folder))
        lines += [_line(row) for row in rows if row.get("sweep") == sweep["sweep"]]
    width = max((len(line[2]) for line in lines), default=0)
    for status, where, job_id, cost, folder in lines:
        usd = f"{cost:.4f}" if isinstance(cost, float) else "-"
        sys.stdout.write(f"{status!s:<10} {where:<6} {job_id:<{width}} {usd:>9} USD  {folder}\n")
    if not rows:
        sys.stdout.write(f"{RUNS_FOLDER} holds no run.\n")
    if any(row["where"] == "modal" and row["status"] == "running" for row in rows):
        sys.stdout.write(
            "note    on modal `running` is as last known: composer-replication runs fetch ID asks\n"
        )


def _line(row: Mapping[str, object]) -> tuple[object, str, str, object, str]:
    job_id = str(row["job_id"] or "-")
    return row["status"], str(row["where"]), job_id, row.get("cost_usd"), str(row["folder"])


def _logs(options: argparse.Namespace, record: "LaunchRecord") -> Answer:
    if record.where == "local":
        raise InputError(
            f"{record.job_id} ran on this machine and printed where it was started; its figures "
            f"are in {record.folder}/metrics.jsonl."
        )
    _print_all(options, follow(record))
    return _as_json(record), 0


def _cancel(options: argparse.Namespace, record: "LaunchRecord") -> Answer:
    from composer_replication.launch.records import save_record
    from composer_replication.runs.process_age import is_alive

    if record.where == "modal":
        return cancel_job(record, lambda text: _say(options, text))
    if record.pid is None or not is_alive(record.pid) or record.status != "running":
        raise InputError(f"{record.job_id} is not running, so there is nothing to end.")
    os.kill(record.pid, signal.SIGINT)
    record.status = "cancelled"
    save_record(RUNS_FOLDER, record)
    _say(options, f"cancelled {record.job_id}")
    return _as_json(record), 0


def _fetch(options: argparse.Namespace, record: "LaunchRecord") -> Answer:
    if record.where == "local":
        raise InputError(f"{record.job_id} ran on this machine: its files are in {record.folder}.")
    return fetch_job(record, lambda text: _say(options, text))


def _resume(options: argparse.Namespace, record: "LaunchRecord") -> Answer:
    from pathlib import Path

    from composer_replication.launch.function_spec import function_spec
    from composer_replication.launch.local import run_local
    from composer_replication.launch.records import load_job, run_status, save_record

    if record.status == "passed":
        raise InputError(
            f"{record.job_id} has passed: its files are in {record.folder}, and there is nothing "
            "to go on with."
        )
    job = load_job(RUNS_FOLDER, record.job_id)
    if record.where == "local":
        if options.set:
            raise InputError(
                f"--set {options.set[0]}: {record.job_id} runs on this machine, where no limit of "
                "[modal] holds. Leave --set out."
            )
        ending = run_local(job, Path(record.folder), output=2 if options.json else None)
        record.status = run_status(Path(record.folder)) or "failed"
        save_record(RUNS_FOLDER, record)
        return _as_json(record), max(ending.exit_code, int(ending.exit_code != 0))
    if record.status == "running":
        raise InputError(
            f"{record.job_id} is still running, and twice in one folder would mix. Bring it home "
            f"with: composer-replication runs fetch {record.job_id}"
        )
    if record.status == "launching":
        end_orphan(record)
    if options.budget is not None:
        record.budget_usd = budget_usd(options.budget)
    job = with_other_limits(job, record, options.set)
    assert record.worst_usd is not None
    if not ask(options, f"Spend at most {record.worst_usd:.2f} USD more on {record.job_id}?"):
        _say(options, "Nothing was sent.")
        return _as_json(record), 0
    spec = function_spec(job, hub_secret=record.hub_secret, region=record.region)
    return carry_out_on_modal(
        job, spec, record, detaches=False, say=lambda text: _say(options, text)
    )


def _print_all(options: argparse.Namespace, texts: Iterable[str]) -> None:
    stream = sys.stderr if options.json else sys.stdout
    for text in texts:
        stream.write(text)
        stream.flush()


def _say(options: argparse.Namespace, text: str) -> None:
    stream = sys.stderr if options.json else sys.stdout
    stream.write(text + "\n")
    stream.flush()


def _as_json(record: "LaunchRecord") -> str:
    return record.model_dump_json(by_alias=True, indent=2)


RUNS = Verb(
    name="runs",
    summary="launched jobs: list, logs, cancel, fetch, resume",
    purpose="Lists launched jobs, follows, ends, fetches or resumes one.",
    epilog=_EPILOG,
    options=(
        Option("--yes", None, "resume: spend without asking", "switch"),
        Option("--budget", "USD", "resume: another cap, on all that the job has cost and may cost"),
        Option(
            "--set", "KEY=VALUE", "resume: another limit, such as modal.timeout_s=7200", "repeated"
        ),
        JSON,
    ),
    carry_out=_runs,
    argument=Argument("action", "ACTION", is_required=True, kind="text"),
    second=Argument("job_id", "ID", is_required=False, kind="text"),
    computes=False,
)
