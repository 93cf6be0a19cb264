"""Which of the ways to confine a program this machine has, found out by trying each once."""

import functools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

from composer_replication.environments.sandbox.confined_process import run_confined
from composer_replication.environments.sandbox.launching import Mechanism
from composer_replication.environments.sandbox.sandbox_limits import SandboxLimits
from composer_replication.errors import SandboxUnavailableError

_NEEDED_OPTIONS = ("--disable-userns", "--size")
"""What bubblewrap has since 0.8."""


def available_mechanisms() -> list[Mechanism]:
    """The safe mechanisms that work on this machine, strongest first."""
    return [name for name, problem in mechanism_problems().items() if problem is None]


def choose_mechanism(*, allow_unsafe: bool = False) -> Mechanism:
    """The strongest mechanism that works here.

    Args:
        allow_unsafe: run unconfined where no mechanism works.

    Raises:
        SandboxUnavailableError: none works, and running unconfined was not asked for.
    """
    available = available_mechanisms()
    if available:
        return available[0]
    if allow_unsafe:
        return Mechanism.UNSAFE
    reasons = "; ".join(f"{name.value}: {why}" for name, why in mechanism_problems().items())
    raise SandboxUnavailableError(
        f"This machine cannot confine model-written code ({reasons}), and unconfined it could read "
        "your files and send them away. Install bubblewrap and allow unprivileged user namespaces, "
        "run on Linux 5.13 or newer with Landlock, or pass allow_unsafe=True on a machine that "
        "holds nothing of value."
    )


@functools.cache
def mechanism_problems() -> Mapping[Mechanism, str | None]:
    """For each safe mechanism, why it does not work here; None where it does."""
    return {
        Mechanism.BUBBLEWRAP: _bubblewrap_problem(),
        Mechanism.LANDLOCK: _landlock_problem(),
    }


def _bubblewrap_problem() -> str | None:
    bubblewrap = shutil.which("bwrap")
    if bubblewrap is None:
        return "bwrap is not on the PATH"
    known = _output_of([bubblewrap, "--help"])
    missing = [option for option in _NEEDED_OPTIONS if option not in known]
    if missing:
        return f"bwrap is older than 0.8: it lacks {' and '.join(missing)}"
    return _trial_problem(Mechanism.BUBBLEWRAP)


def _landlock_problem() -> str | None:
    if sys.platform != "linux":
        return f"it needs Linux, and this is {sys.platform}"
    from composer_replication.environments.sandbox.confine import landlock_version

    if landlock_version() == 0:
        return "this kernel has no Landlock"
    return _trial_problem(Mechanism.LANDLOCK)


def _trial_problem(mechanism: Mechanism) -> str | None:
    """What is wrong with the mechanism: why nothing ran, or what a program could still do."""
    try:
        with tempfile.NamedTemporaryFile(prefix="composer-sandbox-secret-") as secret:
            result = run_confined(
                [sys.executable, "-I", "-S", "-c", _TRIAL, secret.name, "/etc/passwd"],
                mechanism=mechanism,
                limits=SandboxLimits(wall_s=20.0),
            )
    except SandboxUnavailableError as error:
        return str(error)
    if (result.ending, result.exit_code) != ("exit", 0):
        last = (result.stderr.strip().splitlines() or [result.ending])[-1]
        return f"a trial program ended with {result.exit_code} ({last})"
    leaks = result.stdout.split()
    return f"a trial program could still do this: {', '.join(leaks)}" if leaks else None


_TRIAL = r"""
import os, socket, sys
for path in sys.argv[1:]:
    try:
        open(path).close()
        print("read:" + path)
    except OSError:
        pass
for path in ("/tmp", "/var/tmp", "/dev/shm", "/usr"):
    try:
        open(path + "/composer-sandbox-trial", "w").close()
        print("write:" + path)
    except OSError:
        pass
try:
    socket.socket()
    print("network")
except OSError:
    pass
if os.getpid() > 10:
    print("processes")
"""


def _output_of(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout + done.stderr
