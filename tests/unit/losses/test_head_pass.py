"""One head pass against the separate ones, in value, gradient, precision and edge cases."""

import gc
import math
import weakref
from dataclasses import replace

import pytest
import torch

from composer_replication.errors import ConfigError, DataError
from composer_replication.losses.divergence import DivergenceOptions
from composer_replication.losses.head import OutputHead, selected_logp
from composer_replication.losses.head_pass import ComparedTokens, ScoredTokens, head_pass
from composer_replication.losses.sdpo import fused_generalized_jsd

NUM_ROWS, HIDDEN, VOCAB = 11, 6, 13
JSD = {"beta": 0.5, "temperature": 1.0, "top_k": None, "top_k_from": "teacher", "tail": False}
JSD |= {"clip": None, "clip_value": None}
DIVERGENCES = {
    "jsd": {},
    "forward kl": {"beta": 0.0},
    "reverse kl": {"beta": 1.0},
    "tempered": {"temperature": 1.7},
    "top k with a tail": {"top_k": 4, "tail": True},
    "top k of the policy": {"top_k": 4, "top_k_from": "policy"},
    "clipped by token": {"clip": "token", "clip_value": 0.05},
    "weighed by certainty": {"entropy_scale": 0.7},
}
HEADS = {
    "plain": {},
    "bias": {"has_bias": True},
    "soft cap and scale": {"softcap": 1.5, "logit_scale": 0.7},
}


class Case:
    """Leaves with gradients, tokens to score at two temperatures, and rows to compare."""

    def __init__(self, dtype=torch.float64, *, has_bias=False, softcap=None, logit_scale=1.0):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            values = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return values.to(dtype).requires_grad_()

        self.hidden, self.weight = normal(NUM_ROWS, HIDDEN), normal(VOCAB, HIDDEN)
        self.bias = normal(VOCAB) if has_bias else None
        self.teacher_hidden = normal(5, HIDDEN)
        self.teacher_weight = normal(VOCAB, HIDDEN)
        self.head = OutputHead(self.weight, self.bias, logit_scale, softcap)
        self.teacher_head = OutputHead(self.teacher_weight, None, logit_scale, softcap)
        # Row 3 predicts two tokens of each part, and no part has all rows.
        self.parts = [
            ScoredTokens(torch.tensor([3, 0, 9, 3]), torch.tensor([1, 2, 12, 0]), 0.8, True),
            ScoredTokens(torch.tensor([10, 3, 3, 1, 2]), torch.tensor([4, 4, 5, 6, 7])),
        ]
        self.compared_rows = torch.tensor([9, 0, 3, 9, 5])

    def compared(self, **changes):
        options = DivergenceOptions(**(JSD | changes))
        return ComparedTokens(self.compared_rows, self.teacher_hidden, self.teacher_head, options)

    def leaves(self):
        return [leaf for leaf in (self.hidden, self.weight, self.bias) if leaf is not None]


def weighted_sum(values):
    """A scalar in which every value has a weight of its own."""
    flat = torch.cat([value.reshape(-1) for value in values])
    return (flat * torch.linspace(-1, 2, len(flat), dtype=flat.dtype)).sum()


def ours(case, tile_rows, **changes):
    scores = head_pass(
        case.hidden, case.head, case.parts, case.compared(**changes), tile_rows=tile_rows
    )
    assert scores.entropy[1] is None
    return [*scores.logp, scores.entropy[0], scores.divergence]


def theirs(case, **changes):
    first, second = case.parts
    logp, entropy = selected_logp(
        case.hidden[first.rows], case.head, first.targets, temperature=0.8, return_entropy=True
    )
    other = selected_logp(case.hidden[second.rows], case.head, second.targets)
    divergence = fused_generalized_jsd(
        case.hidden[case.compared_rows],
        case.head,
        case.teacher_hidden,
        case.teacher_head,
        **(JSD | changes),
    )
    return [logp, other, entropy, divergence]


