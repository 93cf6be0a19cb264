"""What each card is: memory the driver leaves for use, dense rates, bandwidth, how many at once.

Rates are dense ones of matrix products with fp32 sums: data sheets that count structured sparsity
show twice as much. `capacity_gib` is the least that CUDA has been seen to report as total memory,
below what is printed on the box.
"""

import re
from dataclasses import dataclass

from composer_replication.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of card.

    Example: `find_gpu("L4").capacity_gib` -> 22.03.
    """

    name: str
    """As Modal's `gpu=` spells it; local cards as their maker does."""
    memory_gb: int
    """As sold, in GB."""
    capacity_gib: float
    bf16_tflops: float
    """Dense bf16; for a card without bf16, fp16."""
    fp32_tflops: float
    bandwidth_gb_s: float
    link_gb_s: float
    """One direction between cards of one machine."""
    max_count: int
    """Most of them in one machine."""
    has_bf16: bool = True
    is_on_modal: bool = True


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("T4", 16, 14.56, 65, 8.1, 320, 12, 8, has_bf16=False),
        Gpu("L4", 24, 22.03, 121, 30.3, 300, 24, 8),
        # Modal bills A10 as A10G, whose tensor rate is 70 and not the 125 of NVIDIA's own A10.
        Gpu("A10", 24, 22.06, 70, 31.2, 600, 24, 4),
        Gpu("L40S", 48, 44.39, 362, 91.6, 864, 24, 8),
        Gpu("A100-40GB", 40, 39.38, 312, 19.5, 1555, 300, 8),
        Gpu("A100-80GB", 80, 79.14, 312, 19.5, 1935, 300, 8),
        Gpu("RTX-PRO-6000", 96, 94.97, 504, 120, 1597, 48, 8),
        Gpu("H100", 80, 79.10, 989, 67, 3350, 450, 8),
        Gpu("H200", 141, 139.72, 989, 67, 4800, 450, 8),
        Gpu("B200", 180, 178.35, 2250, 75, 7672, 900, 8),
        Gpu("B300", 288, 267.00, 2250, 75, 7672, 900, 8),
        Gpu("RTX-3090", 24, 23.56, 71, 35.6, 936, 12, 8, is_on_modal=False),
        Gpu("RTX-4090", 24, 23.52, 165, 82.6, 1008, 24, 8, is_on_modal=False),
        # The founding note says 1600; matrix products measured 180 to 240.
        Gpu("RTX-5090", 32, 31.34, 209, 104.8, 1792, 48, 8, is_on_modal=False),
    )
}
"""In the order of the price table; local cards last."""

_ALIASES = {"A100": "A100-40GB", "A10G": "A10", "RTX6000": "RTX-PRO-6000"}


@dataclass(frozen=True, slots=True)
class GpuRequest:
    """A card and how many of it one machine must have.

    Example: `parse_gpu("h100!:2")` -> H100, 2, pinned.
    """

    gpu: Gpu
    num_gpus: int
    is_pinned: bool = False
    """`H100!`: no silent upgrade to another card."""


def find_gpu(name: str) -> Gpu:
    """The card of that name, in any case; `RTX 5090`, `5090` and `A100` are understood too.

    Raises:
        ConfigError: no such card; an unknown one is refused, never guessed.
    """
    spelled = re.sub(r"[\s_]+", "-", name.strip().upper().removeprefix("NVIDIA ")).rstrip("!+")
    spelled = spelled.removeprefix("GEFORCE-")
    spelled = _ALIASES.get(spelled, spelled)
    for candidate in (spelled, f"RTX-{spelled}", spelled.replace("RTX", "RTX-", 1)):
        if candidate in GPUS:
            return GPUS[candidate]
    raise ConfigError(
        f"There is no GPU {name!r} in the table, so neither its memory nor its price is known. "
        f"{nearest(spelled, GPUS)}"
    )


def gpu_of_driver(name: str, total_gib: float) -> Gpu | None:
    """The card that the driver calls `NVIDIA A100-SXM4-80GB` and such; None: not in the table.

    Args:
        name: as `nvidia-smi` or torch reports it.
        total_gib: of its memory, which tells the two sizes of A100 apart.
    """
    words = set(re.split(r"[\s-]+", name.upper()))
    if "LAPTOP" in words:
        return None
    if "A100" in words:
        return GPUS["A100-80GB" if total_gib > 60 else "A100-40GB"]
    for gpu in GPUS.values():
        known = set(gpu.name.split("-"))
        if known <= words or (gpu.name == "A10" and "A10G" in words):
            return gpu
    return None


def parse_gpu(text: str) -> GpuRequest:
    """`NAME` or `NAME:COUNT`, as `--gpu` and Modal's `gpu=` take it.

    Raises:
        ConfigError: an unknown card, or a count that no machine has.
    """
    name, separator, count_text = text.partition(":")
    gpu = find_gpu(name)
    if not separator:
        return GpuRequest(gpu, 1, name.endswith("!"))
    if not count_text.isdecimal() or int(count_text) == 0:
        raise ConfigError(
            f"{text!r} asks for {count_text!r} cards; the number after ':' counts them and must be "
            f"a whole number of at least 1. Write for example {gpu.name}:2."
        )
    return GpuRequest(gpu, check_count(gpu, int(count_text)), name.endswith("!"))


def check_count(gpu: Gpu, num_gpus: int) -> int:
    """`num_gpus` where one machine can hold as many.

    Raises:
        ConfigError: it cannot.
    """
    if 1 <= num_gpus <= gpu.max_count:
        return num_gpus
    raise ConfigError(
        f"{num_gpus} x {gpu.name} is not one machine: {gpu.name} comes 1 to {gpu.max_count} at a "
        f"time. Ask for {gpu.name}:{max(1, min(num_gpus, gpu.max_count))}, or another card."
    )
