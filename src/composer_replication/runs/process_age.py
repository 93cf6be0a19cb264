"""Of processes: how long ago this one started, before any library is imported, and who lives."""

import os
import sys
import time
from pathlib import Path


def cold_start_s() -> float | None:
    """Seconds since this process started: interpreter, imports, command line; None off Linux."""
    if sys.platform != "linux":
        return None
    # Field 22 of the line, counted after the name, which may hold spaces.
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s


def is_alive(pid: int) -> bool:
    """Whether a process of this machine has that id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
