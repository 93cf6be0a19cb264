"""What is kept on disk of every launched job, so that it can be found, ended and gone on with."""

import contextlib
import json
import socket
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from composer_replication.errors import InputError, RunDirectoryError, nearest
from composer_replication.launch.job import Job
from composer_replication.runs.atomic_files import write_text_atomically
from composer_replication.runs.process_age import is_alive
from composer_replication.runs.run_directory import SCHEMA_FILE, SUMMARY_FILE
from composer_replication.runs.run_lock import OWNER_FILE

RECORDS_FOLDER = ".jobs"
"""In the folder of runs."""

Status = Literal["launching", "running", "passed", "failed", "stopped", "cancelled", "killed"]


class LaunchRecord(BaseModel):
    """One launched job: where it went, under which ids, and what it may cost.

    Example:
        >>> LaunchRecord(job_id="a", verb="train", where="local", folder="runs/a", created_s=0.0)
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    """Version of this layout."""
    job_id: str
    """Names the record, and on Modal the folder in the volume."""
    verb: str
    """What it carries out."""
    where: Literal["local", "modal"]
    """The machine."""
    folder: str
    """Run directory here; of a remote job once it is fetched."""
    status: Status = "launching"
    """As last known."""
    sweep: str | None = None
    """Id of the sweep that it is a member of; null: none."""
    created_s: float
    """Unix time of the launch."""
    sent_s: float | None = None
    """Unix time at which the newest call was sent; null: none was."""
    pid: int | None = None
    """Of a local process."""
    app_id: str | None = None
    """Modal's, `ap-...`."""
    call_id: str | None = None
    """Modal's, `fc-...`."""
    url: str | None = None
    """The app's page."""
    gpu: str | None = None
    """The card asked for."""
    usd_per_hour: float = 0.0
    """Of the whole container."""
    expected_usd: float | None = None
    """As planned; null: not known."""
    worst_usd: float | None = None
    """Of every attempt."""
    cost_usd: float | None = None
    """What it cost; null until that is known."""
    spent_before_usd: float = 0.0
    """What the calls before the newest one cost."""
    budget_usd: float | None = None
    """The cap; null: none."""
    ledger: str | None = None
    """File of the accounts that count against the cap."""
    region: str | None = None
    """Asked for; null: any."""
    hub_secret: str | None = None
    """Name of the secret that holds `HF_TOKEN`."""
    moved: dict[str, str] = Field(default_factory=dict[str, str])
    """Keys of the configuration whose path is another there, with the path here."""


def save_record(runs: Path, record: LaunchRecord, job: Job | None = None) -> None:
    """Write the record, and with `job` what is needed to launch it again."""
    folder = runs / RECORDS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    if job is not None:
        write_text_atomically(folder / f"{record.job_id}.job", json.dumps(job.to_payload()))
    text = record.model_dump_json(by_alias=True, indent=2)
    write_text_atomically(folder / f"{record.job_id}.json", text + "\n")


def load_record(runs: Path, job_id: str) -> LaunchRecord:
    """The record of that id.

    Raises:
        InputError: there is none.
        RunDirectoryError: it cannot be read.
    """
    path = runs / RECORDS_FOLDER / f"{job_id}.json"
    if not path.is_file():
        records = load_records(runs)
        sweeps = {record.sweep for record in records if record.sweep is not None}
        known = [*(record.job_id for record in records), *sweeps]
        hint = nearest(job_id, known) if known else f"{runs} has none: launch with --on."
        raise InputError(f"No launched job has the id {job_id!r}. {hint}")
    return _read(path)


def load_job(runs: Path, job_id: str) -> Job:
    """What was launched under that id."""
    path = runs / RECORDS_FOLDER / f"{job_id}.job"
    return Job.from_payload(json.loads(path.read_text(encoding="utf-8")))


def load_records(runs: Path) -> list[LaunchRecord]:
    """Every launched job, the oldest first; records of another version are passed over."""
    records: list[LaunchRecord] = []
    for path in (runs / RECORDS_FOLDER).glob("*.json"):
        with contextlib.suppress(RunDirectoryError):
            records.append(_read(path))
    return sorted(records, key=lambda record: record.created_s)


def members_of(runs: Path, sweep_id: str) -> list[LaunchRecord]:
    """The members of a sweep that were launched, the oldest first; none: no such sweep."""
    return [record for record in load_records(runs) if record.sweep == sweep_id]


def newest_record_of(runs: Path, folder: Path) -> LaunchRecord | None:
    """The last job that was launched with that run directory."""
    place = folder.resolve()
    found = [record for record in load_records(runs) if Path(record.folder).resolve() == place]
    return found[-1] if found else None


def refuse_launched(runs: Path, folder: Path) -> None:
    """A folder that a job on Modal will be brought home to is not for another run.

    Raises:
        RunDirectoryError: such a job is under way.
    """
    record = newest_record_of(runs, folder)
    if record is None or record.where == "local" or record.status not in ("launching", "running"):
        return
    raise RunDirectoryError(
        f"{folder} is where {record.job_id} comes home, which is {record.status} on Modal. Two "
        "runs in one folder would mix. Choose another --out, or first `composer-replication runs "
        f"fetch {record.job_id}`."
    )


def run_status(folder: Path) -> Status | None:
    """What a run directory on this machine says; None where there is no run."""
    if not (folder / SCHEMA_FILE).is_file():
        return None
    if _owner_is_alive(folder):
        return "running"
    try:
        summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "killed"
    except (ValueError, UnicodeDecodeError):
        return "failed"
    return summary.get("status", "failed")


def _owner_is_alive(folder: Path) -> bool:
    """Whether the process that wrote itself down as the holder of the lock still runs."""
    try:
        owner = json.loads((folder / OWNER_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return owner["host"] != socket.gethostname() or is_alive(owner["pid"])


def _read(path: Path) -> LaunchRecord:
    try:
        return LaunchRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise RunDirectoryError(
            f"{path} is not a record that this version reads ({type(error).__name__}). Use the "
            "version that launched the job, or delete that file to forget it."
        ) from None
