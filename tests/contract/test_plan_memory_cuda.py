"""The part of `bench/plan_memory.py` for a GPU: what of it is decided without one."""

import importlib
import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from composer_replication.planner.memory import predict
from composer_replication.planner.run_memory import (
    CUDA_CONTEXT_GIB,
    FRAGMENTATION,
    FRAGMENTATION_BEYOND,
)

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))
cuda = importlib.import_module("plan_memory_cuda")
page = importlib.import_module("plan_memory_page")

FIGURES = {
    "before_gib": 0.0, "allocated_gib": 10.0, "reserved_gib": 11.0, "context_gib": 0.5,
    "step_s": 0.2,
}  # fmt: skip


def test_every_step_is_another_one_and_each_is_read_back_from_its_row():
    cases = cuda.cuda_cases()
    rows = [{"model": name, "case": page.stored_case(case)} for name, case in cases]
    assert len({page.row_key(row) for row in rows}) == len(rows) == page.NUM_CUDA_CASES
    for row, (_, case) in zip(json.loads(json.dumps(rows)), cases, strict=True):
        assert page.case_of(row) == case


def test_steps_spread_from_8_gib_to_what_an_80_gb_card_holds():
    totals = sorted(cuda.planned_total_gib(case) for _, case in cuda.cuda_cases())
    assert totals[0] == pytest.approx(9, abs=1)
    assert 70 < totals[-1] < 76
    assert max(b - a for a, b in pairwise(totals)) < 11


def test_no_step_that_was_measured_takes_more_than_a_plan_states():
    found = json.loads((ROOT / "bench" / "results" / "plan_memory_cuda.json").read_text())
    rows = found["rows"]
    assert len(rows) == page.NUM_CUDA_CASES
    for row in rows:
        case = page.case_of(row)
        assert 1 <= cuda.planned_total_gib(case) / page.enough_gib(row) < 1.12, row
        assert predict(case).peak_gib == pytest.approx(row["allocated_gib"], rel=0.055), row


def test_every_executor_teacher_precision_and_optimizer_is_to_be_measured():
    cases = [case for _, case in cuda.cuda_cases()]
    assert {case.device_type for case in cases} == {"cuda"}
    assert {case.executor for case in cases} == {"separate", "packed"}
    assert {case.teacher for case in cases if case.num_sites} == {"live", "ema", "frozen"}
    assert {case.optimizer for case in cases} == {"adamw_torch_fused", "adamw_torch", "sgd"}
    assert {(case.weights_dtype, case.autocasts, case.lora_r is None) for case in cases} == {
        ("float32", False, True), ("float32", True, True), ("bfloat16", False, True),
        ("bfloat16", True, False),
    }  # fmt: skip


def test_the_planned_total_is_tensors_with_the_margins_of_a_card():
    _, case = cuda.cuda_cases()[0]
    tensors_gib = predict(case).peak_gib
    share = FRAGMENTATION + FRAGMENTATION_BEYOND
    total = (1 + share) * tensors_gib + CUDA_CONTEXT_GIB
    assert cuda.planned_total_gib(case) == pytest.approx(total)


@pytest.mark.parametrize(
    ("needed_gib", "enough", "num_tried"),
    [(8.0, [True, True, True], 3), (9.0, [True, True, False], 3), (9.5, [True, False, False], 2),
     (11.0, [False, False, False], 1)],
)  # fmt: skip
def test_lower_totals_are_tried_until_one_is_too_little(needed_gib, enough, num_tried):
    tried: list[float] = []

    def fits(total_gib):
        tried.append(total_gib)
        return total_gib >= needed_gib

    found = cuda.fitting(10.0, fits)
    assert list(found) == ["fits_planned", "fits_93", "fits_85"]
    assert list(found.values()) == enough
    assert tried == pytest.approx([10.0, 9.3, 8.5][:num_tried])


def test_an_error_is_stored_beside_the_figures_that_came_before_it():
    def measure(_case, _planned_gib):
        yield FIGURES
        raise RuntimeError("no kernel image")

    _, case = cuda.cuda_cases()[0]
    row = json.loads(json.dumps(cuda.cuda_row(case, measure)))
    assert row["error"] == "RuntimeError: no kernel image"
    assert row["error_of_allocated"] == pytest.approx(row["formula_gib"] / 10 - 1)
    assert [row[name] for name in cuda.SHARES] == [None, None, None]


def test_a_run_goes_on_with_new_steps_first_and_those_that_failed_last(tmp_path, monkeypatch):
    cases = cuda.cuda_cases()[:3]
    measured: list[object] = []
    broken = {1}

    def row_of(case):
        measured.append(case)
        number = [case for _, case in cases].index(case)
        error = "OutOfMemoryError" if number in broken else None
        return {"number": number, "error": error}

    monkeypatch.setattr(cuda, "cuda_row", row_of)
    monkeypatch.setattr(cuda, "_free", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    path = tmp_path / "part.json"
    monkeypatch.setattr(cuda, "cuda_cases", lambda: cases[:2])
    cuda.write_part(path, seconds=60)
    cuda.write_part(path, seconds=-1)
    broken.clear()
    monkeypatch.setattr(cuda, "cuda_cases", lambda: cases)
    cuda.write_part(path, seconds=60)
    found = json.loads(path.read_text())
    assert [case for _, case in cases] == [measured[i] for i in (0, 1, 2)]
    assert measured[3:] == [cases[1][1]]
    assert [row["number"] for row in found["rows"]] == [0, 1, 2]
    assert [row["device"] for row in found["rows"]] == ["NVIDIA H100"] * 3


def test_simulations_are_added_to_rows_without_one(tmp_path):
    model = {"model": page.EMBEDDED, "case": {"num_pairs": 1, "pair_state_tokens": 8}}
    model["case"] |= {"pair_action_tokens": 4, "device_type": "cuda", "executor": "packed"}
    path = tmp_path / "part.json"
    rows = [model | {"simulated_gib": None}, model | {"simulated_gib": 1.5}]
    path.write_text(json.dumps({"rows": rows}))
    cuda.simulate_part(path, seconds=60)
    found = json.loads(path.read_text())
    formula = predict(page.case_of(model)).peak_gib
    assert found["rows"][0]["simulated_gib"] == pytest.approx(formula, rel=0.07)
    assert found["rows"][1]["simulated_gib"] == 1.5


def test_the_page_shows_measured_steps_and_nothing_before_there_are_any(tmp_path):
    path = tmp_path / "part.json"
    assert page.cuda_lines(path) == []
    name, case = cuda.cuda_cases()[0]

    def measure(_case, planned_gib):
        yield FIGURES | {"allocated_gib": predict(case).peak_gib / 1.02}
        yield cuda.fitting(planned_gib, lambda total_gib: total_gib > 0.9 * planned_gib)

    head = {"model": name, "case": page.stored_case(case), "simulated_gib": None}
    head |= {"device": "NVIDIA H100", "torch": "2.11"}
    rows = [head | cuda.cuda_row(case, measure), head | cuda.cuda_row(case, lambda *_: 1 // 0)]
    path.write_text(json.dumps({"rows": rows}))
    text = "\n".join(page.cuda_lines(path))
    assert "An error ended 1." in text
    assert "1 steps were measured after the margins had been set: 1 ran within" in text
    assert "their totals, 1 within 93 % of them" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| shape")]
    assert "6 rollouts of 512 + 128, 1 sites of 512 + 64" in line
    assert "| +2.0% |" in line
    held = rows[0]["planned_total_gib"]
    assert line.endswith(f"| {0.93 * held:.1f} |")
    assert "device_type" not in line
