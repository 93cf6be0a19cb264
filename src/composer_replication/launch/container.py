"""The body of a remote job: one attempt inside a container that may vanish at any instant.

What must survive is in the runs' volume, committed whenever a checkpoint or a part of an evaluation
is complete and every half minute between. The next attempt finds it there and goes on. No dollar is
spent after the deadline, however often the platform starts the job again.
"""

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from composer_replication.errors import LaunchError
from composer_replication.launch.job import VOLUME_FOLDER, Job, command_line, write_files
from composer_replication.launch.processes import run_process
from composer_replication.planner.cost import ENDING_S, working_s
from composer_replication.runs.atomic_files import (
    NO_ROOM,
    write_bytes_atomically,
    write_text_atomically,
)
from composer_replication.runs.checkpoint_folders import checkpoint_folders
from composer_replication.runs.run_directory import (
    FIGURES_PREFIX,
    SCHEMA_FILE,
    SUMMARY_FILE,
    has_passed,
)

RESULT_SCHEMA = 1
ATTEMPTS_FOLDER = ".attempts"
"""Beside the run directories: when each attempt was alive."""

COMMIT_EVERY_S = 30.0
LONGEST_COMMIT_S = 300.0
"""No commit takes longer; a checkpoint of 7B with its optimizer is about 30 GB."""
_ENDING_S = 1.0
"""Between the body's return and the end of its container, which is billed until then."""
GRACE_S = ENDING_S / 2
"""Between asking a run to end and killing it; a preempted container has 30 s in all, and the rest
is for the last commit."""

_PROBE_BYTES = 1024**2
"""A summary and a row of metrics are smaller."""

_CGROUP_EVENTS = Path("/sys/fs/cgroup/memory.events")


@dataclass(slots=True)
class _Attempts:
    """When each attempt so far began and ended, kept in the volume; the last pair is this one.

    One that is killed cannot say when, so that while it runs its end on disk is the time until
    which it may live unseen: its next commit, begun and complete. So it counts at least its time.
    One that dies before its first commit, within seconds, leaves nothing: it is in the bill alone.
    """

    path: Path
    spans_s: list[list[float]]

    @classmethod
    def begin(cls, path: Path, started_s: float) -> "_Attempts":
        """Note a new attempt beside those before it."""
        spans = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        attempts = cls(path, [*spans, [started_s, started_s]])
        attempts.go_on(time.time())
        return attempts

    def go_on(self, now_s: float) -> None:
        """This attempt is alive, and says so again after its next commit."""
        self._write(now_s + COMMIT_EVERY_S + LONGEST_COMMIT_S)

    def end(self, now_s: float) -> None:
        """This attempt ends."""
        self._write(now_s + _ENDING_S)

    def _write(self, end_s: float) -> None:
        """A volume without room keeps the older end."""
        self.spans_s[-1][1] = end_s
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(self.path, json.dumps(self.spans_s))


def run_attempt(
    payload: Mapping[str, object], *, runs: Path, commit: Callable[[], None], booted_s: float
) -> dict[str, object]:
    """Carry the job out, or go on with it, and say how it ended.

    Args:
        payload: of a `Job`.
        runs: where the runs' volume is mounted.
        commit: makes what was written there survive this container.
        booted_s: Unix time since which the container is held.

    Returns:
        `ending` (`exit`, `deadline`, `timeout`, `out_of_memory`, `volume_full`), `exit_code`,
        `summary` and `attempts`, the Unix times between which each attempt was alive; of one that
        was killed, the latest at which it can have been.

    Raises:
        LaunchError: the run died of a signal; the platform tries again, and the run resumes.
        KeyboardInterrupt: the container is being taken away.
    """
    started_s = time.time()
    job = Job.from_payload(payload)
    folder = runs / job.job_id
    attempts = _Attempts.begin(runs / ATTEMPTS_FOLDER / f"{job.job_id}.json", booted_s)
    if has_passed(folder):
        # The platform may give a job that was done to another container.
        return _result("exit", 0, folder, attempts)
    end_s = min(job.deadline_s or float("inf"), started_s + (job.timeout_s or float("inf")))
    if started_s >= end_s:
        return _result("deadline", 1, folder, attempts)
    if job.verb in ("smoke", "train"):
        drop_half_commit(folder)
    watch = _Watch(folder, attempts, commit)
    oom_kills = _oom_kills()
    with tempfile.TemporaryDirectory() as workspace:
        write_files(job, Path(workspace))
        (Path(workspace) / VOLUME_FOLDER).symlink_to(runs, target_is_directory=True)
        ending = run_process(
            command_line(job, folder),
            environment={"PYTHONPATH": _source_path(workspace)},
            folder=Path(workspace),
            # The platform's own time-out would leave no time for a summary and a commit.
            deadline_s=started_s + working_s(end_s - started_s),
            tick=watch.tick,
            grace_s=GRACE_S,
        )
    attempts.end(time.time())
    commit()
    if ending.cause == "interrupt":
        raise KeyboardInterrupt
    if ending.cause == "deadline":
        has_had_its_time = job.timeout_s is not None and end_s - started_s > 0.9 * job.timeout_s
        is_deadline = end_s == job.deadline_s and not has_had_its_time
        return _result("deadline" if is_deadline else "timeout", 1, folder, attempts)
    if ending.exit_code < 0 and _oom_kills() > oom_kills:
        return _result("out_of_memory", 1, folder, attempts)
    if ending.exit_code != 0 and not _has_room(runs):
        # Another attempt would find it as full.
        return _result("volume_full", 1, folder, attempts)
    if ending.exit_code < 0:
        raise LaunchError(
            f"The run died of signal {-ending.exit_code}; an attempt after it goes on from its "
            "newest checkpoint."
        )
    return _result("exit", ending.exit_code, folder, attempts)


