"""`step` against a naive full-logits oracle, and who gets a gradient."""

import contextlib
import dataclasses
import math

import pytest
import torch

from composer_replication import PreferencePair, StepBatch
from composer_replication.errors import ConfigError, TrainingError
from composer_replication.step import step
from composer_replication.step.channels import CHANNELS, Channel, ChannelSum, num_pairs
from composer_replication.step.hidden_states import causal_lm, final_hidden_states
from composer_replication.step.optimizer_step import channel_sums, total_loss
from composer_replication.step.packed import score_packed
from composer_replication.step.separate import score_actions, score_separately
from composer_replication.step.settings import SDPOSettings, StepSettings

WEIGHTS = {"grpo": 1.0, "sdpo": 0.1, "dpo": 0.05}


def full_logits(model, ids):
    """Logits of one unpadded row through the model's own head."""
    return model(input_ids=torch.tensor([ids])).logits[0].double()


def action_logits(model, row):
    """The logits that predict each action token of an `ActionRow`."""
    start, stop = len(row.context_ids) - 1, len(row.token_ids) - 1
    return full_logits(model, row.token_ids)[start:stop]


def naive_sums(model, batch, collator, settings):
    """The three loss sums, a row at a time, without padding, tiles or shared code."""
    grpo = 0.0
    for rollout in batch.rollouts:
        ids = [*rollout.prompt_ids, *rollout.completion_ids]
        logp = (full_logits(model, ids) / settings.grpo.temperature).log_softmax(-1)
        for offset, (token, trains) in enumerate(
            zip(rollout.completion_ids, rollout.action_mask, strict=True)
        ):
            if trains:
                lp = logp[len(rollout.prompt_ids) + offset - 1, token]
                grpo = grpo - (lp - lp.detach()).exp() * rollout.advantage
    sdpo = 0.0
    for site in batch.hint_sites:
        student, teacher, _ = collator.site_rows(site)
        p = action_logits(model, student).softmax(-1)
        q = action_logits(model, teacher).softmax(-1).detach()
        m = (p + q) / 2
        sdpo = sdpo + 0.5 * (q * (q / m).log()).sum() + 0.5 * (p * (p / m).log()).sum()
    dpo = 0.0
    for pair in batch.pairs:
        chosen, rejected, _ = collator.pair_rows(pair)
        c, r = (
            action_logits(model, row)
            .log_softmax(-1)
            .gather(-1, torch.tensor(row.action_ids)[:, None])
            .sum()
            for row in (chosen, rejected)
        )
        margin = 0.1 * ((c - pair.ref_chosen_logp) - (r - pair.ref_rejected_logp))
        dpo = dpo - pair.weight * torch.nn.functional.logsigmoid(margin)
    return {"grpo": grpo, "sdpo": sdpo, "dpo": dpo}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(first, second, tolerance):
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        error = (gradient - second[name]).norm() / second[name].norm().clamp(min=1e-12)
        assert error < tolerance, (name, float(error))


@pytest.mark.parametrize("channel", ["grpo", "sdpo", "dpo"])
def test_each_channel_equals_a_naive_loop_in_value_and_gradient(
    policy, batch, collator, settings, channel
):
    ours = step(policy, batch, collator, channels=(channel,), settings=settings)[channel].loss_sum
    naive = naive_sums(policy, batch, collator, settings)[channel]
    assert ours.item() == pytest.approx(naive.item(), rel=1e-9, abs=1e-12)
    # DPO's references pass through float32 tensors: -40 and the others are exact there.
    assert_equal_gradients(gradients(policy, ours), gradients(policy, naive), 1e-8)


def test_counts_are_tokens_for_sdpo_pairs_for_dpo_and_the_constant_length_for_dr_grpo(
    policy, batch, collator, settings
):
    sums = step(policy, batch, collator, settings=settings)
    rows = [collator.site_rows(site)[0] for site in batch.hint_sites]
    assert sums["sdpo"].count == sum(len(row.action_ids) for row in rows)
    assert sums["dpo"].count == 2
    assert sums["grpo"].count == 2 * 8  # two rollouts of max_completion_length 8


def test_two_micro_batches_sum_to_one_large_batch(policy, batch, halves, collator, settings):
    whole = step(policy, batch, collator, settings=settings)
    counts = {name: part.count for name, part in whole.items()}
    at_once = gradients(policy, total_loss(whole, WEIGHTS))
    parts = [step(policy, half, collator, settings=settings) for half in halves]
    assert {name: sum(part[name].count for part in parts) for name in counts} == counts
    summed = sum(total_loss(part, WEIGHTS, counts) for part in parts)
    assert_equal_gradients(gradients(policy, summed), at_once, 1e-10)


