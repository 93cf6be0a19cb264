"""Every channel of `step` equals a full-logits oracle on every family, in value and gradient."""

import dataclasses

import pytest
import slow_oracle
import tiny_families
import torch

from composer_replication import ComposerDataCollator
from composer_replication.step import channel_sums, step
from composer_replication.step.separate import score_separately
from composer_replication.step.settings import GRPOSettings, StepSettings

CHANNELS = ("grpo", "sdpo", "dpo")
TEMPERATURE = 0.8
SETTINGS = StepSettings(grpo=GRPOSettings(max_completion_length=16, temperature=TEMPERATURE))

# Relative to the norm of each parameter's gradient. Gemma 3 and Cohere compute their norms in fp32
# whatever the weights. Gemma 2 runs in fp32: its attention masks overflow to -inf from float64.
TOLERANCE = {"gemma2": 1e-5, "gemma3": 1e-6, "cohere": 1e-6}
FP64 = 1e-12


@pytest.fixture(scope="module")
def collator():
    return ComposerDataCollator(tiny_families.chat_tokenizer())


def model_and_tolerance(family):
    dtype = torch.float32 if family == "gemma2" else torch.float64
    return tiny_families.tiny_model(family, dtype=dtype), TOLERANCE.get(family, FP64)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = float((ours[name] - expected).norm() / expected.norm().clamp(min=1e-9))
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
@pytest.mark.parametrize("has_old_policy", [False, True])
def test_every_channel_equals_the_full_logits_of_the_plain_forward(
    family, has_old_policy, collator
):
    model, tolerance = model_and_tolerance(family)
    batch = tiny_families.BATCH
    if has_old_policy:
        batch = dataclasses.replace(batch, rollouts=tiny_families.off_policy(batch.rollouts))
    ours = step(model, batch, collator, settings=SETTINGS)
    theirs = slow_oracle.sums(model, batch, collator, temperature=TEMPERATURE)
    for name in CHANNELS:
        assert ours[name].loss_sum.item() == pytest.approx(theirs[name].item(), rel=tolerance)
        expected = gradients(model, theirs[name])
        assert max(float(g.norm()) for g in expected.values()) > 1e-3
        assert_equal_gradients(gradients(model, ours[name].loss_sum), expected, tolerance)


# What sets each family apart must matter to the losses, or the test above could not see it missing.
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral_sliding", {"sliding_window": 400}),
        ("gemma2", {"sliding_window": 400}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma3", {"sliding_window": 400}),
        ("gemma3", {"final_logit_softcapping": None}),
        ("granite", {"logits_scaling": 1.0}),
        ("granite", {"embedding_multiplier": 1.0}),
        ("cohere", {"logit_scale": 1.0}),
    ],
)
def test_the_peculiarity_of_a_family_changes_the_losses(family, changes, collator):
    losses = []
    for config in ({}, changes):
        model = tiny_families.tiny_model(family, dtype=torch.float32, **config)
        sums = step(model, tiny_families.BATCH, collator, channels=("sdpo", "dpo"))
        losses.append([sums[name].loss_sum.item() for name in ("sdpo", "dpo")])
    for with_it, without in zip(*losses, strict=True):
        assert with_it != pytest.approx(without, rel=1e-3)


def test_every_row_is_longer_than_the_sliding_windows(collator):
    tensors = collator(tiny_families.BATCH)
    for name in ("attention_mask", "ctx_teacher_attention_mask", "dpo_chosen_attention_mask"):
        assert tensors[name].sum(-1).min() > tiny_families.WINDOW, name


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_bf16_autocast_over_fp32_weights_stays_near_fp32(family, collator):
    """Losses within 1 %, 2.5 roundings of bf16 (2 ** -8), rollout log-probs within 0.1 nats.

    A router whose scores round to other experts moves losses by up to 5 %.
    """
    bound = 0.05 if family in tiny_families.MIXTURES else 0.01
    model = tiny_families.tiny_model(family, dtype=torch.float32)
    tensors = collator(tiny_families.BATCH)

    def scored():
        sums = channel_sums(model, tensors, ("sdpo", "dpo"), SETTINGS, None)
        logp = score_separately(model, tensors, frozenset({"rollouts"}), SETTINGS).policy_logp
        assert all(part.loss_sum.dtype == torch.float32 for part in sums.values())
        assert logp.dtype == torch.float32
        return torch.stack([part.loss_sum for part in sums.values()]).detach(), logp.detach()

    exact, exact_logp = scored()
    with torch.autocast("cpu", torch.bfloat16):
        rounded, rounded_logp = scored()
    assert torch.allclose(rounded, exact, rtol=bound, atol=0)
    assert torch.allclose(rounded_logp, exact_logp, rtol=0, atol=0.1)
    assert not torch.equal(rounded_logp, exact_logp)


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_under_bf16_autocast_every_parameter_still_gets_its_gradient(family, collator):
    """The teacher's forward, without gradient, casts the same weights in the same context.

    10 % is twice what was seen; where a router rounds to other experts gradients are others.
    """
    model = tiny_families.tiny_model(family, dtype=torch.float32)
    for name in CHANNELS:
        exact = gradients(model, step(model, tiny_families.BATCH, collator)[name].loss_sum)
        with torch.autocast("cpu", torch.bfloat16):
            loss = step(model, tiny_families.BATCH, collator)[name].loss_sum
        rounded = gradients(model, loss)
        assert rounded.keys() == exact.keys()
        assert all(float(gradient.norm()) > 0 for gradient in rounded.values())
        if family not in tiny_families.MIXTURES:
            assert_equal_gradients(rounded, exact, 0.1)
