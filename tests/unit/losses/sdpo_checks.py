"""Claims about the divergence; each takes the module under test, so mutants can be tried too."""

import itertools
import math

import loss_oracles
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from composer_replication.errors import ConfigError, DataError
from composer_replication.losses.head import OutputHead

BETAS = (0.0, 0.2, 0.5, 0.9, 1.0)
OPTIONS = (
    {},
    {"temperature": 1.7},
    {"top_k": 4},
    {"top_k": 4, "top_k_from": "policy"},
    {"top_k": 4, "tail": True},
    {"top_k": 3, "top_k_from": "policy", "tail": True, "temperature": 0.6},
    {"top_k": 1, "tail": True},
    {"top_k": 11, "tail": True},
    {"clip": "token", "clip_value": 0.2},
    {"clip": "entry", "clip_value": 0.05},
    {"top_k": 4, "tail": True, "clip": "entry", "clip_value": 0.02},
    {"top_k": 4, "clip": "token", "clip_value": 0.1, "temperature": 1.3},
    {"entropy_scale": 0.7},
    {"top_k": 4, "tail": True, "clip": "entry", "clip_value": 0.05, "entropy_scale": 2.0},
    {"top_k": 4, "temperature": 1.3, "clip": "token", "clip_value": 0.02, "entropy_scale": 1.0},
)
CASES = tuple((beta, options) for beta in BETAS for options in OPTIONS)


def logits(*shape, seed=0, scale=1.5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).mul(scale).to(dtype)


def value_and_grad(function, policy_logits):
    leaf = policy_logits.detach().requires_grad_()
    value = function(leaf)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), grad


def jsd(sdpo, teacher_logits, **options):
    return lambda policy_logits: sdpo.generalized_jsd(policy_logits, teacher_logits, **options)


def small_vocabulary_cases(num_vocab):
    return [case for case in CASES if case[1].get("top_k", 0) <= num_vocab]


def equals_the_plain_python_oracle(sdpo):
    policy, teacher = logits(2, 3, 11), logits(2, 3, 11, seed=1)
    for beta, options in CASES:
        value = sdpo.generalized_jsd(policy, teacher, beta=beta, **options)
        expected = loss_oracles.divergence(policy, teacher, beta=beta, **options)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


def equals_values_worked_out_by_hand(sdpo):
    # p = (1/2, 1/2), t = (3/4, 1/4).
    policy = torch.zeros(1, 2, dtype=torch.float64)
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    by_hand = {
        # KL(t || p) = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.3040988 - 0.1732868
        0.0: 0.1308120,
        # m = 3/4 p + 1/4 t = (9/16, 7/16)
        # KL(t || m) = 3/4 ln(4/3) + 1/4 ln(4/7) = 0.2157616 - 0.1399040 = 0.0758576
        # KL(p || m) = 1/2 ln(8/9) + 1/2 ln(8/7) = -0.0588915 + 0.0667657 = 0.0078742
        # 1/4 * 0.0758576 + 3/4 * 0.0078742
        0.25: 0.0248700,
        # m = (5/8, 3/8): KL(t || m) = 3/4 ln(6/5) + 1/4 ln(2/3) = 0.1367412 - 0.1013663 = 0.0353749
        # KL(p || m) = 1/2 ln(4/5) + 1/2 ln(4/3) = 0.0322693; their mean
        0.5: 0.0338221,
        # KL(p || t) = 1/2 ln(2/3) + 1/2 ln(2) = 0.1438410
        1.0: 0.1438410,
    }
    for beta, expected in by_hand.items():
        value = sdpo.generalized_jsd(policy, teacher, beta=beta)
        assert value.tolist() == pytest.approx([expected], abs=2e-7)


