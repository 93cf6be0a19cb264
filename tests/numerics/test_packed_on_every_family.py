"""The packed executor equals `separate` in every loss and gradient, on every family."""

import contextlib
import gc
import weakref
from functools import partial

import pytest
import tiny_families
import torch
from test_step_under_lora import adapters_off, lora_model
from tree_batches import SETTINGS, collator, largest_errors, losses_and_gradients, shared_batch

from composer_replication.step.packed import score_packed
from composer_replication.step.separate import score_separately
from composer_replication.step.tree_attention import DenseKernel
from composer_replication.step.tree_forward import TreeOptions

# PEFT's and transformers' own deprecations are not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore")

# Gemma 2 runs in fp32: its attention masks overflow to -inf from float64. Routers choose in fp32,
# and Cohere rotates its queries in it.
TOLERANCE = {"gemma2": 1e-5, "cohere": 1e-6, "mixtral": 1e-6, "qwen3_moe": 1e-6}
FP64 = 1e-10

DENSE = partial(score_packed, options=TreeOptions(kernel=DenseKernel))
CUT = partial(score_packed, options=TreeOptions(max_tokens=50))
SHAPES = ("qwen2", "qwen3", "llama", "gemma3")
BATCH = shared_batch()


def exact_model(family, **changes):
    dtype = torch.float32 if family == "gemma2" else torch.float64
    return tiny_families.exact_norms(tiny_families.tiny_model(family, dtype=dtype, **changes))


def assert_equals_separate(model, executor=score_packed, *, tolerance=FP64, **options):
    theirs = losses_and_gradients(model, BATCH, **options)
    ours = losses_and_gradients(model, BATCH, executor, **options)
    loss_error, grad_error = largest_errors(ours, theirs)
    assert loss_error < tolerance
    assert grad_error < tolerance


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_every_loss_and_gradient_equals_separate_forwards(family):
    assert_equals_separate(exact_model(family), tolerance=TOLERANCE.get(family, FP64))


@pytest.mark.parametrize("family", ["qwen3", "mistral_sliding", "gemma2"])
@pytest.mark.parametrize("executor", [DENSE, CUT], ids=["dense", "cut at nodes"])
def test_the_dense_kernel_and_a_step_cut_at_its_nodes_give_the_same(family, executor):
    tolerance = TOLERANCE.get(family, FP64)
    assert_equals_separate(exact_model(family), executor, tolerance=tolerance)


@pytest.mark.parametrize("family", SHAPES)
def test_another_teacher_walks_a_tree_of_its_own_without_gradient(family):
    other = tiny_families.exact_norms(tiny_families.tiny_model(family, seed=5))
    assert_equals_separate(exact_model(family), teacher=lambda: contextlib.nullcontext(other))
    assert all(parameter.grad is None for parameter in other.parameters())


@pytest.mark.parametrize("is_reentrant", [False, True])
@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("executor", [score_packed, CUT], ids=["whole", "cut at nodes"])
def test_both_kinds_of_gradient_checkpointing_change_nothing(family, is_reentrant, executor):
    model = exact_model(family)
    theirs = losses_and_gradients(model, BATCH)
    model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
    model.enable_input_require_grads()
    ours = losses_and_gradients(model, BATCH, executor)
    assert max(largest_errors(ours, theirs)) < FP64


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi"])
@pytest.mark.parametrize("teacher_kind", ["live", "frozen"])
def test_lora_trains_its_adapter_alone_and_switches_it_off_for_the_frozen_teacher(
    family, teacher_kind
):
    model = tiny_families.exact_norms(lora_model(family))
    teacher = adapters_off(model) if teacher_kind == "frozen" else None
    assert_equals_separate(model, teacher=teacher)
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora" in name for name in trained)


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_under_bf16_autocast_both_executors_are_as_near_to_fp32(family):
    model = tiny_families.tiny_model(family, dtype=torch.float32)
    exact = losses_and_gradients(model, BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        packed, separate = (
            largest_errors(losses_and_gradients(model, BATCH, executor), exact)
            for executor in (score_packed, score_separately)
        )
    if family in tiny_families.MIXTURES:
        # Where a router rounds to other experts, gradients are others.
        assert packed[0] < 0.1
        return
    # A divergence of two forwards has their rounding twice, where rows that ride share it.
    assert packed[0] < max(1.5 * separate[0], 0.03)
    assert packed[1] < max(1.5 * separate[1], 0.1)


@pytest.mark.parametrize("family", SHAPES)
def test_weights_in_bf16_work_too(family):
    model = tiny_families.tiny_model(family, dtype=torch.bfloat16)
    exact = tiny_families.tiny_model(family, dtype=torch.float32)
    exact.load_state_dict(model.state_dict())
    theirs = losses_and_gradients(exact, BATCH)
    ours = losses_and_gradients(model, BATCH, score_packed)
    assert largest_errors(ours, theirs)[0] < 0.05


@pytest.mark.parametrize("teacher_kind", ["live", "own"])
@pytest.mark.parametrize("executor", [score_packed, score_separately, CUT])
def test_a_step_that_is_dropped_leaves_nothing_of_its_models_behind(executor, teacher_kind):
    """What a node of the graph holds of itself is never freed, step after step."""
    models = [tiny_families.tiny_model("llama", seed=seed) for seed in range(2)]
    weights = [weakref.ref(next(model.parameters())) for model in models]
    open_teacher = None if teacher_kind == "live" else lambda: contextlib.nullcontext(models[1])
    losses_and_gradients(models[0], BATCH, executor, teacher=open_teacher)
    models.clear()
    gc.collect()
    assert [weight() for weight in weights] == [None, None]


@pytest.mark.parametrize("seed", range(8))
def test_random_trees_equal_separate_forwards(seed):
    model = exact_model("qwen3")
    batch = shared_batch(seed + 1)
    theirs = losses_and_gradients(model, batch)
    ours = losses_and_gradients(model, batch, score_packed)
    assert max(largest_errors(ours, theirs)) < FP64


def test_rollout_scores_agree_token_by_token_and_are_0_where_nothing_was_sampled():
    model, tensors = exact_model("llama"), collator()(BATCH)
    needs = frozenset({"rollouts"})
    ours, theirs = (
        executor(model, tensors, needs, SETTINGS) for executor in (score_packed, score_separately)
    )
    assert torch.allclose(ours.policy_logp, theirs.policy_logp, atol=1e-12)
    assert torch.allclose(ours.entropy, theirs.entropy, atol=1e-12)
    unsampled = tensors["completion_mask"] * tensors["tool_mask"] == 0
    assert unsampled.any()
    assert ours.policy_logp[unsampled].abs().max() == 0
    assert ours.divergence is None
    assert ours.chosen_logp is None
