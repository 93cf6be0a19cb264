"""What a run writes before its first step, and what it says where the plan missed."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from composer_replication.config.loading import load_config
from composer_replication.errors import ConfigError
from composer_replication.experiments import planned_run
from composer_replication.experiments.planned_run import plan_misses, plan_run, write_planned
from composer_replication.experiments.trainer_setup import prepare
from composer_replication.planner.calibration import measured_runs
from composer_replication.planner.local_machine import this_machine
from composer_replication.runs.run_directory import RunDirectory
from composer_replication.runs.summary import Summary

OPTIONS = [
    "model=smollm2-135m",
    "smoke.fixed_shapes=[2, 96]",
    "smoke.steps=3",
    "grpo.per_device_train_batch_size=2",
    "grpo.num_generations=2",
]


@pytest.fixture
def run(tmp_path):
    with RunDirectory.create(tmp_path / "run", resume=False) as run:
        yield run


@pytest.fixture
def planned(run):
    config = load_config(None, OPTIONS)
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


@pytest.fixture
def parts(run):
    config = load_config(None, OPTIONS)
    return prepare(config, run, overrides={})


def planned_on(parts, run, monkeypatch, *, memory_gib, free_gib):
    """`plan_run` on a machine of that memory, as much of it free."""
    machine = dataclasses.replace(this_machine(), memory_gib=memory_gib, cards=())
    monkeypatch.setattr(planned_run, "this_machine", lambda: machine)
    memory = SimpleNamespace(total=memory_gib * 2**30, available=free_gib * 2**30)
    monkeypatch.setattr(planned_run.psutil, "virtual_memory", lambda: memory)
    return plan_run(parts.config, run, "smoke", parts)


def test_weights_that_the_machine_has_no_room_for_are_refused_before_they_load(
    run, parts, planned, monkeypatch
):
    kept = planned.memory.kept_gib
    # fp32 weights, an EMA of them and Adam's two moments of 134.5 million parameters.
    assert kept == pytest.approx(4 * 4 * 134.515e6 / 2**30, rel=1e-3)
    with pytest.raises(ConfigError, match=f"alone take {kept:.1f} GiB, and the cpu has 1.5"):
        planned_on(parts, run, monkeypatch, memory_gib=1.5, free_gib=1.5)
    assert not json.loads((run.path / "planned.json").read_text())["fits"]


def test_a_refusal_names_the_settings_that_fit(run, parts, monkeypatch):
    with pytest.raises(ConfigError, match=r"The cpu would fit with .*lora\.r = 16"):
        planned_on(parts, run, monkeypatch, memory_gib=1.9, free_gib=1.9)


def test_rows_that_may_not_fit_are_a_note_and_no_refusal(run, parts, planned, monkeypatch):
    whole, kept = planned.memory.peak_gib, planned.memory.kept_gib
    between = (whole + kept) / 2
    before = list(parts.notes)
    assert planned_on(parts, run, monkeypatch, memory_gib=between, free_gib=between) is not None
    (note,) = parts.notes[len(before) :]
    assert f"they take {whole:.1f} GiB" in note


def test_memory_that_others_hold_is_not_free(run, parts, planned, monkeypatch):
    before = list(parts.notes)
    planned_on(parts, run, monkeypatch, memory_gib=64.0, free_gib=64.0)
    assert parts.notes == before
    planned_on(parts, run, monkeypatch, memory_gib=64.0, free_gib=planned.memory.kept_gib)
    assert "of the cpu's 64.0 are free" in parts.notes[-1]


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
