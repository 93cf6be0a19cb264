"""The router's load-balancing loss is TRL's alone: our channels neither change it nor add to it."""

import copy

import pytest
import slow_oracle
import slow_training
import tiny_families
import tiny_trainer
import torch

from composer_replication import ComposerDataCollator

# TRL's and its dependencies' own warnings are not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore")

LEARNING_RATE = 0.05
COEFFICIENT = 0.5


def extra_gradients(model, sites):
    """Of the two weighted channels from full logits in float64, without any auxiliary loss."""
    policy = copy.deepcopy(model).double()
    collator = ComposerDataCollator(tiny_families.chat_tokenizer())
    pairs = [slow_training.with_reference(pair, policy, collator) for pair in tiny_trainer.PAIRS]
    num_tokens = sum(len(site.action_ids) for site in sites)
    loss = 0.75 * slow_oracle.sdpo_sum(policy, sites, collator) / num_tokens
    loss = loss + 0.25 * slow_oracle.dpo_sum(policy, pairs, collator) / len(pairs)
    loss.backward()
    return {name: parameter.grad for name, parameter in policy.named_parameters()}


@pytest.mark.parametrize("family", tiny_families.MIXTURES)
def test_the_step_is_trls_with_its_auxiliary_loss_plus_two_channels_without_one(tmp_path, family):
    def model():
        return tiny_families.tiny_model(
            family,
            dtype=torch.float32,
            output_router_logits=True,
            router_aux_loss_coef=COEFFICIENT,
        )

    changes = {"max_steps": 1, "learning_rate": LEARNING_RATE}
    trl_rows, trl_weights = tiny_trainer.train(
        tiny_trainer.build_trl_trainer(tmp_path / "trl", model=model(), **changes)
    )
    trainer = tiny_trainer.build_trainer(tmp_path / "ours", model=model(), **changes)
    rows, weights = tiny_trainer.train(trainer)

    assert trl_rows[0]["aux_loss"] > 1.0
    assert rows[0]["aux_loss"] == trl_rows[0]["aux_loss"]
    assert rows[0]["loss/grpo"] == pytest.approx(trl_rows[0]["loss"], rel=1e-6)
    (generation,) = trainer.rollout_func.generations
    sites = [site for row in generation for site in row["rollout_hint_sites"]]
    extra = extra_gradients(model(), sites)
    router_moves = 0.0
    for name, gradient in extra.items():
        moved = (weights[name] - trl_weights[name]).double()
        assert torch.allclose(moved, -LEARNING_RATE * gradient, rtol=0, atol=2e-6), name
        if "gate" in name or "router" in name:
            router_moves += float((trl_weights[name] - model().state_dict()[name]).norm())
    # An auxiliary loss of our forwards would pull at the routers by about as much.
    assert router_moves > 1e-3
