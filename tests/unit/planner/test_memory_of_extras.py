"""What a run's settings add to its step: a reference, diagnostics, more rollouts, vLLM."""

from dataclasses import replace
from datetime import date

import pytest

from composer_replication.config.loading import load_config
from composer_replication.planner.data_shape import data_shape
from composer_replication.planner.diagnostic_memory import measuring_bytes
from composer_replication.planner.hardware import parse_gpu
from composer_replication.planner.memory import predict
from composer_replication.planner.model_files import shipped_config
from composer_replication.planner.plan import PlanRequest, make_plan
from composer_replication.planner.prices import shipped_prices
from composer_replication.planner.run_memory import run_memory
from composer_replication.planner.run_shape import run_shape
from composer_replication.planner.sampling_memory import sampling_bytes, scoring_bytes
from composer_replication.planner.sampling_shape import RolloutShape
from composer_replication.planner.step_case import StepCase

HALF_B = shipped_config("qwen2.5-0.5b")
PARAMETERS = 494_032_768
BASE = ["model=shape:qwen2.5-0.5b", "grpo.max_steps=100", "grpo.num_generations=4",
        "grpo.per_device_train_batch_size=4", "grpo.max_completion_length=256"]  # fmt: skip


@pytest.fixture
def shape_of(planned, machine):
    """`shape_of(*overrides)`: the run's shape on an H100."""

    def shape(*overrides):
        config = load_config(None, [*BASE, *overrides])
        plan = planned(config, machine(), on="modal", gpu=parse_gpu("H100"))
        return plan.candidates[0].shape

    return shape


def test_a_kl_term_keeps_a_second_model_and_an_adapter_keeps_none(shape_of):
    alone, with_kl = run_memory(shape_of(), 1), run_memory(shape_of("grpo.beta=0.01"), 1)
    assert with_kl.terms_gib["reference"] == pytest.approx(4 * PARAMETERS / 2**30)
    more = with_kl.peak_tensor_gib - alone.peak_tensor_gib
    assert more == pytest.approx(4 * PARAMETERS / 2**30)
    adapter = run_memory(shape_of("grpo.beta=0.01", "lora.r=8"), 1)
    assert "reference" not in adapter.terms_gib


def test_measured_gradients_hold_one_for_each_channel_beside_every_graph(shape_of):
    """Three sums; the third channel's backward works beside the whole graph, which it keeps."""
    options = ["tree=off", "grpo.optim=sgd", "teacher=live"]
    step = run_memory(shape_of(*options), 1)
    measured = run_memory(shape_of(*options, "diagnostics.gradients_every=10"), 1)
    assert "diagnostics_phase" in measured.terms_gib
    more = measured.peak_tensor_gib - step.peak_tensor_gib
    assert more > 3 * 4 * PARAMETERS / 2**30
    # An adapter's gradients are small, whatever is measured.
    adapter = [*options[:2], "teacher=frozen", "lora.r=8"]
    small = run_memory(shape_of(*adapter, "diagnostics.gradients_every=10"), 1)
    assert small.peak_tensor_gib < 1.15 * run_memory(shape_of(*adapter), 1).peak_tensor_gib


def test_one_channels_measured_gradient_by_hand():
    """GRPO alone, fp32 without a tree: its graph, one sum, the gradient, and the embedding's with
    its sum beside the tied head's."""
    case = StepCase(HALF_B, num_rollouts=2, prompt_tokens=768, completion_tokens=256)
    tokens, scored = 2 * 1024, 2 * 256
    graph = tokens * (24 * 4 * (6 * 896 + 2 * 896 + 2 * 128 + 4 * 4864 + 14) + 4 * 1920)
    hidden = 4 * 896
    held = graph + scored * hidden
    most = held + 2 * 4 * PARAMETERS + 2 * 4 * 136_134_656 + tokens * hidden
    assert measuring_bytes(case) == most
    # In a later micro-batch the sum of a short pair is there while GRPO's gradient grows.
    both = replace(case, num_pairs=1, pair_state_tokens=1, pair_action_tokens=1)
    assert measuring_bytes(replace(both, accumulates=True)) > measuring_bytes(both)


def test_trls_own_head_folds_its_tiles_in_copies_on_a_cpu():
    """Rows of 1,024 tokens, all of them, by 32,768 entries: the tile and 7 1/4 more in fp32."""
    step = StepCase(HALF_B, num_rollouts=2, prompt_tokens=768, completion_tokens=256)
    config = load_config(None, [*BASE, "alpha_sdpo=0", "beta_replay=0", "tree=off"])
    data = data_shape(None)
    shape = run_shape(config, HALF_B, data, device_type="cpu", computes_bf16=False)
    given = replace(shape, case=step, is_padded=False)
    beside = run_memory(given, 1).peak_tensor_gib - predict(step).peak_gib
    assert beside == pytest.approx(2 * 1024 * 32_768 * 4 * 8.25 / 2**30)


@pytest.mark.parametrize(
    ("overrides", "num_rows", "a_step", "is_scored"),
    [
        ([], 4, 1, False),
        (["grpo.gradient_accumulation_steps=4"], 16, 1, False),
        (["grpo.num_iterations=2"], 4, 1 / 2, True),
        (["grpo.steps_per_generation=8"], 32, 1 / 8, True),
        (["grpo.generation_batch_size=32"], 32, 1 / 8, True),
        (["grpo.generation_batch_size=32", "grpo.num_iterations=2"], 32, 1 / 16, True),
    ],
)
def test_a_generation_is_sampled_at_once_and_serves_several_steps(
    shape_of, overrides, num_rows, a_step, is_scored
):
    shape = shape_of(*overrides)
    assert shape.rollouts.num_rows == num_rows
    assert shape.generations_a_step == pytest.approx(a_step)
    assert shape.rollouts.is_scored is is_scored


