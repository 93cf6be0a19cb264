"""`--on`: a verb's run carried out by a process of its own, here or elsewhere."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from composer_replication.cli.recorded_run import EXIT_CODES, RUNS_FOLDER, open_run
from composer_replication.cli.verb import EXIT_FAILED, EXIT_STOPPED, Answer, Option
from composer_replication.errors import InputError, nearest

if TYPE_CHECKING:
    from composer_replication.config.run_config import RunConfig
    from composer_replication.launch.job import Job

_MODAL_NAMES = ("gpu", "budget", "yes", "dry_run", "detach", "hub_secret", "ledger")

PLACES = ("local", "modal")
MODAL_PREFIX = "modal."
"""Of the overrides that set limits of `[modal]`."""

ON = Option("--on", "WHERE", "local: in a process of its own; modal: on a rented card")


def is_elsewhere(options: argparse.Namespace, *, may_dry_run: bool = False) -> bool:
    """Whether the run is for another process than this one.

    Args:
        options: of the verb.
        may_dry_run: it shows what it would do on this machine, too.

    Raises:
        InputError: a place that does not exist, or options of Modal's without it.
    """
    names = [name for name in _MODAL_NAMES if not (may_dry_run and name == "dry_run")]
    flags = [f"--{name.replace('_', '-')}" for name in names if vars(options).get(name)]
    if flags and options.on != "modal":
        raise InputError(
            f"{flags[0]} says how a run is carried out on Modal, and --on modal is not given. "
            "Add it, or leave the option out: a run here costs nothing."
        )
    if options.on is None:
        return False
    if options.on in PLACES:
        return True
    raise InputError(f"--on is {options.on!r}, which is no place. {nearest(options.on, PLACES)}")


def run_elsewhere(
    verb: Literal["smoke", "train"],
    options: argparse.Namespace,
    config: "RunConfig",
    overrides: Sequence[str],
) -> Answer:
    """Carry the verb out where `--on` says."""
    if options.on == "modal":
        from composer_replication.cli.modal_run import run_on_modal

        return run_on_modal(verb, options, config, overrides)
    return run_on_local(verb, options, config, overrides)


def run_on_local(
    verb: str, options: argparse.Namespace, config: "RunConfig", overrides: Sequence[str]
) -> Answer:
    """Carry the verb out in a process of its own and answer with its summary.

    Args:
        verb: `smoke` or `train`.
        options: `config`, `out`, `resume` and `json`.
        config: resolved; names the folder.
        overrides: `KEY=VALUE`, what the verb's own options set included.
    """
    from composer_replication.launch.job import Job, new_job_id
    from composer_replication.launch.local import num_local_gpus

    # Refuses a folder in use or with results here, where nothing has been started.
    with open_run(options, config.name) as run:
        folder = run.path
    job = Job(
        job_id=new_job_id(config.name),
        verb=verb,
        arguments=verb_arguments(options.config, overrides),
        num_processes=max(num_local_gpus(), 1),
    )
    return run_job_on_local(job, folder, options)


def run_job_on_local(job: "Job", folder: Path, options: argparse.Namespace) -> Answer:
    """Carry a job out in a process of its own, on record, and answer with its summary.

    Args:
        job: of one of the verbs that fill a run directory.
        folder: its run directory, which was opened before and so is free.
        options: `json`.
    """
    import time

    from composer_replication.launch.local import run_local
    from composer_replication.launch.records import LaunchRecord, run_status, save_record

    # An earlier attempt's would be read as this one's if it dies.
    (folder / "summary.json").unlink(missing_ok=True)
    record = LaunchRecord(
        job_id=job.job_id,
        verb=job.verb,
        where="local",
        folder=str(folder),
        status="running",
        created_s=time.time(),
    )

    def note_pid(pid: int) -> None:
        record.pid = pid
        save_record(RUNS_FOLDER, record, job)

    # On stdout --json allows one object and nothing else.
    ending = run_local(job, folder, output=2 if options.json else None, on_start=note_pid)
    record.status = run_status(folder) or "failed"
    save_record(RUNS_FOLDER, record)
    return _answer(folder, ending.exit_code)


def verb_arguments(config: Path | None, overrides: Sequence[str]) -> tuple[str, ...]:
    """The verb's own arguments: the file, then every override."""
    sets = [part for override in overrides for part in ("--set", override)]
    return (*([str(config)] if config is not None else []), *sets)


def _answer(folder: Path, exit_code: int) -> Answer:
    """The run's summary; one that says so where it left none."""
    from composer_replication.runs.summary import Summary

    path = folder / "summary.json"
    if path.is_file():
        text = path.read_text(encoding="utf-8").rstrip()
        status = Summary.model_validate_json(text).status
        return text, exit_code if exit_code >= 0 else EXIT_CODES[status]
    stopped = exit_code == EXIT_STOPPED
    problem = f"The run's process ended with {exit_code} and left no summary in {folder}."
    summary = Summary(status="stopped" if stopped else "failed", error=problem)
    if not stopped:
        sys.stderr.write(f"error: {problem}\n")
    return summary.to_json(), exit_code if exit_code > 0 else EXIT_FAILED
