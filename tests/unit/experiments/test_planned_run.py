"""What a run writes before its first step, and what it says where the plan missed."""

import json

import pytest

from composer_replication.config.loading import load_config
from composer_replication.experiments.planned_run import plan_misses, write_planned
from composer_replication.planner.calibration import measured_runs
from composer_replication.runs.run_directory import RunDirectory
from composer_replication.runs.summary import Summary

OPTIONS = ["model=smollm2-135m", "smoke.fixed_shapes=[2, 64]", "smoke.steps=3"]


@pytest.fixture
def run(tmp_path):
    with RunDirectory.create(tmp_path / "run", resume=False) as run:
        yield run


@pytest.fixture
def planned(run):
    config = load_config(None, [*OPTIONS, "grpo.per_device_train_batch_size=2"])
    return write_planned(config, run, "smoke", "smollm2-135m")


def test_the_plan_of_this_device_is_written_before_the_run(run, planned):
    written = json.loads((run.path / "planned.json").read_text())
    assert (written["schema"], written["verb"], written["gpu"]) == (1, "smoke", "cpu")
    assert written["model"] == "smollm2-135m"
    assert written["device"].endswith("CPU")
    # Like with like: tensors alone, as a run measures them.
    assert 0 < written["peak_tensor_gib"] == pytest.approx(written["peak_gib"] - 0.6, abs=1e-3)
    assert written["step_s"][1] == pytest.approx(planned.step_s.expected, abs=1e-4)


def test_a_figure_within_the_promise_is_not_mentioned(planned):
    low, _, high = planned.step_s
    inside = Summary(
        status="passed",
        median_step_s=(low + high) / 2,
        peak_tensor_gib=1.06 * planned.memory.peak_tensor_gib,
    )
    assert plan_misses(planned, inside) == []
    assert plan_misses(planned, Summary(status="failed")) == []
    assert plan_misses(None, inside) == []


def test_a_miss_is_told_with_both_figures(planned):
    high = planned.step_s.high
    slow = plan_misses(planned, Summary(status="passed", median_step_s=2 * high))
    assert len(slow) == 1
    assert slow[0].startswith("The plan missed: it said ")
    assert f"the median was {2 * high:.2g} s" in slow[0]
    peak = 1.08 * planned.memory.peak_tensor_gib
    large = plan_misses(planned, Summary(status="passed", peak_tensor_gib=peak))
    assert len(large) == 1
    assert "over its stated 7%" in large[0]


def test_a_model_that_the_formulas_do_not_know_runs_without_a_plan(run, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    config = load_config(None, [f"model={tmp_path}"])
    assert write_planned(config, run, "smoke", str(tmp_path)) is None
    assert not (run.path / "planned.json").exists()


def test_a_finished_run_calibrates_the_next_plan_of_its_device(run, planned):
    summary = Summary(status="passed", median_step_s=3 * planned.bare_step_s, total_s=60.0)
    run.write_summary(summary)
    (measured,) = measured_runs(run.path)
    assert measured.step_ratio == pytest.approx(3.0)
    assert measured.predicted_step_s.expected == pytest.approx(planned.step_s.expected, abs=1e-4)
