"""Steps on a CUDA device: what they take, and whether they fit in what a plan states for them.

A plan's total promises that a card with that much memory is enough. So once a step was measured,
the allocator is held to the total less what CUDA itself takes, and the step runs again: one that
runs out of memory there was falsely said to fit. How far below the total it still runs says how
tight the total is. `bench/plan_memory.py cuda` writes the results.
"""

import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from plan_memory_page import (
    SHARES,
    case_of,
    planned_total_gib,
    row_key,
    settings_of,
    stored_case,
)

from composer_replication.experiments.case_step import CaseStep, case_policy, case_tensors
from composer_replication.experiments.simulate import simulate
from composer_replication.planner.layer_memory import keeps_scores
from composer_replication.planner.memory import predict
from composer_replication.planner.step_case import StepCase
from composer_replication.units import BYTES_PER_GIB, gib

_FIGURES = ("before_gib", "allocated_gib", "reserved_gib", "context_gib", "step_s")
_SMALL, _LARGE = "shape:qwen2.5-0.5b", "shape:qwen2.5-7b"
_CHECKPOINTS = {"checkpoints": True}
_PACKED = {"executor": "packed"}
_AUTOCAST = {"autocasts": True}
_BF16 = {"weights_dtype": "bfloat16"}
_LORA = {"lora_r": 16, "teacher": "frozen"} | _BF16 | _AUTOCAST
_SGD = {"optimizer": "sgd"} | _BF16

Measure = Callable[[StepCase, float], Iterator[dict[str, Any]]]


def cuda_cases() -> list[tuple[str, StepCase]]:
    """Steps that take 9 to 72 GiB."""
    cases: list[tuple[str, dict[str, Any]]] = [
        (_SMALL, _rows((6, 512, 128), (1, 512)) | _BF16 | _PACKED | {"teacher": "live"}),
        (_SMALL, _rows((4, 512, 128), (2, 640), (2, 640)) | _BF16),
        (_SMALL, _rows((16, 1024, 512), (4, 1200), (4, 1024)) | _AUTOCAST | _CHECKPOINTS),
        (_SMALL, _rows((4, 512, 128), (2, 640), (2, 640)) | _AUTOCAST | _PACKED
            | {"teacher": "live"}),
        (_SMALL, _rows((16, 8192, 1024), (4, 8400), (2, 8192)) | _AUTOCAST | _PACKED
            | _CHECKPOINTS),
        (_SMALL, _rows((4, 1024, 256), (2, 1024), (1, 1024)) | _PACKED),
        (_SMALL, _rows((8, 2048, 512), (2, 2300), (2, 2048)) | _BF16 | _PACKED
            | {"optimizer": "adamw_torch"}),
        (_SMALL, _rows((8, 2048, 256), (2, 2200), (2, 2048)) | _AUTOCAST | _PACKED),
        (_SMALL, _rows((4, 1024, 256), (2, 1024), (1, 1024)) | {"teacher": "frozen"}),
        (_SMALL, _rows((8, 1024, 256), (2, 1200), (2, 1024)) | _AUTOCAST),
        (_SMALL, _rows((16, 1024, 832), (4, 1700), (2, 1024)) | _AUTOCAST | _PACKED
            | {"num_prompts": 4, "num_rollout_sites": 4}),
        (_SMALL, _rows((10, 2048, 512), (2, 2300), (2, 2048)) | _BF16 | {"teacher": "live"}),
        (_SMALL, _rows((5, 4096, 512), (2, 4200)) | _AUTOCAST
            | {"teacher": "frozen", "accumulates": True}),
        (_SMALL, _rows((16, 4096, 512), (4, 4500), (2, 4400)) | _AUTOCAST | _PACKED
            | {"teacher": "frozen", "optimizer": "adamw_torch"}),
        (_LARGE, _rows((4, 512, 128), (1, 640), (1, 512)) | _LORA | _CHECKPOINTS),
        (_LARGE, _rows((4, 4096, 256), (1, 4096), (1, 4096)) | _LORA | _CHECKPOINTS | _PACKED),
        (_LARGE, _rows((4, 1024, 256), (1, 1024), (1, 1024)) | _LORA | _PACKED),
        (_LARGE, _rows((2, 768, 256), (1, 900), (1, 768)) | _LORA | {"teacher": "ema"}),
        (_LARGE, _rows((4, 2048, 256), (1, 2048), (1, 2048)) | _LORA | _PACKED
            | {"teacher": "live"}),
        (_LARGE, _rows((4, 1024, 256), (1, 1024), (1, 1024)) | _SGD | _CHECKPOINTS
            | {"teacher": "live"}),
        (_LARGE, _rows((4, 2048, 256)) | _SGD | _PACKED),
        (_LARGE, _rows((8, 2048, 256), (1, 2048), (1, 2048)) | _SGD | _CHECKPOINTS | _PACKED),
    ]  # fmt: skip
    return [
        (name, StepCase(settings_of(name), device_type="cuda", **options))
        for name, options in cases
    ]


