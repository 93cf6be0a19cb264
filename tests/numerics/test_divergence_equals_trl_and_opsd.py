import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from composer_replication.losses.head import OutputHead, selected_logp
from composer_replication.losses.sdpo import (
    fused_generalized_jsd,
    generalized_jsd,
    generalized_jsd_loss,
)

# TRL's and its dependencies' own warnings are not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore")

BETAS = (0.0, 0.3, 0.5, 1.0)


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).mul(1.5).to(dtype)


def assert_same_value_and_grads(ours, theirs, leaves, *, rtol, atol):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    incoming = normal(*ours.shape, seed=77, dtype=ours.dtype)
    our_grads = torch.autograd.grad(ours, leaves, incoming, allow_unused=True)
    their_grads = torch.autograd.grad(theirs, leaves, incoming, allow_unused=True)
    for our_grad, their_grad in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(our_grad, their_grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 1.4])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
@pytest.mark.parametrize("with_labels", [True, False])
def test_loss_equals_trl_gkd(beta, temperature, reduction, with_labels):
    from trl.experimental.gkd import GKDTrainer

    policy, teacher = normal(2, 4, 13).requires_grad_(), normal(2, 4, 13, seed=1)
    labels = torch.tensor([[-100, 3, 4, -100], [1, 2, -100, 5]]) if with_labels else None
    options = {"beta": beta, "temperature": temperature, "reduction": reduction}
    theirs = GKDTrainer.generalized_jsd_loss(policy, teacher, labels, **options)
    ours = generalized_jsd_loss(policy, teacher, labels, **options)
    assert_same_value_and_grads(ours, theirs, (policy,), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.8, 2.5)])
@pytest.mark.parametrize("is_head_trainable", [True, False])
def test_fused_equals_trl_chunked_divergence(beta, scale, softcap, is_head_trainable):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden = normal(9, 6, dtype=torch.float32).requires_grad_()
    weight = normal(17, 6, seed=1, dtype=torch.float32).requires_grad_(is_head_trainable)
    bias = normal(17, seed=2, dtype=torch.float32).requires_grad_(is_head_trainable)
    teacher = normal(9, 4, seed=3, dtype=torch.float32)
    teacher_weight = normal(17, 4, seed=4, dtype=torch.float32)
    theirs, _ = ChunkedDivergenceFunction.apply(
        hidden, weight, bias, teacher, teacher_weight, None, beta, 1.3, scale, softcap, 1.0, None
    )
    ours = fused_generalized_jsd(
        hidden,
        OutputHead(weight, bias, scale, softcap),
        teacher,
        teacher_weight,
        beta=beta,
        temperature=1.3,
        tile_rows=4,
    )
    leaves = (hidden, weight, bias) if is_head_trainable else (hidden,)
    assert_same_value_and_grads(ours, theirs, leaves, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.8, 2.5)])
