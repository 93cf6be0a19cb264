"""What the allocator and OpenMP read when a process starts, set by starting it once more."""

import os
import sys

ALLOCATOR_SETTINGS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "10000",
}
"""glibc and OpenMP read these when a process starts. With the first three freed pages are kept
instead of returned to the kernel, which made torch on CPU virtual machines 2.5 to 6 times faster.
With the fourth, threads that wait sleep: beside other busy processes spinning ones cost a factor
of 4 to 10. With the last, GNU's first spin for some 10 microseconds, about the time between two
small operations: decoding takes an eighth less on an idle machine and no more on a busy one."""

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
