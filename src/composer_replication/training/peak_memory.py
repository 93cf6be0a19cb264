"""The most memory that a process has taken, as its device or its operating system counts it."""

import resource
import sys

import torch

from composer_replication.units import gib


def peak_gib(device: torch.device) -> float:
    """The allocator's peak on CUDA, the process's peak resident size on CPU."""
    if device.type == "cuda":
        return gib(torch.cuda.max_memory_allocated(device))
    return gib(_peak_resident_bytes())


def peak_reserved_gib(device: torch.device) -> float | None:
    """The most that CUDA's caching allocator held; None on CPU, which has no such pool."""
    return gib(torch.cuda.max_memory_reserved(device)) if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    """Forget the peaks so far on CUDA; the operating system keeps a process's peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_resident_bytes() -> int:
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
