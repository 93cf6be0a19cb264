"""`--on local`: the job as a process of its own, one for each card where there are several."""

import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from composer_replication.launch.job import Job, command_line
from composer_replication.launch.processes import Ending, run_process


def run_local(
    job: Job,
    folder: Path,
    *,
    output: IO[bytes] | int | None = None,
    environment: Mapping[str, str] | None = None,
    stops: threading.Event | None = None,
    on_start: Callable[[int], None] | None = None,
) -> Ending:
    """Carry the job out in the run directory `folder` and wait for its end.

    Args:
        job: finds its files relative to this process's working directory.
        folder: new, or what an earlier attempt left.
        output: takes what it prints; None: the terminal does.
        environment: added to this process's own.
        stops: set by another thread: ends it as Ctrl-C does.
        on_start: told the process id.
    """
    return run_process(
        command_line(job, folder),
        environment=environment,
        output=output,
        deadline_s=job.deadline_s,
        stops=stops,
        on_start=on_start,
    )


def num_local_gpus() -> int:
    """CUDA cards that a process here would see; asks the driver's tool, not torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