def a_token_counts_as_much_as_its_teacher_is_sure(sdpo):
    # t = (3/4, 1/4) has the entropy 3/4 ln(4/3) + 1/4 ln 4 = 0.2157616 + 0.3465736 = 0.5623351,
    # so the token's KL of 0.1308120 counts exp(-0.5623351 / 2) = 0.7549017 of itself.
    policy = torch.zeros(1, 2, dtype=torch.float64)
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    value = sdpo.generalized_jsd(policy, teacher, beta=0.0, entropy_scale=2.0)
    assert value.tolist() == pytest.approx([0.1308120 * 0.7549017], abs=2e-7)
    policies, teachers = logits(6, 9), logits(6, 9, seed=1)
    full, full_grad = value_and_grad(jsd(sdpo, teachers), policies)
    weighed, grad = value_and_grad(jsd(sdpo, teachers, entropy_scale=0.5), policies)
    weights = weighed / full
    assert ((weights > 0) & (weights < 1)).all()
    torch.testing.assert_close(grad, full_grad * weights[:, None])
    sure = torch.tensor([[800.0, 0.0, 0.0]], dtype=torch.float64)
    plain = sdpo.generalized_jsd(torch.zeros_like(sure), sure)
    torch.testing.assert_close(
        sdpo.generalized_jsd(torch.zeros_like(sure), sure, entropy_scale=1e-3), plain
    )


def gradient_equals_finite_differences(sdpo):
    policy, teacher = logits(3, 7, seed=2).requires_grad_(), logits(3, 7, seed=3)
    for beta, options in small_vocabulary_cases(7):
        # Clip by token is a constant factor, so finite differences see another function.
        if options.get("clip") != "token":
            torch.autograd.gradcheck(jsd(sdpo, teacher, beta=beta, **options), (policy,))


def teacher_gets_no_gradient(sdpo):
    policy = logits(2, 3, 7).requires_grad_()
    teacher = logits(2, 3, 7, seed=1).requires_grad_()
    sdpo.generalized_jsd(policy, teacher).sum().backward()
    assert policy.grad.abs().max() > 0
    assert teacher.grad is None
    hidden, weight = logits(4, 5).requires_grad_(), logits(7, 5, seed=1).requires_grad_()
    teacher_hidden, teacher_head = logits(4, 5, seed=2).requires_grad_(), weight * 1.1
    teacher_head.retain_grad()
    sdpo.fused_generalized_jsd(hidden, weight, teacher_hidden, teacher_head).sum().backward()
    assert hidden.grad.abs().max() > 0
    assert teacher_hidden.grad is None
    assert teacher_head.grad is None


def token_clip_scales_value_and_gradient(sdpo):
    policy, teacher = logits(6, 9), logits(6, 9, seed=1)
    full, full_grad = value_and_grad(jsd(sdpo, teacher), policy)
    limit = full.median().item()
    clipped, grad = value_and_grad(jsd(sdpo, teacher, clip="token", clip_value=limit), policy)
    torch.testing.assert_close(clipped, full.clamp(max=limit))
    torch.testing.assert_close(grad, full_grad * (limit / full).clamp(max=1)[:, None])


def entry_clip_reproduces_the_sign_quirks_of_opsd(sdpo):
    # OPSD clips only positive terms: a teacher with 0.8 on one of 1000 tokens and a uniform policy
    # have KL 5.03, which becomes 0.05 + sum of the negative rest = 0.05 + 0.2 ln(0.2 / 0.999).
    teacher = torch.full((1, 1000), math.log(0.2 / 999), dtype=torch.float64)
    teacher[0, 0] = math.log(0.8)
    policy = torch.zeros(1, 1000, dtype=torch.float64)
    full, full_grad = value_and_grad(lambda z: sdpo.generalized_jsd(z, teacher, beta=0.0), policy)
    value, grad = value_and_grad(
        lambda z: sdpo.generalized_jsd(z, teacher, beta=0.0, clip="entry", clip_value=0.05), policy
    )
    assert full.item() == pytest.approx(0.8 * math.log(800) + 0.2 * math.log(0.2 / 0.999))
    assert value.item() == pytest.approx(0.05 + 0.2 * math.log(0.2 / 0.999))
    assert value.item() < 0
    # The clipped entry's own term is gone: descent now lowers the teacher's favourite.
    assert full_grad[0, 0].item() == pytest.approx(0.001 - 0.8)
    assert grad[0, 0].item() == pytest.approx(0.001 * 0.2)