def test_the_order_and_padding_of_rows_change_nothing(policy, batch, collator, settings):
    turned = dataclasses.replace(
        batch,
        rollouts=batch.rollouts[::-1],
        hint_sites=batch.hint_sites[::-1],
        pairs=batch.pairs[::-1],
    )
    first = step(policy, batch, collator, settings=settings)
    second = step(policy, turned, collator, settings=settings)
    for name in WEIGHTS:
        assert first[name].loss_sum.item() == pytest.approx(
            second[name].loss_sum.item(), rel=1e-12, abs=1e-13
        )


def test_sdpo_gradient_reaches_the_rows_before_action_tokens_only(policy, batch, collator):
    captured = []
    hook = causal_lm(policy).base_model.register_forward_hook(
        lambda module, args, output: captured.append(output[0])
    )
    tensors = collator(batch)
    sums = channel_sums(policy, tensors, ("sdpo",), StepSettings(), None)
    hook.remove()
    teacher_hidden, student_hidden = captured
    assert not teacher_hidden.requires_grad
    (gradient,) = torch.autograd.grad(sums["sdpo"].loss_sum, student_hidden)
    reached = gradient.abs().sum(-1) > 0
    expected = torch.zeros_like(tensors["sdpo_loss_mask"])
    expected[:, :-1] = tensors["sdpo_loss_mask"][:, 1:]
    assert torch.equal(reached, expected)


def test_an_empty_hint_under_a_live_teacher_has_no_divergence(policy, batch, collator):
    unhinted = tuple(dataclasses.replace(site, hint="") for site in batch.hint_sites)
    part = step(policy, StepBatch(hint_sites=unhinted), collator, channels=("sdpo",))["sdpo"]
    assert 0 <= part.loss_sum.item() < 1e-12
    hinted = step(policy, batch, collator, channels=("sdpo",))["sdpo"]
    assert hinted.loss_sum.item() > 1e-6


@pytest.mark.parametrize("executor", [score_separately, score_packed])
@pytest.mark.parametrize("has_teacher", [False, True])
def test_tokens_weighed_by_acceptance_equal_a_naive_loop(
    policy, reference, batch, collator, executor, has_teacher
):
    """The weight is a constant: no gradient goes through it."""
    settings = StepSettings(sdpo=SDPOSettings(temperature=0.7, prefix_weight="acceptance"))
    naive, weights = 0.0, []
    for site in batch.hint_sites:
        student, teacher, _ = collator.site_rows(site)
        p = (action_logits(policy, student) / 0.7).softmax(-1)
        with torch.no_grad():
            q = action_logits(reference if has_teacher else policy, teacher) / 0.7
        q = q.softmax(-1)
        m = (p + q) / 2
        per_token = 0.5 * (q * (q / m).log()).sum(-1) + 0.5 * (p * (p / m).log()).sum(-1)
        weight = 1.0
        for position, token in enumerate(student.action_ids):
            naive = naive + weight * per_token[position]
            weights.append(weight)
            weight *= min(1.0, (q[position, token] / p[position, token]).item())
    assert min(weights) < 0.95  # or nothing is tested
    teacher = (lambda: contextlib.nullcontext(reference)) if has_teacher else None
    ours = step(
        policy,
        batch,
        collator,
        channels=("sdpo",),
        settings=settings,
        teacher=teacher,
        executor=executor,
    )["sdpo"]
    assert ours.loss_sum.item() == pytest.approx(naive.item(), rel=1e-9)
    assert ours.count == len(weights)
    assert_equal_gradients(gradients(policy, ours.loss_sum), gradients(policy, naive), 1e-7)


def test_another_teacher_changes_the_divergence_and_gets_no_gradient(
    policy, reference, batch, collator
):
    reference.requires_grad_(True)
    live = step(policy, batch, collator, channels=("sdpo",))["sdpo"].loss_sum
    other = step(
        policy,
        batch,
        collator,
        channels=("sdpo",),
        teacher=lambda: contextlib.nullcontext(reference),
    )["sdpo"].loss_sum
    assert other.item() > 10 * live.item()
    other.backward()
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_at_the_reference_weights_dpo_is_log_2_a_pair(policy, batch, collator):
    with torch.no_grad():
        tensors, _ = collator.collate_pairs(batch.pairs)
        chosen = score_actions(policy, tensors, "dpo_chosen").tolist()
        rejected = score_actions(policy, tensors, "dpo_rejected").tolist()
    pairs = tuple(
        dataclasses.replace(pair, weight=1.0, ref_chosen_logp=c, ref_rejected_logp=r)
        for pair, c, r in zip(batch.pairs, chosen, rejected, strict=True)
    )
    part = step(policy, StepBatch(pairs=pairs), collator, channels=("dpo",))["dpo"]
    assert part.loss_sum.item() / part.count == pytest.approx(math.log(2), abs=1e-6)
    assert abs(float(part.metrics["rewards/margins"])) < 1e-5