@pytest.mark.parametrize("tile_rows", [1, 4, 100])
@pytest.mark.parametrize("changes", DIVERGENCES.values(), ids=DIVERGENCES)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_one_pass_equals_a_pass_for_each_loss(head, changes, tile_rows):
    case = Case(**head)
    mine, expected = ours(case, tile_rows, **changes), theirs(case, **changes)
    for value, other in zip(mine, expected, strict=True):
        assert torch.allclose(value, other, rtol=1e-12, atol=1e-12)
    my_grads, their_grads = (
        torch.autograd.grad(weighted_sum(values), case.leaves()) for values in (mine, expected)
    )
    for grad, other in zip(my_grads, their_grads, strict=True):
        assert torch.allclose(grad, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("changes", DIVERGENCES.values(), ids=DIVERGENCES)
def test_an_excluded_entry_leaves_every_other_gradient_as_it_is(changes):
    """A bias of -inf excludes what pads a vocabulary; its row had lost its gradient."""
    case, without = Case(has_bias=True), Case(has_bias=True)
    kept = torch.arange(VOCAB) != 8
    bias = case.bias.detach().where(kept, -math.inf).requires_grad_()
    case.bias, case.head = bias, replace(case.head, bias=bias)
    case.teacher_head = replace(case.teacher_head, bias=torch.zeros(VOCAB).double() + bias.detach())
    mine, expected = ours(case, 4, **changes), theirs(case, **changes)
    for value, other in zip(mine, expected, strict=True):
        assert value.isfinite().all()
        assert torch.allclose(value, other, rtol=1e-12, atol=1e-12)
    my_grads, their_grads = (
        torch.autograd.grad(weighted_sum(values), case.leaves()) for values in (mine, expected)
    )
    for grad, other in zip(my_grads, their_grads, strict=True):
        assert grad.norm() > 0.1
        assert torch.allclose(grad, other, rtol=1e-11, atol=1e-12)
    # The log-probs are those of a vocabulary without the entry.
    smaller = OutputHead(without.weight[kept], without.bias[kept])
    targets = case.parts[1].targets
    assert (targets < 8).all()
    plain = selected_logp(without.hidden[case.parts[1].rows], smaller, targets)
    assert torch.allclose(mine[1], plain)


def test_a_hand_computed_row_has_its_log_probability_entropy_and_gradient():
    hidden = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.0], [2.0]], dtype=torch.float64).log().nan_to_num(neginf=0.0)
    tokens = ScoredTokens(torch.tensor([0]), torch.tensor([1]), with_entropy=True)
    scores = head_pass(hidden, OutputHead(weight), [tokens], tile_rows=8)
    # Logits (0, log 2): probabilities 1/3 and 2/3.
    expected = torch.tensor([2 / 3], dtype=torch.float64).log()
    assert torch.allclose(scores.logp[0], expected)
    third = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
    assert torch.allclose(scores.entropy[0], -(third * third.log()).sum())
    (grad,) = torch.autograd.grad(scores.logp[0].sum(), [hidden])
    assert grad.item() == pytest.approx(weight[1].item() / 3)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_the_gradient_passes_gradcheck(head):
    case = Case(**head)
    assert torch.autograd.gradcheck(
        lambda *_: weighted_sum(ours(case, 4)), case.leaves(), fast_mode=True
    )


def test_no_gradient_reaches_the_teacher():
    case = Case()
    weighted_sum(ours(case, 4)).backward()
    assert case.teacher_hidden.grad is None
    assert case.teacher_weight.grad is None
    assert case.hidden.grad is not None


def test_a_pass_whose_scores_are_dropped_frees_what_it_held():
    """A node that holds its own output is never freed: each step would keep its teacher's rows."""
    case = Case()
    case.teacher_hidden = case.teacher_hidden.detach().clone()
    teacher = weakref.ref(case.teacher_hidden)
    weighted_sum(ours(case, 4)).backward()
    del case
    gc.collect()
    assert teacher() is None