def garbage_shows_in_its_own_token_and_masked_changes_nothing(sdpo):
    policy, teacher = logits(6, 9), logits(6, 9, seed=1)
    loss_mask = torch.tensor([True, False, True, False, False, True])
    dirty_policy, dirty_teacher = policy.clone(), teacher.clone()
    dirty_policy[1], dirty_policy[3] = math.nan, -math.inf
    dirty_teacher[3], dirty_teacher[4] = math.inf, math.nan
    for beta, options in small_vocabulary_cases(9):
        clean_jsd = jsd(sdpo, teacher, beta=beta, **options)
        dirty_jsd = jsd(sdpo, dirty_teacher, beta=beta, **options)
        value, grad = value_and_grad(masked_by(loss_mask, clean_jsd), policy)
        dirty, dirty_grad = value_and_grad(masked_by(loss_mask, dirty_jsd), dirty_policy)
        assert not dirty_jsd(dirty_policy)[[1, 3, 4]].isfinite().any()
        torch.testing.assert_close(dirty, value, rtol=0, atol=0)
        torch.testing.assert_close(dirty_grad, grad, rtol=0, atol=0)


def masked_by(loss_mask, function):
    return lambda policy_logits: torch.where(loss_mask, function(policy_logits), 0.0)


def garbage_hidden_rows_leave_gradients_of_head_and_others_alone(sdpo):
    hidden, teacher, weight = logits(6, 5), logits(6, 5, seed=1), logits(9, 5, seed=2)
    loss_mask = torch.tensor([True, False, True, False, True, True])
    dirty, dirty_teacher = hidden.clone(), teacher.clone()
    dirty[1], dirty[3, 2], dirty_teacher[3] = math.nan, math.inf, math.inf

    for softcap in (None, 2.0):

        def grads(policy_hidden, teacher_hidden, softcap=softcap):
            h, w = policy_hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            heads = OutputHead(w, softcap=softcap), OutputHead(weight, softcap=softcap)
            value = sdpo.fused_generalized_jsd(h, heads[0], teacher_hidden, heads[1], tile_rows=4)
            return torch.autograd.grad(torch.where(loss_mask, value, 0.0).sum(), (h, w))

        torch.testing.assert_close(grads(dirty, dirty_teacher), grads(hidden, teacher))


def excluded_entries_stay_finite_where_the_divergence_is(sdpo):
    policy, teacher = logits(1, 6), logits(1, 6, seed=1)
    both = [x.clone().index_fill_(1, torch.tensor([2]), -math.inf) for x in (policy, teacher)]
    policy_only = policy.clone().index_fill_(1, torch.tensor([4]), -math.inf)
    teacher_only = teacher.clone().index_fill_(1, torch.tensor([4]), -math.inf)
    finite_cases = [
        *((beta, both[0], both[1]) for beta in BETAS),
        *((beta, policy, teacher_only) for beta in (0.0, 0.2, 0.5, 0.9)),
        *((beta, policy_only, teacher) for beta in (0.2, 0.5, 0.9, 1.0)),
    ]
    for beta, p, t in finite_cases:
        value, grad = value_and_grad(jsd(sdpo, t, beta=beta), p)
        torch.testing.assert_close(value, loss_oracles.divergence(p, t, beta=beta))
        assert grad.isfinite().all()
        with_tail = {"top_k": 2, "tail": True, "beta": beta}
        value, grad = value_and_grad(jsd(sdpo, t, **with_tail), p)
        torch.testing.assert_close(value, loss_oracles.divergence(p, t, **with_tail))
        assert grad.isfinite().all()


def an_infinite_divergence_is_infinite_with_zero_gradient(sdpo):
    policy, teacher = logits(2, 6), logits(2, 6, seed=1)
    blocked = torch.tensor([4])
    for beta, p, t in (
        (0.0, policy.index_fill(1, blocked, -math.inf), teacher),
        (1.0, policy, teacher.index_fill(1, blocked, -math.inf)),
    ):
        value, grad = value_and_grad(jsd(sdpo, t, beta=beta), p)
        assert value.tolist() == [math.inf, math.inf]
        assert grad.eq(0).all()
        capped = sdpo.generalized_jsd(p, t, beta=beta, clip="token", clip_value=0.3)
        assert capped.tolist() == pytest.approx([0.3, 0.3])


