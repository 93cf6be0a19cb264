import math

import pytest
import torch

# TRL's and its dependencies' own warnings are not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore")

MAX_LENGTH = 8
PROMPT_LENGTH, COMPLETION_LENGTH = 3, 6


def micro_batch(seed):
    """What GRPOTrainer._compute_loss takes: four rollouts, with padding and a tool gap."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([6, 3, 1, 5])
    completion_mask = (torch.arange(COMPLETION_LENGTH) < lengths[:, None]).long()
    tool_mask = torch.ones_like(completion_mask)
    tool_mask[0, 2:4] = 0
    return {
        "prompt_ids": torch.randint(2, 48, (4, PROMPT_LENGTH), generator=generator),
        "prompt_mask": torch.ones(4, PROMPT_LENGTH, dtype=torch.long),
        "completion_ids": torch.randint(2, 48, (4, COMPLETION_LENGTH), generator=generator),
        "completion_mask": completion_mask,
        "tool_mask": tool_mask,
        "advantages": torch.randn(4, generator=generator),
    }


def our_logp(model, batch, temperature):
    from composer_replication.losses.head import selected_logp

    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    hidden = model.model(input_ids=ids, attention_mask=attention_mask).last_hidden_state
    hidden = hidden[:, PROMPT_LENGTH - 1 : -1].flatten(0, 1)
    targets = batch["completion_ids"].flatten()
    logp = selected_logp(hidden, model.lm_head.weight, targets, temperature=temperature)
    return logp.view(4, COMPLETION_LENGTH)


def parameter_grads(model, loss):
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("loss_type", ["dr_grpo", "dapo", "grpo", "bnpo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("delta", [None, 1.1])
@pytest.mark.parametrize("has_old_policy", [True, False])
def test_grpo_step_of_two_micro_batches_equals_trl(
    tmp_path, loss_type, level, delta, has_old_policy
):
    import tiny_trl

    from composer_replication.losses.grpo import grpo_loss

    trainer = tiny_trl.grpo_trainer(
        tmp_path,
        loss_type=loss_type,
        importance_sampling_level=level,
        delta=delta,
        epsilon=0.1,
        epsilon_high=0.2,
        temperature=0.9,
        gradient_accumulation_steps=2,
    )
    trainer.current_gradient_accumulation_steps = 2
    model = trainer.model.train()
    batches = [micro_batch(seed) for seed in (0, 1)]
    num_tokens = sum((b["completion_mask"] * b["tool_mask"]).sum() for b in batches)
    for seed, batch in enumerate(batches):
        batch["num_items_in_batch"] = num_tokens
        if has_old_policy:
            generator = torch.Generator().manual_seed(10 + seed)
            noise = torch.randn(4, COMPLETION_LENGTH, generator=generator)
            batch["old_per_token_logps"] = our_logp(model, batch, 0.9).detach() + 0.2 * noise
    theirs = sum(trainer._compute_loss(model, batch) for batch in batches)
    their_grads = parameter_grads(model, theirs)

    parts = [
        grpo_loss(
            our_logp(model, batch, 0.9),
            batch.get("old_per_token_logps"),
            batch["advantages"],
            (batch["completion_mask"] * batch["tool_mask"]).bool(),
            loss_type=loss_type,
            importance_sampling_level=level,
            epsilon_low=0.1,
            epsilon_high=0.2,
            delta=delta,
            max_completion_length=MAX_LENGTH,
        )
        for batch in batches
    ]
    ours = sum(part.loss_sum for part in parts) / sum(part.denominator for part in parts)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    our_grads = parameter_grads(model, ours)
    assert max(grad.abs().max() for grad in our_grads) > 1e-4
    for our_grad, their_grad in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(our_grad, their_grad, rtol=1e-4, atol=1e-6)
    if has_old_policy:
        assert sum(part.num_clipped for part in parts) > 0


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_group_advantages_equal_trl(tmp_path, scale):
    import tiny_trl

    from composer_replication.losses.grpo import group_advantages

    rewards = [0.3, 1.0, math.nan, 2.0, 0.5, 0.5, math.nan, math.nan]
    trainer = tiny_trl.grpo_trainer(tmp_path, scale_rewards=scale, temperature=1.0)
    num_generations = trainer.num_generations
    # The rewards are what is compared, so the rollouts behind them are fixed.
    trainer._calculate_rewards = lambda *_: torch.tensor(rewards)[:, None]
    rows = [{"prompt": "w2 w3"}] * len(rewards)
    theirs = trainer._generate_and_score_completions(rows)["advantages"]
    ours = group_advantages(torch.tensor(rewards), num_generations, scale)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert ours.abs().max() > 0


def dpo_logps(model, batch):
    from composer_replication.losses.head import selected_logp

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    hidden = model.model(**inputs).last_hidden_state[:, :-1].flatten(0, 1)
    targets = batch["input_ids"][:, 1:].flatten()
    logp = selected_logp(hidden, model.lm_head.weight, targets)
    logp = logp.view(batch["input_ids"].shape[0], -1)
    return (logp * batch["completion_mask"][:, 1:]).sum(1).chunk(2)


def test_dpo_equals_trl_and_smoothing_follows_from_its_robust_loss(tmp_path):
    import tiny_trl

    from composer_replication.losses.dpo import dpo_loss

    theirs, grads = {}, {}
    for loss_type in ("sigmoid", "robust"):
        trainer = tiny_trl.dpo_trainer(
            tmp_path, loss_type=[loss_type], beta=0.3, label_smoothing=0.2
        )
        model, batch = trainer.model, next(iter(trainer.get_train_dataloader()))
        theirs[loss_type] = trainer._compute_loss(model, batch, return_outputs=False)
        grads[loss_type] = parameter_grads(model, theirs[loss_type])
    chosen, rejected = dpo_logps(model, batch)
    with torch.no_grad():
        ref_chosen, ref_rejected = dpo_logps(trainer.ref_model, batch)
    logps = (chosen, rejected, ref_chosen, ref_rejected)
    plain = dpo_loss(*logps, beta=0.3)
    ours = plain.loss_sum / plain.num_pairs
    torch.testing.assert_close(ours, theirs["sigmoid"], rtol=1e-5, atol=1e-6)
    smoothed = dpo_loss(*logps, beta=0.3, label_smoothing=0.2)
    # With A = -log sigmoid(bm) and B = -log sigmoid(-bm), TRL's sigmoid is A and its robust is
    # ((1 - e) A - e B) / (1 - 2 e), so (1 - e) A + e B = 2 (1 - e) sigmoid - (1 - 2 e) robust.
    expected = 2 * 0.8 * theirs["sigmoid"] - 0.6 * theirs["robust"]
    torch.testing.assert_close(
        smoothed.loss_sum / smoothed.num_pairs, expected, rtol=1e-5, atol=1e-6
    )
    for our_grad, their_grad in zip(parameter_grads(model, ours), grads["sigmoid"], strict=True):
        torch.testing.assert_close(our_grad, their_grad, rtol=1e-4, atol=1e-6)
