"""The packed step on CUDA: against separate forwards there, and against fp32 in half precision."""

import pytest
import tiny_families
import tiny_trainer
import torch
from tree_batches import SETTINGS, collator, largest_errors, losses_and_gradients, shared_batch

from composer_replication.step import tree_attention
from composer_replication.step.packed import score_packed
from composer_replication.step.separate import score_separately

# PEFT's and transformers' own deprecations are not ours to fix.
pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore")]

BATCH = shared_batch()


def cuda_model(family, dtype=torch.float32):
    return tiny_families.tiny_model(family, dtype=dtype).cuda()


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_in_fp32_every_loss_and_gradient_equals_separate_forwards(family):
    model = cuda_model(family)
    theirs = losses_and_gradients(model, BATCH)
    ours = losses_and_gradients(model, BATCH, score_packed)
    loss_error, grad_error = largest_errors(ours, theirs)
    assert loss_error < 1e-4
    assert grad_error < 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_in_fp64_cuda_and_cpu_agree(family):
    model = tiny_families.exact_norms(tiny_families.tiny_model(family))
    on_cpu = losses_and_gradients(model, BATCH, score_packed)
    model.cuda()
    losses, grads = losses_and_gradients(model, BATCH, score_packed)
    on_cuda = losses, {name: grad.cpu() for name, grad in grads.items()}
    # Rotary angles are fp32 and differ in their last digit between devices.
    assert max(largest_errors(on_cuda, on_cpu)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "granite", "phi"])
def test_under_bf16_autocast_packed_is_as_near_to_fp32_as_separate(family, monkeypatch):
    launched = []
    apply = tree_attention.FlashAttention.apply

    def counted(*args):
        launched.append(args)
        return apply(*args)

    model = cuda_model(family)
    exact = losses_and_gradients(model, BATCH)
    monkeypatch.setattr(tree_attention.FlashAttention, "apply", counted)
    with torch.autocast("cuda", torch.bfloat16):
        packed, separate = (
            largest_errors(losses_and_gradients(model, BATCH, executor), exact)
            for executor in (score_packed, score_separately)
        )
    assert launched, "the flash kernel was to be used"
    # A divergence of two forwards has their rounding twice, where rows that ride share it.
    assert packed[0] < max(1.5 * separate[0], 0.03)
    assert packed[1] < max(1.5 * separate[1], 0.1)


def test_after_the_forward_nothing_waits_for_it():
    model = cuda_model("qwen2")
    tensors = {name: tensor.cuda() for name, tensor in collator()(BATCH).items()}
    needs = frozenset({"rollouts", "hint_sites", "pairs"})
    forwards = []

    def refuse_waiting(module, *_):
        # A teacher with a tree of its own comes before the policy.
        if torch.is_grad_enabled():
            forwards.append(module)
            torch.cuda.set_sync_debug_mode("error")

    model.model.norm.register_forward_hook(refuse_waiting)
    try:
        scores = score_packed(model, tensors, needs, SETTINGS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert forwards, "the forward was to be watched"
    assert scores.divergence.isfinite().all()


@pytest.mark.parametrize("teacher", ["live", "ema", "frozen"])
def test_a_packed_run_equals_one_with_separate_forwards(teacher, tmp_path):
    options = {"use_cpu": False, "teacher": teacher, "learning_rate": 0.05}
    runs = []
    for tree in ("auto", "off"):
        trainer = tiny_trainer.build_trainer(tmp_path / tree, tree=tree, **options)
        assert trainer.packing.is_on == (tree == "auto")
        runs.append(tiny_trainer.train(trainer))
    (rows, weights), (other_rows, other_weights) = runs
    for name, weight in other_weights.items():
        assert weight.is_cuda
        assert torch.allclose(weights[name], weight, rtol=0, atol=1e-4), name
    for row, other in zip(rows, other_rows, strict=True):
        for name in ("loss", "loss/grpo", "loss/sdpo", "loss/dpo"):
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name


def test_a_bf16_run_checks_packed_against_separate_and_trains(tmp_path):
    trainer = tiny_trainer.build_trainer(
        tmp_path, use_cpu=False, bf16=True, tree="auto", gradient_checkpointing=True
    )
    assert trainer.packing.is_on
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    rows, weights = tiny_trainer.train(trainer)
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows)
    assert any(not torch.equal(weights[name], weight) for name, weight in before.items())