def micro_batches_sum_to_one_large_batch(sdpo):
    policy, teacher = logits(7, 9), logits(7, 9, seed=1)
    hidden, teacher_hidden, weight = logits(7, 5), logits(7, 5, seed=1), logits(9, 5, seed=2)
    parts = (slice(0, 3), slice(3, 7))
    for beta, options in small_vocabulary_cases(9):
        options = {"beta": beta, **options}
        whole, whole_grad = value_and_grad(jsd(sdpo, teacher, **options), policy)
        split = [
            value_and_grad(jsd(sdpo, teacher[part], **options), policy[part]) for part in parts
        ]
        torch.testing.assert_close(torch.cat([value for value, _ in split]), whole)
        torch.testing.assert_close(torch.cat([grad for _, grad in split]), whole_grad)

    def head_grad(part):
        w = weight.clone().requires_grad_()
        value = sdpo.fused_generalized_jsd(hidden[part], w, teacher_hidden[part], weight)
        return torch.autograd.grad(value.sum(), w)[0]

    torch.testing.assert_close(head_grad(parts[0]) + head_grad(parts[1]), head_grad(slice(0, 7)))


def no_tokens_give_an_empty_result_in_the_graph(sdpo):
    policy = torch.zeros(2, 0, 9, dtype=torch.float64, requires_grad=True)
    value = sdpo.generalized_jsd(policy, torch.zeros(2, 0, 9, dtype=torch.float64))
    assert value.shape == (2, 0)
    assert value.sum().item() == 0
    value.sum().backward()
    assert policy.grad.shape == (2, 0, 9)
    hidden = torch.zeros(0, 5, requires_grad=True)
    weight = torch.randn(9, 5, requires_grad=True)
    fused = sdpo.fused_generalized_jsd(hidden, weight, torch.zeros(0, 5), weight)
    assert fused.sum().item() == 0
    fused.sum().backward()
    assert hidden.grad.shape == (0, 5)
    assert weight.grad.eq(0).all()


def zero_valid_labels_give_zero_loss_and_zero_gradient(sdpo):
    labels = torch.full((2, 3), -100)
    policy, teacher = logits(2, 3, 7), logits(2, 3, 7, seed=1)
    policy[0, 0], teacher[1, 1] = math.nan, math.nan
    for reduction in ("batchmean", "sum", "mean", "none"):
        value, grad = value_and_grad(
            lambda z, r=reduction: sdpo.generalized_jsd_loss(z, teacher, labels, reduction=r),
            policy,
        )
        assert value.eq(0).all()
        assert grad.eq(0).all()


def reductions_divide_as_opsd(sdpo):
    policy, teacher = logits(2, 3, 7), logits(2, 3, 7, seed=1)
    labels = torch.tensor([[5, -100, 1], [-100, 0, 2]])
    tokens = loss_oracles.divergence(policy, teacher)
    valid = tokens[labels != -100]
    as_opsd = {
        ("batchmean", True): valid.sum() / 4,
        ("batchmean", False): tokens.sum() / 2,
        ("sum", True): valid.sum(),
        ("sum", False): tokens.sum(),
        ("mean", True): valid.sum() / (4 * 7),
        ("mean", False): tokens.sum() / (6 * 7),
        ("none", True): tokens * (labels != -100),
        ("none", False): tokens,
    }
    for (reduction, with_labels), expected in as_opsd.items():
        value = sdpo.generalized_jsd_loss(
            policy, teacher, labels if with_labels else None, reduction=reduction
        )
        torch.testing.assert_close(value, expected)
    kept = {"top_k": 3, "beta": 0.0}
    value = sdpo.generalized_jsd_loss(policy, teacher, reduction="mean", **kept)
    torch.testing.assert_close(
        value, loss_oracles.divergence(policy, teacher, **kept).sum() / (6 * 3)
    )


def endpoints_are_not_limits_of_the_formula(sdpo):
    policy, teacher = logits(1, 9), logits(1, 9, seed=1)
    for end, near in ((0.0, 1e-6), (1.0, 1 - 1e-6)):
        at_end = sdpo.generalized_jsd(policy, teacher, beta=end).item()
        near_end = sdpo.generalized_jsd(policy, teacher, beta=near).item()
        assert at_end > 0.1
        assert near_end == pytest.approx(1e-6 * at_end, rel=1e-3)


