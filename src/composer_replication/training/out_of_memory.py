"""Out of memory, told as what was held, where it failed and which setting would fit.

Rows and tokens make activations; weights, gradients and the optimizer's moments stay whatever the
rows. Both are measured when the allocation fails, and a smaller setting is priced from them: a
lower bound, since the step had not reached its peak.
"""

import errno
import gc
import re
import resource
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil
import torch
from torch import nn

from composer_replication.config.run_config import RunConfig
from composer_replication.errors import MemoryLimitError
from composer_replication.training.memory_remedies import MemoryFigures, Phase, Remedy, remedies
from composer_replication.training.peak_memory import peak_gib
from composer_replication.units import gib

_FAILURES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "Cannot allocate memory",
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_ASKED = re.compile(r"[Tt]ried to allocate (?P<size>[\d.]+) ?(?P<unit>bytes|KiB|MiB|GiB)")
_UNIT_BYTES = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

_PHASES: dict[str, Phase] = {
    "load_model": "load",
    "detached_copy": "teacher copy",
    "score_references": "reference",
    "_generate_single_turn": "rollout",
    "_generate_and_score_completions": "rollout",
    "_compute_loss": "policy",
    "backward": "policy",
    "_clip_grad_norm": "optimizer",
    "save_model": "save",
    "_save_checkpoint": "save",
}
"""What a function computes for, by its name; the innermost one on the way to the failure counts."""


def memory_limit_error(error: BaseException, config: RunConfig) -> MemoryLimitError | None:
    """A failed allocation as a sentence with the setting that would fit; None for other errors."""
    return MemoryLimitError(_explain(error, config)) if is_out_of_memory(error) else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, of torch on CPU or CUDA, or of the system says so."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _FAILURES)


_WHILE: dict[Phase | None, str] = {
    "load": "while the model was loaded",
    "teacher copy": "while the weights were copied for the teacher",
    "reference": "while the pairs were scored under the reference",
    "rollout": "while rollouts were sampled",
    "teacher": "in the teacher's forward",
    "policy": "in the policy's forward or backward",
    "optimizer": "in the optimizer's step",
    "save": "while the model was saved",
    None: "outside any step",
}

# Python with torch and transformers imported, measured; CUDA's allocator does not count them.
_LIBRARIES_GIB = 0.6


@dataclass(frozen=True, slots=True)
class Room:
    """How much memory there is, whose it is, and the most that was used of it; GiB.

    Example: `Room(24.0, "this container", peak_gib=22.5, libraries_gib=0.6)`.
    """

    total_gib: float
    name: str
    peak_gib: float
    libraries_gib: float
    """What the libraries alone take of it."""


def memory_room(device: torch.device) -> Room:
    """The device's memory; for the CPU the smallest of the limits that hold for this process."""
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        return Room(gib(total), torch.cuda.get_device_name(device), peak_gib(device), 0.0)
    limits = {"this machine": psutil.virtual_memory().total}
    path = Path("/sys/fs/cgroup/memory.max")
    if path.is_file() and path.read_text().strip().isdecimal():
        limits["this container"] = int(path.read_text())
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    name = min(limits, key=lambda key: limits[key])
    if address_space == resource.RLIM_INFINITY or address_space >= limits[name]:
        return Room(gib(limits[name]), name, peak_gib(device), _LIBRARIES_GIB)
    # Libraries map more than they use, and that limit counts what is mapped.
    mapped_gib = gib(psutil.Process().memory_info().vms)
    unused_gib = mapped_gib - gib(psutil.Process().memory_info().rss)
    return Room(
        gib(address_space),
        "address space that this process may map (ulimit -v)",
        peak_gib(device) + unused_gib,
        _LIBRARIES_GIB + unused_gib,
    )


def _explain(error: BaseException, config: RunConfig) -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    room, phase, asked_gib = memory_room(device), _phase(error.__traceback__), _asked_gib(error)
    figures = _figures(room, asked_gib or 0.0, device)
    asked = "" if asked_gib is None else f", and {asked_gib:.2f} GiB more were asked for"
    lines = [
        f"Out of memory {_WHILE[phase]}. The peak so far is {room.peak_gib:.2f} of the "
        f"{room.total_gib:.2f} GiB of {room.name}{asked}. {figures.fixed:.2f} GiB are for weights, "
        "gradients, moments and libraries, whatever the rows. "
        "These need less, in the order to try them:"
    ]
    lines += [f"  {each.setting}{_price(each, room)}" for each in remedies(config, phase, figures)]
    return "\n".join(lines)


def _price(remedy: Remedy, room: Room) -> str:
    if remedy.need is None:
        return ""
    still = ", still too much" if remedy.need > room.total_gib else ""
    return f" (at least {remedy.need:.2f} GiB{still})"


def _figures(room: Room, asked_gib: float, device: torch.device) -> MemoryFigures:
    """What is held for good, by the parameters and optimizers that are alive."""
    trained, frozen, moments = _held_gib()
    # The first step fails before gradients and moments are there; the next would need them.
    fixed = room.libraries_gib + frozen + 2 * trained + max(moments, 2 * trained)
    # An adapter's base is kept in bf16 where the device computes in it; the teacher is the base.
    lora = room.libraries_gib + (trained / 2 if device.type == "cuda" else trained)
    return MemoryFigures(room.peak_gib + asked_gib, room.total_gib, fixed, trained, lora)


def _held_gib() -> tuple[float, float, float]:
    """Trained parameters, frozen ones, and the optimizers' state."""
    sizes = {True: 0, False: 0}
    moments = 0
    for item in gc.get_objects():
        # type() and not isinstance: a lazy module would be imported by the question.
        if issubclass(type(item), nn.Parameter):
            sizes[item.requires_grad] += item.numel() * item.element_size()
        elif issubclass(type(item), torch.optim.Optimizer):
            for state in item.state.values():
                values = (value for value in state.values() if isinstance(value, torch.Tensor))
                moments += sum(value.numel() * value.element_size() for value in values)
    return gib(sizes[True]), gib(sizes[False]), gib(moments)


def _phase(trace: TracebackType | None) -> Phase | None:
    """What was computed, by the innermost function on the way to the failure that says so."""
    phase: Phase | None = None
    while trace is not None:
        code, local = trace.tb_frame.f_code, trace.tb_frame.f_locals
        if code.co_name in _PHASES:
            phase = _PHASES[code.co_name]
        elif code.co_name == "score_hint_sites":
            phase = "policy" if "teacher_hidden" in local else "teacher"
        elif code.co_name == "score_packed":
            is_teacher = "teacher_model" in local and local["teacher_hidden"] is None
            phase = "teacher" if is_teacher else "policy"
        elif code.co_name == "step" and "optim" in code.co_filename:
            phase = "optimizer"
        trace = trace.tb_next
    return phase


def _asked_gib(error: BaseException) -> float | None:
    found = _ASKED.search(str(error))
    return None if found is None else gib(float(found["size"]) * _UNIT_BYTES[found["unit"]])
