"""How much a confined program may use, and how its run ended."""

from dataclasses import dataclass
from typing import Literal

from composer_replication.errors import ConfigError, shown

Ending = Literal["exit", "stopped", "timeout", "memory", "processes", "output"]
"""Why a program ended: on its own, stopped by its caller, or stopped at that limit."""


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """What one confined program may use.

    Example: `SandboxLimits(wall_s=2.0, memory_mib=256)`.
    """

    wall_s: float = 10.0
    """Seconds of real time; processor time is held to the same, for each process."""
    memory_mib: int = 1024
    """Address space of each process, and resident memory of all of them together."""
    num_processes: int = 32
    """Processes and threads at one time."""
    folder_mib: int = 64
    """Everything the program may write, which is gone when it ends."""
    output_kib: int = 256
    """Of stdout, and of stderr; a program that writes more is stopped."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not value > 0:
                raise ConfigError(
                    f"The sandbox limit {name} is {shown(value)}; nothing could run. "
                    "Give a number above 0."
                )


@dataclass(frozen=True, slots=True)
class ConfinedResult:
    """How a confined program ended; its output and exit code are the program's own claims.

    Example: `ConfinedResult(ending="exit", exit_code=0, stdout="hello", stderr="", wall_s=0.1)`.
    """

    ending: Ending
    exit_code: int | None
    """128 + N where signal N ended it; None where the parent stopped it."""
    stdout: str
    stderr: str
    wall_s: float