def close_bf16_pair(gap, beta, *, num_rows=4, num_vocab=16_000):
    """bf16 logits of a policy and a teacher that differ by about `gap`, rounded to bf16."""
    generator = torch.Generator().manual_seed(int(1e6 * gap) + int(10 * beta))
    policy = torch.randn(num_rows, num_vocab, generator=generator).mul_(3).bfloat16()
    moved = torch.rand(num_rows, num_vocab, generator=generator) < gap
    # One bf16 step on a share of the entries: the smallest difference that bf16 logits can have.
    bits = policy.view(torch.int16) + moved.to(torch.int16)
    return policy, bits.view(torch.bfloat16)


def bf16_inputs_keep_one_percent_of_fp64(sdpo):
    seen = []
    for beta, gap in itertools.product((0.0, 0.1, 0.5, 0.9, 1.0), (1.0, 0.1, 0.01, 0.003)):
        policy, teacher = close_bf16_pair(gap, beta)
        value = sdpo.generalized_jsd(policy, teacher, beta=beta)
        assert value.dtype == torch.float32
        exact = naive_divergence(policy.double(), teacher.double(), beta)
        assert (value >= 0).all()
        large_enough = exact >= 1e-7
        seen.append(exact[large_enough])
        torch.testing.assert_close(
            value.double()[large_enough], exact[large_enough], rtol=1e-2, atol=0
        )
    # The claim must have been tried where it is hard.
    assert torch.cat(seen).min() < 1e-6


def naive_divergence(policy, teacher, beta):
    """The textbook sum; only good in fp64."""
    log_p, log_t = policy.log_softmax(-1), teacher.log_softmax(-1)
    if beta in (0, 1):
        a, b = (log_t, log_p) if beta == 0 else (log_p, log_t)
        return (a.exp() * (a - b)).sum(-1)
    log_m = torch.logaddexp(log_p + math.log(1 - beta), log_t + math.log(beta))
    kl_teacher = (log_t.exp() * (log_t - log_m)).sum(-1)
    return beta * kl_teacher + (1 - beta) * (log_p.exp() * (log_p - log_m)).sum(-1)


def almost_equal_distributions_are_never_negative(sdpo):
    # With two entries no other entry's positive term can hide a negative one.
    for beta, exponent, num_vocab in itertools.product(BETAS, range(1, 8), (2, 257)):
        shape = (4000 // num_vocab, num_vocab)
        policy = logits(*shape, seed=exponent, scale=4.0, dtype=torch.float32)
        teacher = policy + 10.0**-exponent * logits(*shape, seed=99, dtype=torch.float32)
        assert (sdpo.generalized_jsd(policy, teacher, beta=beta) >= 0).all()
        assert sdpo.generalized_jsd(policy, policy.clone(), beta=beta).eq(0).all()


def far_apart_distributions_stay_exact_in_fp32(sdpo):
    policy, teacher = logits(8, 50, scale=12.0), logits(8, 50, seed=1, scale=12.0)
    for beta in BETAS:
        value, grad = value_and_grad(jsd(sdpo, teacher.float(), beta=beta), policy.float())
        exact, exact_grad = value_and_grad(
            lambda z, beta=beta: naive_divergence(z, teacher, beta), policy
        )
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
        # Log-ratios reach 80 here, and half a unit in the last place of 80 is 4e-6.
        torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=3e-5)


def head_pairs():
    """Policy and teacher heads of every kind, hidden sizes 5 and 4, vocabulary 11."""
    weight, teacher_weight = logits(11, 5, seed=5), logits(11, 4, seed=6)
    bias = logits(11, seed=7)
    return {
        "plain": (OutputHead(weight), OutputHead(teacher_weight)),
        "bias": (OutputHead(weight, bias), OutputHead(teacher_weight)),
        "softcap": (OutputHead(weight, softcap=2.0), OutputHead(teacher_weight, softcap=3.0)),
        "all": (OutputHead(weight, bias, 0.7, 2.5), OutputHead(teacher_weight, bias, 1.2)),
    }


