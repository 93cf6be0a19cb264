"""Runs one program confined, watches it from outside, and stops it at its limits."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import BinaryIO, Self, cast

import psutil

from composer_replication.environments.sandbox.launching import (
    Mechanism,
    launch_command,
    program_environment,
    read_paths,
)
from composer_replication.environments.sandbox.sandbox_limits import (
    ConfinedResult,
    Ending,
    SandboxLimits,
)
from composer_replication.errors import DataError, SandboxUnavailableError

_LOOK_S = 0.05
"""Seconds between two looks at what the program's processes use."""
_MIB, _KIB = 1 << 20, 1 << 10


def run_confined(
    argv: Sequence[str],
    *,
    mechanism: Mechanism,
    limits: SandboxLimits,
    files: Mapping[str, str] | None = None,
    stdin: str = "",
) -> ConfinedResult:
    """Run a program to its end, or to a limit; nothing it started is left afterwards.

    Example: `run_confined([sys.executable, "-I", "main.py"], files={"main.py": code}, ...)`.

    Args:
        argv: the program with its absolute path, and its arguments.
        mechanism: how it is confined; `choose_mechanism` finds one.
        limits: what it may use.
        files: name -> text of files put into its working folder.
        stdin: what it can read.

    Raises:
        SandboxUnavailableError: the program could not be confined, so it did not run.
        DataError: a file name with a folder in it, or a text that UTF-8 cannot hold.
    """
    with ConfinedProcess(argv, mechanism=mechanism, limits=limits, files=files, stdin=stdin) as run:
        return run.wait()


class ConfinedProcess:
    """One running program; leaving the `with` block stops it and everything it started.

    Start it and wait for it in the same thread: the kernel ends the program with that thread.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        mechanism: Mechanism,
        limits: SandboxLimits,
        files: Mapping[str, str] | None = None,
        stdin: str = "",
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Start the program; see `run_confined`. It inherits `pass_fds` under their numbers."""
        self._limits = limits
        self._mechanism = mechanism
        self._stop_asked = threading.Event()
        _check_files(files or {})
        # Under a confining mechanism this stays empty: the program's folder lies over it.
        self._host_folder = tempfile.TemporaryDirectory(
            prefix="composer-sandbox-", ignore_cleanup_errors=True
        )
        folder = self._host_folder.name
        self._ready, ready_fd = os.pipe()
        order = {
            "argv": list(argv),
            "environment": program_environment(folder),
            "files": dict(files or {}),
            "folder": folder,
            "folder_mib": limits.folder_mib,
            "memory_mib": limits.memory_mib,
            "num_processes": limits.num_processes,
            "read_paths": read_paths(),
            "ready_fd": ready_fd,
            "stdin": stdin,
            "wall_s": limits.wall_s,
        }
        self._started = time.monotonic()
        try:
            # A file and not a pipe: a child that dies early cannot block this process.
            with tempfile.TemporaryFile() as given:
                given.write(json.dumps(order).encode())
                given.seek(0)
                self._process = subprocess.Popen(
                    launch_command(mechanism, folder, limits),
                    stdin=given,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env={},
                    cwd="/",
                    start_new_session=True,
                    pass_fds=(ready_fd, *pass_fds),
                )
        except OSError as error:
            os.close(self._ready)
            self._host_folder.cleanup()
            raise SandboxUnavailableError(f"The sandbox did not start: {error}.") from error
        finally:
            os.close(ready_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._kill()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
        os.close(self._ready)
        self._host_folder.cleanup()

    def stop(self) -> None:
        """Make `wait`, in whichever thread it runs, stop the program."""
        self._stop_asked.set()

    def wait(self) -> ConfinedResult:
        """Wait until the program ends or reaches a limit, and stop it there.

        Raises:
            SandboxUnavailableError: the program could not be confined, so it did not run.
        """
        ending, outputs = self._watch()
        self._kill()
        code = self._process.returncode if ending == "exit" else None
        texts = [output.decode("utf-8", errors="replace") for output in outputs]
        if os.read(self._ready, 5) != b"ready" and ending == "exit":
            reason = (texts[1].strip().splitlines() or [f"exit code {code}"])[-1]
            raise SandboxUnavailableError(
                f"{self._mechanism.value} could not confine the program, so it did not run: "
                f"{reason}."
            )
        if code is not None and code < 0:
            code = 128 - code
        return ConfinedResult(ending, code, *texts, wall_s=time.monotonic() - self._started)

    def _watch(self) -> tuple[Ending, list[bytearray]]:
        outputs = [bytearray(), bytearray()]
        with selectors.DefaultSelector() as selector:
            for stream, output in zip(self._streams(), outputs, strict=True):
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, selectors.EVENT_READ, output)
            next_look = 0.0
            while self._process.poll() is None or selector.get_map():
                for key, _ in selector.select(_LOOK_S):
                    piece = os.read(key.fd, 1 << 16)
                    if not piece:
                        selector.unregister(key.fileobj)
                    key.data.extend(piece)
                    if len(key.data) > self._limits.output_kib * _KIB:
                        return "output", outputs
                now = time.monotonic()
                if self._stop_asked.is_set():
                    return "stopped", outputs
                if now - self._started > self._limits.wall_s:
                    return "timeout", outputs
                if now > next_look:
                    next_look = now + _LOOK_S
                    reached = self._reached_limit()
                    if reached is not None:
                        return reached, outputs
                if self._process.poll() is not None and not selector.select(0):
                    # An unconfined child that outlives its parent may hold the streams open.
                    break
        return "exit", outputs

    def _streams(self) -> tuple[BinaryIO, BinaryIO]:
        out, error = self._process.stdout, self._process.stderr
        assert out is not None
        assert error is not None
        return cast(BinaryIO, out), cast(BinaryIO, error)

    def _reached_limit(self) -> Ending | None:
        family = self._family()
        # The kernel counts for other users; it never counts the administrator's processes. First,
        # for where they multiply they take the memory too, and each look at it lets them go on.
        if len(family) > self._limits.num_processes + 4:
            return "processes"
        num_bytes = 0
        for process in family:
            with contextlib.suppress(psutil.Error):
                num_bytes += process.memory_info().rss
        return "memory" if num_bytes > self._limits.memory_mib * _MIB else None

    def _family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            own = psutil.Process(self._process.pid)
            return [own, *own.children(recursive=True)]
        return []

    def _kill(self) -> None:
        """End the process group, and with process 1 of its namespace all that it started."""
        family = self._family()
        with contextlib.suppress(ProcessLookupError):
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
        for process in family[1:]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.wait()


def _check_files(files: Mapping[str, str]) -> None:
    for name, text in files.items():
        if "/" in name or name in ("", ".", ".."):
            raise DataError(
                f"{name!r} cannot be a file of the sandbox: all of them lie in one folder. "
                "Give a plain name, such as 'main.py'."
            )
        if not is_utf8(text):
            raise DataError(
                f"{name!r} cannot be a file of the sandbox: it holds half of a surrogate pair. "
                "Give text that UTF-8 can hold."
            )


def is_utf8(text: str) -> bool:
    """Whether a file can hold it; half of a surrogate pair cannot be written."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