def test_rows_that_nobody_scores_get_no_gradient():
    case = Case()
    weighted_sum(ours(case, 4)).backward()
    silent = [row for row in range(NUM_ROWS) if row not in (0, 1, 2, 3, 5, 9, 10)]
    assert case.hidden.grad[silent].abs().max() == 0
    assert (case.hidden.grad[[0, 1, 2, 3, 5, 9, 10]].abs().amax(-1) > 0).all()


def test_garbage_in_an_unread_row_changes_nothing():
    clean, dirty = Case(), Case()
    with torch.no_grad():
        dirty.hidden[4], dirty.hidden[7] = float("nan"), float("inf")
    values, dirty_values = ours(clean, 4), ours(dirty, 4)
    for value, other in zip(values, dirty_values, strict=True):
        assert torch.equal(value, other)
    weighted_sum(values).backward()
    weighted_sum(dirty_values).backward()
    assert torch.equal(clean.hidden.grad, dirty.hidden.grad)
    assert torch.equal(clean.weight.grad, dirty.weight.grad)


def test_a_gradient_of_one_output_alone_needs_no_other():
    for index in range(4):
        case = Case()
        mine, expected = ours(case, 4)[index], theirs(case)[index]
        grads = (torch.autograd.grad(weighted_sum([v]), case.leaves()) for v in (mine, expected))
        for grad, other in zip(*grads, strict=True):
            assert torch.allclose(grad, other, rtol=1e-11, atol=1e-12)


def test_nothing_to_score_gives_empty_values_in_the_graph():
    case = Case()
    none = torch.empty(0, dtype=torch.long)
    tokens = ScoredTokens(none, none, with_entropy=True)
    scores = head_pass(case.hidden[:0], case.head, [tokens], tile_rows=4)
    assert scores.logp[0].shape == scores.entropy[0].shape == (0,)
    scores.logp[0].sum().backward()
    assert case.weight.grad.abs().max() == 0


def test_without_gradients_only_values_are_computed():
    case = Case()
    with torch.no_grad():
        for value, other in zip(ours(case, 4), theirs(case), strict=True):
            assert torch.allclose(value, other, rtol=1e-12, atol=1e-12)
            assert not value.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_fp32_whatever_the_model_computes_in(dtype):
    case = Case(dtype)
    mine, expected = ours(case, 4), theirs(case)
    assert all(value.dtype == torch.float32 for value in mine)
    for value, other in zip(mine, expected, strict=True):
        assert torch.allclose(value, other, rtol=1e-5, atol=1e-5)
    grads = (torch.autograd.grad(weighted_sum(v), case.leaves()) for v in (mine, expected))
    for grad, other in zip(*grads, strict=True):
        assert grad.dtype == dtype
        # Ours rounds the sum of all losses' gradients once, theirs each before summing.
        assert (grad - other).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * other.norm()


def test_a_frozen_head_gets_no_gradient_and_the_hidden_rows_the_same_one():
    case, frozen = Case(), Case()
    frozen.weight.requires_grad_(False)
    weighted_sum(ours(case, 4)).backward()
    weighted_sum(ours(frozen, 4)).backward()
    assert frozen.weight.grad is None
    assert torch.allclose(frozen.hidden.grad, case.hidden.grad, rtol=1e-13, atol=0)


def test_sizes_that_do_not_match_are_refused():
    case = Case()
    with pytest.raises(DataError, match="hidden size 6 but its head takes 4"):
        head_pass(case.hidden, OutputHead(torch.zeros(VOCAB, 4)), case.parts, tile_rows=4)
    wide = OutputHead(torch.zeros(VOCAB + 1, HIDDEN, dtype=torch.float64))
    with pytest.raises(DataError, match="14 vocabulary entries and the teacher 13"):
        head_pass(case.hidden, wide, case.parts, case.compared(), tile_rows=4)
    cold = [ScoredTokens(case.compared_rows, case.compared_rows, 0.0)]
    with pytest.raises(ConfigError, match="temperature is 0"):
        head_pass(case.hidden, case.head, cold, tile_rows=4)