class _Watch:
    """Commits what a run has written, as it goes."""

    def __init__(self, folder: Path, attempts: _Attempts, commit: Callable[[], None]) -> None:
        self._folder = folder
        self._attempts = attempts
        self._commit = commit
        self._seen = self._progress()
        self._committed_s = time.time()
        commit()

    def tick(self) -> None:
        """Commit where a checkpoint or a part is new, or the last commit is long ago."""
        seen, now_s = self._progress(), time.time()
        if seen == self._seen and now_s - self._committed_s < COMMIT_EVERY_S:
            return
        self._seen, self._committed_s = seen, now_s
        self._attempts.go_on(now_s)
        self._commit()

    def _progress(self) -> list[Path]:
        """The newest checkpoint, and the parts that an evaluation has finished."""
        parts = sorted(self._folder.glob(f"{FIGURES_PREFIX}*.json"))
        return [*checkpoint_folders(self._folder / "checkpoints")[:1], *parts]


def ended_s(result: Mapping[str, object]) -> float:
    """Unix time at which the last attempt ended."""
    return cast("list[list[float]]", result["attempts"])[-1][1]


def held_s(result: Mapping[str, object]) -> float:
    """Seconds that containers were held for the job at most, over all its attempts.

    Example: `held_s({"attempts": [[0.0, 340.0], [50.0, 60.0]]})` -> 60.0: killed before 50.
    """
    spans = cast("list[list[float]]", result["attempts"])
    # Attempts follow one another: what was killed had ended when the next one began.
    next_s = [*(start for start, _ in spans[1:]), float("inf")]
    return sum(min(end, later) - start for (start, end), later in zip(spans, next_s, strict=True))


def _result(ending: str, exit_code: int, folder: Path, attempts: _Attempts) -> dict[str, object]:
    # The last commit took its time too.
    attempts.end(time.time())
    summary_path = folder / SUMMARY_FILE
    summary = (
        json.loads(summary_path.read_text(encoding="utf-8")) if summary_path.exists() else None
    )
    return {
        "schema": RESULT_SCHEMA,
        "ending": ending,
        "exit_code": exit_code,
        "summary": summary,
        "attempts": attempts.spans_s,
    }


def _source_path(workspace: str) -> str:
    """The job's own modules, then this package wherever it was mounted, then what was there."""
    source = Path(__file__).parents[2]
    given = os.environ.get("PYTHONPATH")
    return os.pathsep.join([workspace, str(source), *([given] if given else [])])


def _has_room(runs: Path) -> bool:
    """Whether the volume takes another file."""
    probe = runs / ".room"
    try:
        write_bytes_atomically(probe, bytes(_PROBE_BYTES))
        probe.unlink()
    except OSError as error:
        return error.errno not in NO_ROOM
    return True


def drop_half_commit(folder: Path) -> None:
    """Remove a run directory without its mark, which a run writes before anything else.

    Files of it can be in the volume where a container was killed while it committed for the first
    time; a run refuses a folder that holds something else, and every later attempt would end so.
    """
    if folder.is_dir() and not (folder / SCHEMA_FILE).exists():
        shutil.rmtree(folder)


def _oom_kills() -> int:
    """Processes that the kernel has killed for memory in this container."""
    try:
        lines = _CGROUP_EVENTS.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