@pytest.mark.parametrize("missing", ["rollouts", "hint_sites", "pairs"])
def test_a_channel_without_data_is_a_zero_in_the_graph_with_count_0(
    policy, batch, collator, settings, missing
):
    sums = step(policy, dataclasses.replace(batch, **{missing: ()}), collator, settings=settings)
    name = {"rollouts": "grpo", "hint_sites": "sdpo", "pairs": "dpo"}[missing]
    assert sums[name].count == 0
    assert sums[name].loss_sum.item() == 0.0
    assert sums[name].loss_sum.requires_grad
    assert torch.isfinite(total_loss(sums, WEIGHTS))


@pytest.mark.parametrize("executor", [score_separately, score_packed])
def test_a_wholly_empty_step_still_backpropagates(policy, collator, executor):
    total_loss(step(policy, StepBatch(), collator, executor=executor), WEIGHTS).backward()
    assert all(p.grad is None or float(p.grad.abs().sum()) == 0 for p in policy.parameters())


def test_padded_rows_never_reach_the_loss(policy, batch, collator, settings):
    tensors = collator(batch)
    sums = channel_sums(policy, tensors, ("grpo", "sdpo", "dpo"), settings, None)
    garbage = dict(tensors)
    for ids, mask in (
        ("input_ids", "attention_mask"),
        ("ctx_teacher_input_ids", "ctx_teacher_attention_mask"),
        ("dpo_chosen_input_ids", "dpo_chosen_attention_mask"),
        ("dpo_rejected_input_ids", "dpo_rejected_attention_mask"),
        ("prompt_ids", "prompt_mask"),
        ("completion_ids", "completion_mask"),
    ):
        garbage[ids] = tensors[ids].masked_fill(tensors[mask] == 0, 777)
    again = channel_sums(policy, garbage, ("grpo", "sdpo", "dpo"), settings, None)
    for name in WEIGHTS:
        assert sums[name].loss_sum.item() == pytest.approx(
            again[name].loss_sum.item(), rel=1e-12, abs=1e-13
        )


def test_the_captured_hidden_states_are_what_the_head_reads(policy):
    ids = torch.tensor([[5, 6, 7, 8]])
    hidden = final_hidden_states(policy, ids, torch.ones_like(ids))
    logits = policy(input_ids=ids).logits
    assert torch.allclose(policy.lm_head(hidden), logits, atol=1e-12)


def test_a_loss_that_is_not_finite_names_its_channel(policy):
    sums = {"dpo": ChannelSum(torch.tensor(float("nan")), 1)}
    with pytest.raises(TrainingError, match="The dpo loss of this step is nan"):
        total_loss(sums, WEIGHTS)


def test_an_unknown_channel_names_the_nearest(policy, batch, collator):
    with pytest.raises(ConfigError, match="Did you mean 'sdpo'"):
        step(policy, batch, collator, channels=("sdp0",))


def test_a_fourth_channel_is_one_entry_of_the_table(policy, batch, collator, monkeypatch):
    def imitate(scores, tensors, settings):
        return ChannelSum(-scores.chosen_logp.sum(), num_pairs(tensors))

    monkeypatch.setitem(
        CHANNELS, "imitate", Channel("imitate", "pairs", "pairs", num_pairs, imitate)
    )
    part = step(policy, batch, collator, channels=("dpo", "imitate"))["imitate"]
    with torch.no_grad():
        tensors, _ = collator.collate_pairs(batch.pairs)
        expected = -score_actions(policy, tensors, "dpo_chosen").sum()
    assert part.loss_sum.item() == pytest.approx(float(expected), rel=1e-9)
    assert part.count == 2


def test_pair_weights_scale_their_own_pair_only(policy, batch, collator):
    def loss(weights):
        pairs = tuple(
            dataclasses.replace(pair, weight=w)
            for pair, w in zip(batch.pairs, weights, strict=True)
        )
        return step(policy, StepBatch(pairs=pairs), collator, channels=("dpo",))[
            "dpo"
        ].loss_sum.item()

    first, second = loss((1.0, 1e-9)), loss((1e-9, 1.0))
    assert loss((2.0, 3.0)) == pytest.approx(2 * first + 3 * second, rel=1e-6)


def test_hand_value_of_dpo_at_a_known_margin(policy, collator, batch):
    # Scores c and r of the policy itself; references c - 5 and r + 5 give a margin of 0.1 * 10.
    pair = batch.pairs[0]
    with torch.no_grad():
        tensors, _ = collator.collate_pairs([pair])
        c = float(score_actions(policy, tensors, "dpo_chosen"))
        r = float(score_actions(policy, tensors, "dpo_rejected"))
    shifted = PreferencePair(pair.state, pair.chosen, pair.rejected, 1.0, c - 5, r + 5)
    part = step(policy, StepBatch(pairs=(shifted,)), collator, channels=("dpo",))["dpo"]
    # -log sigmoid(1) = log(1 + e^-1) = 0.3132617
    assert part.loss_sum.item() == pytest.approx(0.3132617, abs=1e-5)