def fused_equals_slow_for_every_option_and_head(sdpo):
    hidden, teacher = logits(7, 5, seed=8), logits(7, 4, seed=9)
    incoming = logits(7, seed=10)
    for (beta, options), (policy_head, teacher_head) in itertools.product(
        CASES, head_pairs().values()
    ):
        leaves = [x for x in (hidden, policy_head.weight, policy_head.bias) if x is not None]
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        head = OutputHead(
            leaves[1],
            leaves[2] if len(leaves) > 2 else None,
            policy_head.logit_scale,
            policy_head.softcap,
        )
        fused = sdpo.fused_generalized_jsd(
            leaves[0], head, teacher, teacher_head, beta=beta, tile_rows=3, **options
        )
        slow = sdpo.generalized_jsd(
            head.logits(leaves[0]), teacher_head.logits(teacher), beta=beta, **options
        )
        torch.testing.assert_close(fused, slow)
        fused_grads = torch.autograd.grad((fused * incoming).sum(), leaves)
        slow_grads = torch.autograd.grad((slow * incoming).sum(), leaves)
        for fused_grad, slow_grad in zip(fused_grads, slow_grads, strict=True):
            torch.testing.assert_close(fused_grad, slow_grad)


class TensorLog(TorchDispatchMode):
    """Largest tensor made and number of matrix products run."""

    largest, products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        return out


def fused_never_builds_tokens_by_vocabulary(sdpo):
    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(100, 4)
    for options in ({}, {"top_k": 5, "tail": True}, {"clip": "entry", "clip_value": 0.1}):
        with TensorLog() as log:
            sdpo.fused_generalized_jsd(
                hidden, weight, torch.randn(64, 4), weight, tile_rows=8, **options
            ).sum().backward()
        assert log.largest <= 8 * 100
        # A frozen head: two projections and the gradient of hidden, for each of 8 tiles.
        assert log.products == 3 * 8


def a_vocabulary_larger_than_a_block_changes_nothing(sdpo):
    # Elementwise work goes in blocks of 2**22 logits: four rows of this vocabulary, so two blocks.
    num_vocab = 2**20
    hidden, teacher = logits(5, 3), logits(5, 3, seed=1)
    weight = logits(num_vocab, 3, seed=2, scale=0.5)
    for options in ({}, {"beta": 0.0, "top_k": 40, "tail": True}):
        dense = jsd(sdpo, teacher @ weight.T, **options)
        value, grad = value_and_grad(dense, hidden @ weight.T)
        rows = [
            value_and_grad(jsd(sdpo, teacher[i : i + 1] @ weight.T, **options), z)
            for i, z in enumerate((hidden @ weight.T).split(1))
        ]
        torch.testing.assert_close(value, torch.cat([row_value for row_value, _ in rows]))
        torch.testing.assert_close(grad, torch.cat([row_grad for _, row_grad in rows]))
        fused, fused_grad = value_and_grad(
            lambda h, options=options: sdpo.fused_generalized_jsd(
                h, weight, teacher, weight, **options
            ),
            hidden,
        )
        torch.testing.assert_close(fused, value)
        torch.testing.assert_close(fused_grad, grad @ weight)


def without_gradients_fused_only_projects(sdpo):
    hidden, weight = torch.randn(8, 4, requires_grad=True), torch.randn(100, 4)
    with torch.no_grad(), TensorLog() as log:
        value = sdpo.fused_generalized_jsd(hidden, weight, torch.randn(8, 4), weight)
    assert not value.requires_grad
    assert log.products == 2


def half_precision_hidden_and_head_give_fp32_divergences(sdpo):
    hidden = logits(5, 16, dtype=torch.float32)
    teacher = hidden + 0.3 * logits(5, 16, seed=1, dtype=torch.float32)
    weight = logits(40, 16, seed=2, dtype=torch.float32)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for hidden_dtype, head_dtype in itertools.product(dtypes, dtypes):
        h, w = hidden.to(hidden_dtype), weight.to(head_dtype)
        t = teacher.to(hidden_dtype)

        def run(h, w, t, autocast=False):
            h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                value = sdpo.fused_generalized_jsd(h, w, t, w, tile_rows=2)
            value.sum().backward()
            return value, h.grad, w.grad

        value, h_grad, w_grad = run(h, w, t)
        exact, exact_h_grad, exact_w_grad = run(h.double(), w.double(), t.double())
        assert value.dtype == torch.float32
        assert (h_grad.dtype, w_grad.dtype) == (hidden_dtype, head_dtype)
        torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-6)
        # Only the result is rounded to the input's precision, not the sums on the way.
        for grad, exact_grad in ((h_grad, exact_h_grad), (w_grad, exact_w_grad)):
            rounding = torch.finfo(grad.dtype).eps
            torch.testing.assert_close(grad.double(), exact_grad, rtol=rounding + 1e-4, atol=1e-6)
        for plain, cast in zip((value, h_grad, w_grad), run(h, w, t, autocast=True), strict=True):
            torch.testing.assert_close(cast, plain, rtol=0, atol=0)