def test_half_as_many_generations_halve_the_seconds_of_sampling(planned, machine):
    def seconds(*overrides):
        config = load_config(None, [*BASE, *overrides])
        plan = planned(config, machine(), on="modal", gpu=parse_gpu("H100"))
        return plan.candidates[0].terms_s["rollout"].expected

    once, twice = seconds(), seconds("grpo.num_iterations=2")
    # And the rows are scored once, since the policy moves while they are used.
    assert 0.5 * once < twice < 0.6 * once
    epochs = ["grpo.max_steps=-1", "grpo.num_train_epochs=1"]
    steps = [
        planned(load_config(None, [*BASE, *epochs, *more]), machine(), on="modal").candidates[0]
        for more in ([], ["grpo.num_iterations=3"])
    ]
    assert steps[1].shape.num_steps == 3 * steps[0].shape.num_steps


def test_sampled_rows_keep_keys_and_values_and_their_last_logits():
    """Qwen2.5-0.5B in fp32: 2 x 4 bytes of 128 numbers in 24 layers, and 2 copied while it grows;
    a token's forward has 3 (H + I) numbers at once."""
    case = StepCase(HALF_B, num_rollouts=4, prompt_tokens=100)
    cache = 2 * 4 * 128 * (24 + 2) * 16 * (100 + 50)
    prefill = 3 * 4 * (896 + 4864) * 4 * 100
    logits = 3 * 4 * 16 * 151_936
    rollouts = RolloutShape(16, 4, 100, 50)
    assert sampling_bytes(rollouts, case) == cache + max(prefill, logits)
    # Where each row computes its own prompt, that is the larger part.
    assert sampling_bytes(replace(rollouts, num_contexts=16), case) == cache + 4 * prefill
    assert sampling_bytes(replace(rollouts, sampled_tokens=0), case) == 0


def test_a_tree_scores_the_whole_generation_at_once_and_other_rows_a_micro_batch():
    separate = StepCase(HALF_B, num_rollouts=4, prompt_tokens=100, completion_tokens=500)
    tree = replace(separate, executor="packed")
    rollouts = RolloutShape(32, 8, 100, 500, is_scored=True)
    token = 3 * 4 * (896 + 4864)
    assert scoring_bytes(rollouts, separate) == token * 4 * 600
    assert scoring_bytes(rollouts, tree) == token * (8 * 100 + 32 * 500)


def test_an_evaluation_of_many_prompts_counts_64_at_a_time(shape_of):
    shape = shape_of("evaluation.every_steps=50", "evaluation.prompts=200")
    assert shape.evaluation.num_rows == 64
    # Before the first step, after 50 and after 100, in four batches each.
    assert shape.num_evaluation_batches == 3 * 4
    long = replace(
        shape, evaluation=replace(shape.evaluation, prompt_tokens=30_000, num_contexts=64)
    )
    memory = run_memory(long, 1)
    assert memory.peak_phase == "evaluation"
    cache = 2 * 2 * 128 * 26 * 64 * (30_000 + shape.evaluation.sampled_tokens) / 2**30
    assert memory.terms_gib["evaluation_phase"] > cache


def test_nothing_is_sampled_while_gradients_accumulate(shape_of):
    shape = shape_of("grpo.gradient_accumulation_steps=64", "grpo.gradient_checkpointing=true")
    many = replace(shape, rollouts=replace(shape.rollouts, sampled_tokens=20_000))
    memory = run_memory(many, 1)
    assert memory.peak_phase == "rollout"
    assert "gradients" not in memory.terms_gib
    assert predict(shape.case).persistent_gib["gradients"] > 1


def local_plan(machine, *overrides, cards=("H100",)):
    config = load_config(None, [*BASE, "grpo.use_vllm=true", *overrides])
    return make_plan(
        PlanRequest(config), machine(*cards), prices=shipped_prices(), today=date(2026, 11, 1)
    )


def test_vllm_takes_its_share_of_the_card_and_no_cache_of_transformers(machine):
    chosen = local_plan(machine).chosen
    assert chosen.place.where == "local"
    assert chosen.memory.terms_gib["vllm"] == pytest.approx(0.3 * 79.10)
    half = local_plan(machine, "grpo.vllm_gpu_memory_utilization=0.5").candidates[0]
    assert half.memory.terms_gib["vllm"] == pytest.approx(0.5 * 79.10)
    asleep = local_plan(machine, "grpo.vllm_enable_sleep_mode=true").candidates[0]
    assert "vllm" not in asleep.memory.terms_gib
    assert asleep.memory.peak_gib < chosen.memory.peak_gib
    server = local_plan(machine, "grpo.vllm_mode=server").candidates[0]
    assert "vllm" not in server.memory.terms_gib


def test_vllm_is_on_no_cpu_and_not_in_modals_image(machine):
    plan = local_plan(machine, cards=())
    assert plan.exit_code == 1
    assert "leave grpo.use_vllm out" in plan.decision.reason
    assert {candidate.obstacle for candidate in plan.candidates} == {"no vLLM"}


def test_a_share_below_the_weights_is_told_before_the_run(machine):
    plan = local_plan(machine, "grpo.vllm_gpu_memory_utilization=0.02")
    assert plan.chosen is None
    assert "vllm_gpu_memory_utilization 0.02 leaves vLLM 1.6 GiB" in plan.decision.reason
    assert "it needs 1.9" in plan.decision.reason
