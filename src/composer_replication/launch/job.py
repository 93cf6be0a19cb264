"""`Job`: a run as data, and the command that carries it out wherever it is."""

import base64
import re
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Self, cast

from composer_replication.errors import InputError

JOB_SCHEMA = 1

_LONGEST_NAME = 48
_NOT_IN_TAGS = re.compile(r"[^A-Za-z0-9._-]+")
"""Modal's tags have at most 63 characters, of these alone."""

MAX_FILE_BYTES = 64 * 1024**2
"""Files travel with the call; what is larger belongs on the hub."""

VOLUME_FOLDER = "remote-runs"
"""In a remote job's working directory: the run directories that earlier jobs left in the volume."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One command of this program, with what it reads and what it may use.

    Example:
        >>> Job(job_id="first-3f2a", verb="train", arguments=("run.toml",),
        ...     files={"run.toml": b'model = "org/model"'}, gpu="L4", timeout_s=1800)
    """

    job_id: str
    """Unique; names the run's folder on the machine that carries it out."""
    verb: str
    arguments: tuple[str, ...] = ()
    """What follows the verb, `--out` and `--resume` not included."""
    files: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    """By path below the working directory; empty where the run finds its files by itself."""
    gpu: str | None = None
    """As Modal's `gpu=` spells it, such as `H100!`; None: no card is asked for."""
    num_processes: int = 1
    """One for each card; above 1 they are started by `accelerate launch`."""
    cpu_cores: float = 4.0
    memory_gib: float = 16.0
    timeout_s: float | None = None
    """Longest attempt; None: no limit."""
    retries: int = 0
    """Attempts after the first."""
    deadline_s: float | None = None
    """Unix time after which nothing of the job runs, however often it was restarted."""

    def to_payload(self) -> dict[str, object]:
        """The job as values of JSON's types."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        encoded = {name: base64.b64encode(content).decode() for name, content in self.files.items()}
        return {
            "schema": JOB_SCHEMA,
            **values,
            "arguments": list(self.arguments),
            "files": encoded,
        }

    @classmethod
    def from_payload(cls, payload: Mapping[str, object]) -> Self:
        """The job that `to_payload` wrote.

        Raises:
            InputError: of another version.
        """
        values = dict(payload)
        schema = values.pop("schema", None)
        if schema != JOB_SCHEMA:
            raise InputError(
                f"The job has schema {schema!r} and this version reads {JOB_SCHEMA}. "
                "Launch it again with the version that made it."
            )
        files = cast("Mapping[str, str]", values.pop("files"))
        arguments = cast("list[str]", values.pop("arguments"))
        return cls(
            **values,  # pyright: ignore[reportArgumentType]
            arguments=tuple(arguments),
            files={name: base64.b64decode(content) for name, content in files.items()},
        )


def new_job_id(name: str) -> str:
    """`name`, as far as a tag on Modal can hold it, with a suffix that no other job has.

    Example: `new_job_id("my run")` -> `"my-run-3f2a1b"`.
    """
    return f"{_NOT_IN_TAGS.sub('-', name)[:_LONGEST_NAME]}-{secrets.token_hex(3)}"


def with_deadline(job: Job, now_s: float) -> Job:
    """The job as it is sent: nothing of it runs when all attempts could have had their time-out.

    Args:
        job: with its time-out.
        now_s: Unix time at which it is sent; what came before, an image or a question, takes time.
    """
    assert job.timeout_s is not None, "a remote job has a time-out"
    return replace(job, deadline_s=now_s + (job.retries + 1) * job.timeout_s)


def command_line(job: Job, folder: Path) -> list[str]:
    """The command that carries the job out in `folder`, or goes on with what is there."""
    if job.num_processes > 1:
        # Every value that accelerate would otherwise guess, with a warning, is given.
        starter = [
            *("-m", "accelerate.commands.launch", "--num_processes", str(job.num_processes)),
            *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--main_process_port", "0", "--module"),
        ]
    else:
        starter = ["-m"]
    program = [sys.executable, *starter, "composer_replication", job.verb]
    return [*program, *job.arguments, "--out", str(folder), "--resume"]


def write_files(job: Job, workspace: Path) -> None:
    """Lay the job's files into its working directory."""
    for name, content in job.files.items():
        path = workspace / name
        assert path.resolve().is_relative_to(workspace.resolve()), f"{name} leaves the workspace"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