def _rows(
    rollouts: tuple[int, int, int], sites: tuple[int, int] = (0, 0), pairs: tuple[int, int] = (0, 0)
) -> dict[str, Any]:
    """Rows of a step: rollouts, prompt and completion; sites or pairs and the tokens of a state."""
    names = ("num_rollouts", "prompt_tokens", "completion_tokens")
    found: dict[str, Any] = dict(zip(names, rollouts, strict=True))
    if sites[0]:
        num_sites, state_tokens = sites
        found |= {"num_sites": num_sites, "state_tokens": state_tokens}
        found |= {"hint_tokens": 64, "action_tokens": 64}
    if pairs[0]:
        num_pairs, state_tokens = pairs
        found |= {"num_pairs": num_pairs, "pair_state_tokens": state_tokens}
        found |= {"pair_action_tokens": 64}
    return found


def write_part(path: Path, *, seconds: float) -> None:
    """Measure what `path` lacks, then what failed before; every row is stored at once.

    Args:
        path: of the results.
        seconds: no other step is begun after so many.
    """
    started_s = time.perf_counter()
    known = {row_key(row): row for row in _stored_rows(path)}
    device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    heads = [({"model": name, "case": stored_case(case)}, case) for name, case in cuda_cases()]
    for head, case in sorted(heads, key=lambda each: row_key(each[0]) in known):
        key = row_key(head)
        before = known.get(key, {})
        if before and before["error"] is None:
            continue
        if time.perf_counter() - started_s > seconds:
            break
        simulated = {"simulated_gib": before.get("simulated_gib")}
        known[key] = head | device | {"tf32": _is_half(case)} | cuda_row(case) | simulated
        print(json.dumps(known[key]), flush=True)
        _store(path, [*known.values()])
        # A CUDA error that this process does not survive is raised here; the next one goes on.
        _free()


def simulate_part(path: Path, *, seconds: float) -> None:
    """Add the simulation of the same step to stored rows that lack it; needs no GPU."""
    started_s = time.perf_counter()
    rows = _stored_rows(path)
    for row in rows:
        case = case_of(row)
        is_due = row["simulated_gib"] is None and not keeps_scores(case)
        if is_due and time.perf_counter() - started_s <= seconds:
            row["simulated_gib"] = simulate(case).peak_gib
            _store(path, rows)


def measured_on_cuda(case: StepCase, planned_gib: float) -> Iterator[dict[str, Any]]:
    """The figures of a step after a first one, then whether it fits in the planned total."""
    before_gib = gib(torch.cuda.memory_allocated())
    # As runs in bf16 have it.
    torch.set_float32_matmul_precision("high" if _is_half(case) else "highest")
    built = CaseStep(case, case_tensors(case), case_policy(case, device="cuda"))
    _free()
    take_step(built)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started_s = time.perf_counter()
    take_step(built)
    torch.cuda.synchronize()
    step_s = time.perf_counter() - started_s
    num_free, num_total = torch.cuda.mem_get_info()
    context_gib = gib(num_total - num_free - torch.cuda.memory_reserved())
    yield {
        "before_gib": before_gib,
        "allocated_gib": gib(torch.cuda.max_memory_allocated()),
        "reserved_gib": gib(torch.cuda.max_memory_reserved()),
        "context_gib": context_gib,
        "step_s": step_s,
    }
    yield fitting(planned_gib, lambda total_gib: fits_in(built, total_gib - context_gib))


def cuda_row(case: StepCase, measure: Measure = measured_on_cuda) -> dict[str, Any]:
    """All figures of a case; those that an error kept from being measured are None.

    Args:
        case: to measure.
        measure: gives figures one after another, so that those before an error are kept.
    """
    formula_gib, planned_gib = predict(case).peak_gib, planned_total_gib(case)
    row: dict[str, Any] = {"planned_total_gib": planned_gib, "formula_gib": formula_gib}
    row |= dict.fromkeys((*_FIGURES, *SHARES, "error_of_allocated", "error"))
    try:
        for figures in measure(case, planned_gib):
            row |= figures
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
    if row["allocated_gib"] is not None:
        row["error_of_allocated"] = formula_gib / row["allocated_gib"] - 1
    return row


def fitting(planned_gib: float, fits: Callable[[float], bool]) -> dict[str, bool]:
    """Whether a step fits in each of `SHARES`; below one that is too little, none is tried.

    Args:
        planned_gib: the planned total.
        fits: whether the step runs within so many GiB, CUDA's own share included.
    """
    found: dict[str, bool] = {}
    is_enough = True
    for name, share in SHARES.items():
        is_enough = is_enough and fits(share * planned_gib)
        found[name] = is_enough
    return found


def fits_in(built: CaseStep, limit_gib: float) -> bool:
    """Whether two steps run while the allocator may hold `limit_gib` at most."""
    _free()
    _, num_total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(limit_gib * BYTES_PER_GIB / num_total, 1.0))
    try:
        for _ in range(2):
            take_step(built)
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return True


def take_step(built: CaseStep) -> None:
    """One optimizer step; of two micro-batches where gradients accumulate."""
    for _ in range(2 if built.case.accumulates else 1):
        built.loss().backward()
    built.update()


def _free() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def _stored_rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def _is_half(case: StepCase) -> bool:
    return case.autocasts or case.weights_dtype == "bfloat16"


def _store(path: Path, rows: list[dict[str, Any]]) -> None:
    text = json.dumps({"rows": rows}, indent=1) + "\n"
    # A file that is cut off in the middle would lose the rows before it too.
    scratch = path.with_suffix(".part")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