def test_selected_logp_equals_trl_chunked_logprob(scale, softcap):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    hidden = normal(9, 6, dtype=torch.float32).requires_grad_()
    weight = normal(17, 6, seed=1, dtype=torch.float32).requires_grad_()
    bias = normal(17, seed=2, dtype=torch.float32).requires_grad_()
    targets = torch.arange(9)
    theirs = ChunkedLogProbFunction.apply(
        hidden, weight, bias, targets, 0.8, 5, softcap, scale, ("entropy",)
    )
    head = OutputHead(weight, bias, scale, softcap)
    ours = selected_logp(hidden, head, targets, temperature=0.8, return_entropy=True, tile_rows=4)
    incoming = normal(2, 9, seed=5, dtype=torch.float32)
    leaves = (hidden, weight, bias)
    grads = [torch.autograd.grad(pair, leaves, tuple(incoming)) for pair in (ours, theirs[:2])]
    torch.testing.assert_close(ours, theirs[:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_full_logits_equal_trl_sdpo(beta):
    from trl.experimental.sdpo.loss_utils import compute_full_logit_self_distillation_loss

    policy, teacher = normal(2, 4, 13).requires_grad_(), normal(2, 4, 13, seed=1)
    theirs = compute_full_logit_self_distillation_loss(policy, teacher, distillation_alpha=beta)
    ours = generalized_jsd(policy, teacher, beta=beta)
    assert_same_value_and_grads(ours, theirs, (policy,), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tail", [True, False])
def test_policy_top_k_equals_trl_sdpo(beta, tail):
    from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss

    policy, teacher = normal(2, 4, 13).requires_grad_(), normal(2, 4, 13, seed=1)
    theirs = compute_topk_self_distillation_loss(
        policy,
        teacher,
        distillation_topk=5,
        distillation_alpha=beta,
        distillation_add_tail=tail,
    )
    ours = generalized_jsd(policy, teacher, beta=beta, top_k=5, top_k_from="policy", tail=tail)
    assert_same_value_and_grads(ours, theirs, (policy,), rtol=1e-9, atol=1e-12)


def opsd_loss(student, teacher, labels, beta, temperature, reduction, top_k, token_clip):
    """generalized_jsd_loss of github.com/siyan-zhao/OPSD at 8ae338d, re-derived."""
    student, teacher = student / temperature, teacher / temperature
    if top_k is not None:
        kept = teacher.topk(top_k, dim=-1).indices
        student, teacher = student.gather(-1, kept), teacher.gather(-1, kept)
    student, teacher = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    if beta in (0, 1):
        pair = (student, teacher) if beta == 0 else (teacher, student)
        terms = F.kl_div(*pair, reduction="none", log_target=True)
    else:
        share = torch.tensor(beta, dtype=student.dtype)
        mixture = torch.logsumexp(
            torch.stack([student + torch.log(1 - share), teacher + torch.log(share)]), dim=0
        )
        terms = share * F.kl_div(mixture, teacher, reduction="none", log_target=True) + (
            1 - share
        ) * F.kl_div(mixture, student, reduction="none", log_target=True)
    if token_clip is not None:
        terms = terms.clamp(max=token_clip)
    num_valid = student.shape[0]
    if labels is not None:
        terms = terms[labels != -100]
        num_valid = (labels != -100).sum()
    return {
        "batchmean": terms.sum() / num_valid,
        "sum": terms.sum(),
        "mean": terms.mean(),
    }[reduction]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("token_clip", [None, 0.02])
def test_loss_equals_opsd(beta, top_k, token_clip):
    policy, teacher = normal(2, 4, 13).requires_grad_(), normal(2, 4, 13, seed=1)
    labels = torch.tensor([[-100, 3, 4, -100], [1, 2, -100, 5]])
    clip = {} if token_clip is None else {"clip": "entry", "clip_value": token_clip}
    for reduction, used in itertools.product(("batchmean", "sum", "mean"), (labels, None)):
        theirs = opsd_loss(policy, teacher, used, beta, 1.1, reduction, top_k, token_clip)
        ours = generalized_jsd_loss(
            policy,
            teacher,
            used,
            beta=beta,
            temperature=1.1,
            reduction=reduction,
            top_k=top_k,
            **clip,
        )
        assert_same_value_and_grads(ours, theirs, (policy,), rtol=1e-9, atol=1e-12)


def test_trl_full_logits_are_negative_in_bf16_where_ours_are_exact():
    from trl.experimental.sdpo.loss_utils import compute_full_logit_self_distillation_loss

    policy = normal(16, 4000, dtype=torch.bfloat16)
    teacher = policy + 0.01 * normal(16, 4000, seed=1, dtype=torch.bfloat16)
    theirs = compute_full_logit_self_distillation_loss(policy, teacher, distillation_alpha=0.5)
    exact = generalized_jsd(policy.double(), teacher.double())
    assert theirs.min() < 0 < exact.min()
    torch.testing.assert_close(generalized_jsd(policy, teacher).double(), exact, rtol=1e-3, atol=0)
