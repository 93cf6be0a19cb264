"""`runs`: the jobs that were launched, and what can be done about each by its id."""

import argparse
import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING

from composer_replication.cli.modal_calls import (
    ask,
    bring_home_priced,
    carry_out_on_modal,
    end_orphan,
    finish,
    result_of,
    settle_without_result,
)
from composer_replication.cli.modal_run import budget_usd
from composer_replication.cli.recorded_run import RUNS_FOLDER
from composer_replication.cli.resumed_limits import with_other_limits
from composer_replication.cli.verb import JSON, Answer, Argument, Option, Verb
from composer_replication.errors import (
    InputError,
    LaunchError,
    UnreachableError,
    nearest,
)

if TYPE_CHECKING:
    from composer_replication.launch.records import LaunchRecord

_ASK_S = 1.0
"""How long a call's result is waited for that may not be there."""

_ACTIONS = ("list", "logs", "cancel", "fetch", "resume")

_EPILOG = """\
actions:
  list        every launched job, and every run directory in runs/
  logs ID     what the job has printed, and prints until it ends
  cancel ID   end it; what it committed stays
  fetch ID    bring its run directory home and settle what it cost
  resume ID   go on from its newest checkpoint, under the cap that it was launched with or --budget

examples:
  composer-replication runs list
  composer-replication runs resume first-3f2a1b --yes

exit codes: 0 done, 1 failed, 2 your input"""


def _runs(options: argparse.Namespace) -> Answer:
    from composer_replication.launch.records import load_record

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
    record = load_record(RUNS_FOLDER, options.job_id)
    actions = {"logs": _logs, "cancel": _cancel, "fetch": _fetch, "resume": _resume}
    return actions[options.action](options, record)


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
    known = {str(Path(record.folder).resolve()) for record in records}
    for folder in sorted(RUNS_FOLDER.glob("*")):
        status = run_status(folder) if folder.is_dir() else None
        if status is not None and str(folder.resolve()) not in known:
            rows.append({"job_id": None, "where": "local", "folder": str(folder), "status": status})
    if not options.json:
        for row in rows:
            cost = row.get("cost_usd")
            usd = "-" if cost is None else f"{cost:.4f}"
            job_id = row["job_id"] or "-"
            line = f"{row['status']!s:<10} {row['where']:<6} {job_id:<28} {usd:>8} {row['folder']}"
            sys.stdout.write(line + "\n")
        if not rows:
            sys.stdout.write(f"{RUNS_FOLDER} holds no run.\n")
    return to_json_text({"schema": 1, "runs": rows}, indent=2), 0


def _logs(_: argparse.Namespace, record: "LaunchRecord") -> Answer:
    from composer_replication.launch import modal_job

    if record.call_id is None:
        raise InputError(
            f"{record.job_id} ran on this machine and printed where it was started; its figures "
            f"are in {record.folder}/metrics.jsonl."
        )
    for text in modal_job.stream_logs(record.call_id):
        sys.stdout.write(text)
        sys.stdout.flush()
    return _as_json(record), 0


def _cancel(options: argparse.Namespace, record: "LaunchRecord") -> Answer:
    from composer_replication.launch import modal_job
    from composer_replication.launch.records import is_alive, save_record

    if record.where == "local":
        if record.pid is None or not is_alive(record.pid) or record.status != "running":
            raise InputError(f"{record.job_id} is not running, so there is nothing to end.")
        os.kill(record.pid, signal.SIGINT)
    elif record.status == "launching":
        end_orphan(record)
    elif record.call_id is None or record.status != "running":
        raise InputError(f"{record.job_id} is {record.status}, so there is nothing to end.")
    else:
        modal_job.check_credentials()
        modal_job.check_reachable()
        with contextlib.suppress(TimeoutError):
            result = result_of(record, _ASK_S)
            _say(options, f"{record.job_id} had ended before.")
            return finish(record, result, lambda text: _say(options, text))
        modal_job.cancel(record.call_id)
        settle_without_result(record)
    record.status = "cancelled"
    save_record(RUNS_FOLDER, record)
    _say(options, f"cancelled {record.job_id}")
    return _as_json(record), 0


def _fetch(options: argparse.Namespace, record: "LaunchRecord") -> Answer:
    from composer_replication.launch import modal_job

    if record.where == "local":
        raise InputError(f"{record.job_id} ran on this machine: its files are in {record.folder}.")
    modal_job.check_credentials()
    modal_job.check_reachable()
    is_news = record.status == "running"
    if record.call_id is not None and record.status != "cancelled":
        try:
            result = result_of(record, _ASK_S)
        except TimeoutError:
            raise LaunchError(
                f"{record.job_id} is still running. Look at it with `composer-replication runs "
                f"logs {record.job_id}`, or end it with `composer-replication runs cancel "
                f"{record.job_id}`."
            ) from None
        except (UnreachableError, InputError):
            raise
        except LaunchError:
            if is_news:
                with contextlib.suppress(InputError):
                    bring_home_priced(record)
                raise
        else:
            return finish(record, result, lambda text: _say(options, text))
    num_files = bring_home_priced(record)
    _say(options, f"files   {num_files} in {record.folder}")
    return _as_json(record), 0


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
