"""Odd step batches through the packed executor: each gives what separate forwards give."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

from composer_replication.errors import ConfigError, DataError
from composer_replication.losses.head import OutputHead
from composer_replication.step.packed import score_packed
from composer_replication.step.separate import score_separately
from composer_replication.step.settings import StepSettings
from composer_replication.step.tree_forward import TreeOptions, head_tile_rows

sys.path.insert(0, str(Path(__file__).parents[2] / "numerics"))
import tiny_families

NEEDS = frozenset({"rollouts", "hint_sites", "pairs"})
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return tiny_families.tiny_model("phi")


def rollouts(prompts, completions, mask=None):
    """Tensors of rollouts of equal lengths, nothing padded."""
    prompt_ids, completion_ids = torch.tensor(prompts), torch.tensor(completions)
    ones = torch.ones_like(completion_ids)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": completion_ids,
        "completion_mask": ones,
        "tool_mask": ones if mask is None else torch.tensor(mask),
    }


def site(state, hinted, action):
    """Tensors of one hint site."""
    student, teacher = torch.tensor([[*state, *action]]), torch.tensor([[*hinted, *action]])
    return {
        "input_ids": student,
        "attention_mask": torch.ones_like(student),
        "ctx_teacher_input_ids": teacher,
        "ctx_teacher_attention_mask": torch.ones_like(teacher),
        "sdpo_student_index": torch.tensor([[0, len(state) + i] for i in range(len(action))]),
        "sdpo_teacher_index": torch.tensor([[0, len(hinted) + i] for i in range(len(action))]),
    }


BATCHES = {
    "no shared token": rollouts([[7, 8], [9, 10]], [[11, 12], [13, 14]]),
    "a single sequence": rollouts([[7, 8, 9]], [[11, 12]]),
    "duplicates": rollouts([[7, 8]] * 3, [[11, 12]] * 3),
    "a sequence that is a prefix of another": rollouts([[7, 8]], [[11, 12]])
    | site([7, 8, 11, 12], [7, 8, 9, 12], [13]),
    "a hint at position 0": site([7, 8, 9], [20, 21, 7, 8, 9], [11, 12, 13]),
    "a hint that changes nothing": site([7, 8, 9], [7, 8, 9], [11, 12]),
    "one token of state": site([7], [20, 7], [11]),
    "rollouts beside a site of theirs": rollouts([[7, 8]] * 2, [[11, 12], [11, 13]])
    | site([7, 8], [7, 20, 8], [11, 12]),
}


@pytest.mark.parametrize("tensors", BATCHES.values(), ids=BATCHES)
def test_odd_batches_have_the_scores_and_gradients_of_separate_forwards(tensors, model):
    results = []
    for executor in (score_packed, score_separately):
        scores = executor(model, tensors, NEEDS, StepSettings(), None)
        values = [scores.policy_logp, scores.entropy, scores.divergence]
        values = [value for value in values if value is not None]
        weighted = sum((v * torch.linspace(1, 2, v.numel()).view_as(v)).sum() for v in values)
        results.append((values, torch.autograd.grad(weighted, list(model.parameters()))))
    (values, grads), (other_values, other_grads) = results
    for value, other in zip(values, other_values, strict=True):
        assert torch.allclose(value, other, rtol=1e-10, atol=1e-12)
    for grad, other in zip(grads, other_grads, strict=True):
        assert torch.allclose(grad, other, rtol=1e-9, atol=1e-11)


STATE = list(range(7, 27))
TEACHERS = {
    # 20 + 2 tokens shared with nobody, none with the policy: a backward of them would be waste.
    "own tree": (site(STATE, [30, 31, *STATE], [11, 12, 13]), [True, False]),
    # 2 + 2 of its own after 19 that the policy has too.
    "rides": (site(STATE, [*STATE[:-1], 30, STATE[-1]], [11, 12, 13]), [True]),
}


@pytest.mark.parametrize(("tensors", "forwards"), TEACHERS.values(), ids=TEACHERS)
def test_a_live_teacher_takes_the_cheaper_tree_and_gives_the_same_numbers(tensors, forwards, model):
    with_grad = []
    handle = model.get_decoder().register_forward_hook(
        lambda *_: with_grad.append(torch.is_grad_enabled())
    )
    results = []
    for executor in (score_packed, score_separately):
        divergence = executor(model, tensors, NEEDS, StepSettings(), None).divergence
        if executor is score_packed:
            assert sorted(with_grad, reverse=True) == forwards
        results.append((divergence, *torch.autograd.grad(divergence.sum(), [*model.parameters()])))
    handle.remove()
    assert model.training
    for value, other in zip(*results, strict=True):
        assert torch.allclose(value, other, rtol=1e-9, atol=1e-11)


def test_rollouts_without_a_sampled_token_give_zeros_in_the_graph(model):
    tensors = rollouts([[7, 8]], [[11, 12]], mask=[[0, 0]])
    scores = score_packed(model, tensors, NEEDS, StepSettings())
    assert scores.policy_logp.tolist() == [[0, 0]]
    scores.policy_logp.sum().backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


@pytest.mark.parametrize("budget", [1, 6, 7, 100])
def test_rows_without_a_scored_token_fit_any_budget(model, budget):
    """They are empty sequences of the tree, which come first and would be a part without a row."""
    prompt = [[5, 6, 7, 8, 9, 10]] * 3
    tensors = rollouts(prompt, [[20, 21], [22, 23], [24, 25]], mask=[[1, 1], [0, 0], [0, 0]])
    options = TreeOptions(max_tokens=budget)
    scores = score_packed(model, tensors, NEEDS, StepSettings(), options=options)
    alone = score_separately(model, tensors, NEEDS, StepSettings())
    scored = tensors["tool_mask"].bool()
    assert torch.allclose(scores.policy_logp[scored], alone.policy_logp[scored], atol=1e-12)


def test_a_bound_below_the_prefix_says_that_it_costs_more_than_separate_forwards(model):
    """Of 6 branches of 2 scored tokens each, 20 + 1 rows are computed, and twice."""
    tensors = rollouts([list(range(20))] * 6, [[30 + i, 31] for i in range(6)])
    options = TreeOptions(max_tokens=21)
    with pytest.warns(UserWarning, match=r"into 6 parts, which compute 252 tokens.*have 126"):
        score_packed(model, tensors, NEEDS, StepSettings(), options=options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score_packed(model, tensors, NEEDS, StepSettings(), options=TreeOptions(max_tokens=23))
        disjoint = rollouts([[i] * 20 for i in range(6)], [[30 + i, 31] for i in range(6)])
        score_packed(model, disjoint, NEEDS, StepSettings(), options=options)
        score_packed(model, tensors, NEEDS, StepSettings(), options=TreeOptions())


@pytest.mark.parametrize("mask", [[[1, 1]], [[0, 0]]])
def test_a_model_that_trains_nothing_is_scored(mask):
    frozen = tiny_families.tiny_model("phi").requires_grad_(False)
    tensors = rollouts([[7, 8]], [[11, 12]], mask=mask)
    scores = score_packed(frozen, tensors, NEEDS, StepSettings())
    alone = score_separately(frozen, tensors, NEEDS, StepSettings())
    kept = tensors["tool_mask"].bool()
    assert not scores.policy_logp.requires_grad
    assert torch.allclose(scores.policy_logp[kept], alone.policy_logp[kept], atol=1e-12)


def test_a_step_without_any_data_has_no_scores(model):
    for tensors in ({}, {"advantages": torch.zeros(0)}):
        scores = score_packed(model, tensors, NEEDS, StepSettings())
        assert (scores.policy_logp, scores.divergence, scores.chosen_logp) == (None, None, None)


def test_an_empty_action_gives_an_empty_divergence(model):
    empty = torch.empty(0, 2, dtype=torch.long)
    tensors = site([7, 8], [20, 7, 8], [11])
    tensors |= {"sdpo_student_index": empty, "sdpo_teacher_index": empty}
    scores = score_packed(model, tensors, NEEDS, StepSettings())
    assert scores.divergence.shape == (0,)
    assert scores.divergence.requires_grad


def test_a_token_without_context_is_refused(model):
    tensors = site([7], [7], [11])
    tensors["sdpo_student_index"] = torch.tensor([[0, 0]])
    with pytest.raises(DataError, match="first of its sequence"):
        score_packed(model, tensors, NEEDS, StepSettings())


def test_a_part_that_nobody_asked_for_is_not_scored(model):
    tensors = BATCHES["rollouts beside a site of theirs"]
    scores = score_packed(model, tensors, frozenset({"hint_sites"}), StepSettings())
    assert scores.policy_logp is None
    assert scores.divergence is not None


def test_padding_on_either_side_changes_nothing(model):
    plain = rollouts([[7, 8]], [[11, 12]])
    padded = rollouts([[0, 0, 7, 8]], [[11, 12, 0]])
    padded["prompt_mask"][:, :2] = 0
    padded["completion_mask"][:, 2] = 0
    one, other = (
        score_packed(model, tensors, NEEDS, StepSettings()) for tensors in (plain, padded)
    )
    assert torch.equal(one.policy_logp, other.policy_logp[:, :2])
    assert other.policy_logp[0, 2] == 0


def test_the_log_prob_of_a_long_action_is_summed_without_drift():
    """In fp32 the tokens' own rounding is all that is left, not that of a running sum."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 56, (1, 2000), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    tensors = {}
    for side in ("chosen", "rejected"):
        tensors[f"dpo_{side}_input_ids"] = ids
        tensors[f"dpo_{side}_attention_mask"] = torch.ones_like(ids)
        tensors[f"dpo_{side}_response_mask"] = mask
    single = tiny_families.tiny_model("llama", dtype=torch.float32)
    with torch.no_grad():
        logp = score_packed(single, tensors, NEEDS, StepSettings()).chosen_logp
        logits = single(ids).logits[0, :-1].double().log_softmax(-1)
    exact = logits.gather(-1, ids[0, 1:, None]).sum()
    assert exact < -5000
    # An ulp is 5e-4 there; adding up one after another was off by several times that.
    assert abs(float(logp[0]) - float(exact)) < 1e-3


def test_a_tile_of_logits_keeps_to_its_budget():
    head = OutputHead(torch.zeros(2**15, 4))
    assert head_tile_rows(head, CPU, TreeOptions(head_tile_mib=2)) == 16
    assert head_tile_rows(head, CPU, TreeOptions(head_tile_mib=1)) == 8
    huge = OutputHead(torch.zeros(2**20, 1))
    assert head_tile_rows(huge, CPU, TreeOptions(head_tile_mib=1)) == 1


@pytest.mark.parametrize("name", ["max_tokens", "head_tile_mib"])
def test_a_budget_of_nothing_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        TreeOptions(**{name: 0})
