"""What this machine has: its cards as the driver reports them, its threads and its memory."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from composer_replication.planner.hardware import Gpu, gpu_of_driver
from composer_replication.units import gib

_QUERY = "--query-gpu=name,memory.total,memory.reserved"
_QUERY_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class LocalCard:
    """One card of this machine.

    Example: `LocalCard("NVIDIA GeForce RTX 5090", 31.34)`.
    """

    name: str
    capacity_gib: float
    """What the driver leaves for use."""

    @property
    def gpu(self) -> Gpu | None:
        """Its rates; None where the card is not in the table."""
        return gpu_of_driver(self.name, self.capacity_gib)


@dataclass(frozen=True, slots=True)
class LocalMachine:
    """This machine.

    Example: `LocalMachine((), num_threads=2, cpu_flags=frozenset(), memory_gib=24.0)`.
    """

    cards: tuple[LocalCard, ...]
    num_threads: int
    cpu_flags: frozenset[str]
    memory_gib: float

    @property
    def computes_bf16(self) -> bool:
        """Whether the CPU multiplies bf16 itself; without that a run on it stays in fp32."""
        return bool(self.cpu_flags & {"amx_bf16", "avx512_bf16"})


def this_machine() -> LocalMachine:
    """Cards, threads and memory, without torch."""
    return LocalMachine(
        cards=_cards(),
        num_threads=len(os.sched_getaffinity(0)),
        cpu_flags=_cpu_flags(Path("/proc/cpuinfo")),
        memory_gib=gib(_memory_bytes(Path("/sys/fs/cgroup/memory.max"))),
    )


def parse_cards(text: str) -> tuple[LocalCard, ...]:
    """`nvidia-smi --query-gpu=name,memory.total,memory.reserved --format=csv,noheader,nounits`.

    The driver keeps `memory.reserved` MiB of the total for itself; where it does not say how much
    (`[N/A]`), the table's capacity of that card holds.
    """
    cards: list[LocalCard] = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) < 2 or not fields[1].isdecimal():
            continue
        reserved_mib = float(fields[2]) if len(fields) > 2 and fields[2].isdecimal() else 0.0
        reported_gib = (float(fields[1]) - reserved_mib) / 1024
        known = gpu_of_driver(fields[0], reported_gib)
        # The context's own reserve is in the table and not in the report.
        capacity = min(reported_gib, known.capacity_gib) if known is not None else reported_gib
        cards.append(LocalCard(fields[0], capacity))
    return tuple(cards)


def visible_cards(cards: Sequence[LocalCard], visible: str | None) -> tuple[LocalCard, ...]:
    """Those that `CUDA_VISIBLE_DEVICES` leaves; names of another kind hide nothing here."""
    if visible is None:
        return tuple(cards)
    indices = [index.strip() for index in visible.split(",") if index.strip()]
    if not all(index.lstrip("-").isdecimal() for index in indices):
        return tuple(cards)
    chosen = (int(index) for index in indices)
    return tuple(cards[index] for index in chosen if 0 <= index < len(cards))


def _cards() -> tuple[LocalCard, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    try:
        answer = subprocess.run(
            [program, _QUERY, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_QUERY_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        # A driver that does not answer has no card that a run could use.
        return ()
    if answer.returncode != 0:
        return ()
    return visible_cards(parse_cards(answer.stdout), os.environ.get("CUDA_VISIBLE_DEVICES"))


def _cpu_flags(path: Path) -> frozenset[str]:
    if not path.is_file():
        return frozenset()
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            return frozenset(line.split())
    return frozenset()


def _memory_bytes(limit: Path) -> int:
    """Of the machine, or of the container that this process is in."""
    total = psutil.virtual_memory().total
    if limit.is_file() and limit.read_text().strip().isdecimal():
        return min(total, int(limit.read_text()))
    return total
