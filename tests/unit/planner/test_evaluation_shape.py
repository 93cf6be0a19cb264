from datetime import date

import pytest

from composer_replication.config.run_config import RunConfig
from composer_replication.planner.calibration import Measured
from composer_replication.planner.evaluation_shape import EvaluationSize, evaluated_kind
from composer_replication.planner.hardware import parse_gpu
from composer_replication.planner.model_files import model_settings
from composer_replication.planner.plan import PlanRequest, make_plan
from composer_replication.planner.prices import shipped_prices
from composer_replication.planner.throughput import Range

PROMPTS = [{"prompt": [{"role": "user", "content": "Read /src/app.py. " * 20}]}] * 24


def plan_of(machine, *, gpu=None, num_models=1, episodes=6, model="shape:qwen2.5-7b", runs=()):
    size = EvaluationSize.of(
        PROMPTS,
        num_models=num_models,
        episodes_a_prompt=episodes,
        max_turns=8,
        max_action_tokens=48,
    )
    request = PlanRequest(
        RunConfig(model=model), on="modal", gpu=gpu, verb="evaluate", evaluation=size
    )
    return make_plan(
        request, machine(), prices=shipped_prices(), today=date(2026, 11, 1), runs=runs
    )


def measured(verb, model, ratio):
    """A run on an L40S that took `ratio` times as long as predicted."""
    return Measured(
        run="earlier",
        verb=verb,
        device="NVIDIA L40S",
        model=model,
        predicted_step_s=Range(1.0, 2.0, 4.0),
        median_step_s=2.0 * ratio,
        predicted_tensor_gib=1.0,
        peak_tensor_gib=None,
        predicted_wall_s=10.0,
        total_s=10.0,
        bare_step_s=2.0,
        phases_s={"load": 500.0},
        where="modal",
    )


def test_evaluations_of_a_model_of_this_size_calibrate_and_runs_that_train_do_not(machine):
    def on_l40s(*runs):
        plan = plan_of(machine, gpu=parse_gpu("L40S"), runs=runs)
        return plan.chosen, "Seconds are uncalibrated: runs/ holds no" in " ".join(plan.warnings)

    bare, warns = on_l40s()
    assert (bare.is_calibrated, warns) == (False, True)
    trained, warns = on_l40s(measured("train", "shape:qwen2.5-7b", 1.5))
    assert (trained.step_s, warns) == (bare.step_s, True)
    kind = evaluated_kind(model_settings("shape:qwen2.5-7b"))
    found, warns = on_l40s(measured("evaluate", kind, 1.5))
    assert (found.is_calibrated, warns) == (True, False)
    assert found.step_s.expected == pytest.approx(1.5 * bare.step_s.expected)
    assert found.step_s.high < bare.step_s.high
    # How many models that had to load is not known.
    assert found.clock.phases_s["load"] == bare.clock.phases_s["load"]


def test_an_evaluation_holds_weights_in_bf16_and_its_cache_and_trains_nothing(machine):
    memory = plan_of(machine).chosen.memory
    assert set(memory.terms_gib) == {"weights", "rollout_phase", "context", "fragmentation"}
    assert memory.terms_gib["weights"] == pytest.approx(2 * 7.6e9 / 2**30, rel=0.02)
    # 64 rows of about 540 tokens: 2 bytes x keys and values x 4 heads of 128 x 30 layers.
    assert 64 * 540 * 2 * 2 * 512 * 30 / 2**30 < memory.terms_gib["rollout_phase"] < 8


def test_twice_the_episodes_or_models_take_about_twice_as_long(machine):
    once, twice = plan_of(machine).chosen, plan_of(machine, episodes=16).chosen
    assert twice.step_s.expected / once.step_s.expected == pytest.approx(6 / 3, rel=0.05)
    both = plan_of(machine, num_models=2).chosen
    for phase in ("download", "step"):
        assert both.clock.phases_s[phase].expected == pytest.approx(
            2 * once.clock.phases_s[phase].expected
        )
    assert both.worst_usd > 1.5 * once.worst_usd
    assert both.clock.phases_s["save"].expected < 1


def test_what_does_not_fit_one_card_is_not_spread_over_several(machine):
    plan = plan_of(machine, model="shape:qwen2.5-7b")
    assert {candidate.place.num_gpus for candidate in plan.candidates} == {1}
    assert plan.cheaper_fit is None
    small = [c for c in plan.candidates if not c.fits]
    assert {candidate.place.name for candidate in small} == {"T4"}
