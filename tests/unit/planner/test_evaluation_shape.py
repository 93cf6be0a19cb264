from datetime import date

import pytest

from composer_replication.config.run_config import RunConfig
from composer_replication.planner.evaluation_shape import EvaluationSize
from composer_replication.planner.plan import PlanRequest, make_plan
from composer_replication.planner.prices import shipped_prices

PROMPTS = [{"prompt": [{"role": "user", "content": "Read /src/app.py. " * 20}]}] * 24


def plan_of(machine, *, gpu=None, num_models=1, episodes=6, model="shape:qwen2.5-7b"):
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
    return make_plan(request, machine(), prices=shipped_prices(), today=date(2026, 11, 1))


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
