"""Phases of a run that its trainer does not time: the process's start and the fetched model."""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from composer_replication.training.model_source import LoadedModel


def cold_start_s() -> float | None:
    """Seconds since this process started: interpreter, imports, command line; None off Linux."""
    if sys.platform != "linux":
        return None
    # Field 22 of the line, counted after the name, which may hold spaces.
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s


def download_s(loaded: "LoadedModel") -> float | None:
    """0 where the weights were here already; None where `load` fetched them too."""
    return 0.0 if loaded.had_weights else None
