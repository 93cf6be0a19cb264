"""Time and memory of one step: seconds, processor seconds, and peaks by tensors and by the system.

glibc must keep its heap (`PROCESS_ENV`), so that a large tensor's pages are faulted in once and not
at each use; before a peak is read, what is free of it goes back to the system.
"""

import ctypes
import gc
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from composer_replication.allocator_settings import ALLOCATOR_SETTINGS
from composer_replication.training.tensor_memory import TensorMemory

PROCESS_ENV = {
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    **ALLOCATOR_SETTINGS,
}

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Peaks:
    """The most that a step held, in GiB, above what was there before it."""

    above_model: float
    """The operating system's count on a CPU, the allocator's on CUDA; gradients included."""
    process: float
    """The same with all that was there before: weights, libraries, the reference's gradients."""
    tensors: float
    """Tensors that the step made, alone; temporaries inside a kernel are not seen on a CPU."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """How long a step took."""

    wall: float
    processor: float
    """Over all threads: hardly moved by what else the machine does."""


def timed(run: Callable[[], object], device: torch.device) -> Seconds:
    """One run, to the end of its work on the device."""
    _synchronize(device)
    start, start_processor = time.perf_counter(), time.process_time()
    run()
    _synchronize(device)
    return Seconds(time.perf_counter() - start, time.process_time() - start_processor)


def peaks_of(run: Callable[[], object], device: torch.device, held: Iterable[Tensor]) -> Peaks:
    """What one run holds at most.

    Args:
        run: the step.
        device: that it runs on.
        held: tensors that were there before; a view of one would count as new otherwise.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        peak = torch.cuda.max_memory_allocated(device)
        return Peaks((peak - before) / _GIB, peak / _GIB, (peak - before) / _GIB)
    # What stays is left out of later collections: walking all libraries takes a second each.
    gc.freeze()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before_gib = _status_gib("VmRSS")
    tensors = TensorMemory(held=held)
    held_bytes = tensors.live_bytes
    with tensors:
        run()
    peak_gib = _status_gib("VmHWM")
    return Peaks(peak_gib - before_gib, peak_gib, (tensors.peak_bytes - held_bytes) / _GIB)


@contextmanager
def memory_limit(limit_gib: float, device: torch.device) -> Iterator[None]:
    """Allocations beyond the limit fail as out of memory, instead of the process being killed."""
    if device.type == "cuda":
        share = limit_gib / (torch.cuda.mem_get_info(device)[1] / _GIB)
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit_gib * _GIB), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def free_gib(device: torch.device) -> float:
    """Memory that this process has or may still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] / _GIB
    return (psutil.virtual_memory().available + psutil.Process().memory_info().rss) / _GIB


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """The rate of a matrix product, the best of a few.

    On a CPU it has the model's own size. On CUDA it fills the device, and several in a row are
    timed, so that launching them costs nothing.
    """
    on_cuda = device.type == "cuda"
    num_rows, width, num_out = (8192, 8192, 8192) if on_cuda else (2048, width, 4 * width)
    num_products = 10 if on_cuda else 1
    rows = torch.randn(num_rows, width, device=device, dtype=dtype)
    weight = torch.randn(num_out, width, device=device, dtype=dtype)

    def multiply() -> None:
        for _ in range(num_products):
            _ = rows @ weight.t()

    best_s = min(timed(multiply, device).wall for _ in range(8))
    return 2 * rows.numel() * num_out * num_products / best_s


def machine_name(device: torch.device) -> str:
    """What the numbers were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{psutil.cpu_count()}-core CPU"


def _status_gib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError(f"/proc/self/status has no {field}; memory is measured on Linux alone.")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