def impossible_options_say_what_to_do(sdpo):
    policy, teacher = torch.zeros(2, 7), torch.zeros(2, 7)
    for options, words in (
        ({"beta": -0.1}, "beta is -0.1"),
        ({"beta": 1.5}, "beta is 1.5"),
        ({"beta": math.nan}, "beta is nan"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": -1.0}, "above 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 8}, "vocabulary has 7"),
        ({"top_k": 1}, "tail=True"),
        ({"top_k": 3, "top_k_from": "techer"}, "Did you mean 'teacher'"),
        ({"tail": True}, "without top_k"),
        ({"clip": "token"}, "clip_value is None"),
        ({"clip_value": 0.1}, "clip is None"),
        ({"clip": "tokens", "clip_value": 0.1}, "Did you mean 'token'"),
        ({"clip": "entry", "clip_value": 0.0}, "above 0"),
        ({"entropy_scale": 0.0}, "entropy_scale is 0.0; .* above 0 nats"),
    ):
        with pytest.raises(ConfigError, match=words):
            sdpo.generalized_jsd(policy, teacher, **options)
    with pytest.raises(ConfigError, match="Did you mean 'batchmean'"):
        sdpo.generalized_jsd_loss(policy[None], teacher[None], reduction="batchmeen")
    with pytest.raises(DataError, match="policy has 7 vocabulary entries and the teacher 8"):
        sdpo.generalized_jsd(policy, torch.zeros(2, 8))
    with pytest.raises(DataError, match="vocabulary has 1 entry"):
        sdpo.generalized_jsd(torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(DataError, match="policy has 7 vocabulary entries and the teacher 8"):
        sdpo.fused_generalized_jsd(
            torch.zeros(2, 3), torch.zeros(7, 3), torch.zeros(2, 3), torch.zeros(8, 3)
        )
    with pytest.raises(DataError, match="hidden size 3 but its head takes 4"):
        sdpo.fused_generalized_jsd(
            torch.zeros(2, 3), OutputHead(torch.zeros(7, 4)), torch.zeros(2, 3), torch.zeros(7, 3)
        )
    with pytest.raises(ConfigError, match="tile_rows is 0"):
        sdpo.fused_generalized_jsd(
            torch.zeros(2, 3), torch.zeros(7, 3), torch.zeros(2, 3), torch.zeros(7, 3), tile_rows=0
        )


ALL = (
    equals_the_plain_python_oracle,
    equals_values_worked_out_by_hand,
    gradient_equals_finite_differences,
    teacher_gets_no_gradient,
    token_clip_scales_value_and_gradient,
    a_token_counts_as_much_as_its_teacher_is_sure,
    entry_clip_reproduces_the_sign_quirks_of_opsd,
    garbage_shows_in_its_own_token_and_masked_changes_nothing,
    garbage_hidden_rows_leave_gradients_of_head_and_others_alone,
    excluded_entries_stay_finite_where_the_divergence_is,
    an_infinite_divergence_is_infinite_with_zero_gradient,
    micro_batches_sum_to_one_large_batch,
    no_tokens_give_an_empty_result_in_the_graph,
    zero_valid_labels_give_zero_loss_and_zero_gradient,
    reductions_divide_as_opsd,
    endpoints_are_not_limits_of_the_formula,
    bf16_inputs_keep_one_percent_of_fp64,
    almost_equal_distributions_are_never_negative,
    far_apart_distributions_stay_exact_in_fp32,
    fused_equals_slow_for_every_option_and_head,
    fused_never_builds_tokens_by_vocabulary,
    a_vocabulary_larger_than_a_block_changes_nothing,
    without_gradients_fused_only_projects,
    half_precision_hidden_and_head_give_fp32_divergences,
    impossible_options_say_what_to_do,
)
