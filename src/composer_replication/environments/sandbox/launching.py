"""The command that starts a confined program, and what such a program can read."""

import shutil
import sys
from enum import Enum
from pathlib import Path

from composer_replication.environments.sandbox.sandbox_limits import SandboxLimits

CONFINE_SCRIPT = Path(__file__).with_name("confine.py")

_MIB = 1 << 20
_SYSTEM_PATHS = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


class Mechanism(Enum):
    """How a program is confined, strongest first."""

    BUBBLEWRAP = "bubblewrap"
    LANDLOCK = "landlock"
    UNSAFE = "unsafe"
    """Limits of size and time only: the program reads, writes and sends what this user can."""


def launch_command(mechanism: Mechanism, folder: str, limits: SandboxLimits) -> list[str]:
    """The command that reads an order on stdin, confines itself and becomes the program.

    Args:
        mechanism: how.
        folder: an empty one of the host; a confined program finds its own in the same place.
        limits: for the size of the writable folder.
    """
    python = [sys.executable, "-I", "-S"]
    if mechanism is not Mechanism.BUBBLEWRAP:
        return [*python, str(CONFINE_SCRIPT), mechanism.value]
    options = ["--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent"]
    options += ["--uid", "65534", "--gid", "65534", "--cap-drop", "ALL", "--hostname", "sandbox"]
    for path in (*read_paths(), str(CONFINE_SCRIPT)):
        options += ["--ro-bind-try", path, path]
    for device in _DEVICES:
        options += ["--dev-bind-try", device, device]
    options += ["--size", str(limits.folder_mib * _MIB), "--tmpfs", folder]
    # The root is a file system in memory too, of any size unless it is read-only.
    options += ["--remount-ro", "/", "--chdir", folder]
    bubblewrap = shutil.which("bwrap")
    assert bubblewrap is not None, "chosen without a test"
    return [bubblewrap, *options, "--", *python, str(CONFINE_SCRIPT), "inside"]


def read_paths() -> list[str]:
    """What a confined program may read: the system's programs and this Python."""
    interpreter = Path(sys.executable)
    paths = {*_SYSTEM_PATHS, sys.prefix, sys.base_prefix, str(interpreter.resolve().parent)}
    return sorted(paths)


def program_environment(folder: str) -> dict[str, str]:
    """All environment variables of a confined program; none is inherited."""
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": folder,
        "TMPDIR": folder,
        "LANG": "C.UTF-8",
        **dict.fromkeys(threads, "1"),
    }
