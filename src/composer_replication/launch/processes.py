"""One process: started, watched, ended in time, and never left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

GRACE_S = 30.0
"""Between the request to end and the kill: enough to write a summary."""

POLL_S = 0.05

_GUARD = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, 15)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Asks Linux to end the process (15 is SIGTERM) when its parent is gone (1 is PR_SET_PDEATHSIG),
lets it hear of Ctrl-C again (a background job of a shell ignores that, and so would all it starts),
then becomes the command. A program of its own, as code between fork and exec may not run beside
threads."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a process ended.

    Example: `Ending(0, "exit", 12.5)`.
    """

    exit_code: int
    """Negative: the number of the signal that ended it."""
    cause: Literal["exit", "deadline", "interrupt"]
    """`deadline`: it was still running then. `interrupt`: Ctrl-C."""
    wall_s: float


def run_process(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    output: IO[bytes] | int | None = None,
    deadline_s: float | None = None,
    tick: Callable[[], None] | None = None,
    stops: threading.Event | None = None,
    on_start: Callable[[int], None] | None = None,
    grace_s: float = GRACE_S,
) -> Ending:
    """Run a command to its end, or to the deadline, and say how it ended.

    The process dies with the thread that called this, even if that is killed: a run without its
    launcher would hold its folder's lock, and on a rented machine cost money.

    Args:
        command: program and arguments.
        environment: added to this process's own.
        folder: working directory; None: this process's.
        output: takes what the process prints; None: it prints where this one does.
        deadline_s: Unix time at which it is asked to end, and killed `grace_s` later.
        tick: called about every `POLL_S` seconds.
        stops: set by another thread: ends it as Ctrl-C does.
        on_start: told the process id.
        grace_s: seconds between the request and the kill.
    """
    started_s = time.monotonic()
    guard = [sys.executable, "-I", "-S", "-c", _GUARD] if sys.platform == "linux" else []
    process = subprocess.Popen(
        [*guard, *command],
        cwd=folder,
        env={**os.environ, **(environment or {})},
        stdout=output,
        stderr=subprocess.STDOUT if output is not None else None,
        # In the terminal's own group it would hear of Ctrl-C twice, and end without its summary.
        process_group=0,
    )
    cause: Literal["exit", "deadline", "interrupt"] = "exit"
    try:
        if on_start is not None:
            on_start(process.pid)
        while process.poll() is None:
            if deadline_s is not None and time.time() >= deadline_s:
                cause = "deadline"
            elif stops is not None and stops.is_set():
                cause = "interrupt"
            if cause != "exit":
                _end(process, grace_s)
                break
            if tick is not None:
                tick()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_S)
    except KeyboardInterrupt:
        cause = "interrupt"
        _end(process, grace_s)
    except BaseException:
        _kill(process)
        raise
    return Ending(process.returncode, cause, time.monotonic() - started_s)


def _end(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """Ask, wait, kill; a second Ctrl-C kills at once."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(grace_s)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End it and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
