"""What the allocator and OpenMP read when a process starts, set by starting it once more."""

import os
import sys

from composer_replication.allocator_settings import ALLOCATOR_SETTINGS

REEXECUTED_GUARD = "COMPOSER_REEXECUTED"


def reexecute_with_allocator_settings() -> None:
    """Replace the process once by itself, with what the allocator reads only at its start."""
    import platform

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = dict(ALLOCATOR_SETTINGS)
    if "OMP_WAIT_POLICY" in os.environ:
        # A count would take the place of what was chosen.
        del settings["GOMP_SPINCOUNT"]
    has_settings = all(name in os.environ for name in settings)
    if has_settings or REEXECUTED_GUARD in os.environ:
        return
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    environment = {**settings, **os.environ, REEXECUTED_GUARD: "1"}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
