"""SDPO's gradient at a few tokens from the definition, to compare with what training computed.

Full logits, textbook sums in float64 and autograd: nothing of `losses.sdpo` is used. Letters: n
tokens, H hidden, V vocabulary, K entries that are compared.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from composer_replication.losses.head import OutputHead
from composer_replication.step.settings import SDPOSettings

TOLERANCE = 0.05
"""Of a row's gradient norm. Half precision rounds it by 1 %; another row, a swapped mixture or a
forgotten factor moves it by tens of percent."""


def plain_gradient(
    policy_hidden: Float[Tensor, "n H"],
    policy_head: OutputHead,
    teacher_hidden: Float[Tensor, "n G"],
    teacher_head: OutputHead,
    settings: SDPOSettings,
) -> Float[Tensor, "n H"]:
    """d(sum of the tokens' divergences) / d(policy_hidden) in fp32; `clip` "entry" is not known."""
    leaf = policy_hidden.detach().float().requires_grad_()
    with torch.enable_grad():
        policy = policy_head.logits(leaf).double() / settings.temperature
        teacher = teacher_head.logits(teacher_hidden.detach()).detach().double()
        divergence = _divergence(policy, teacher / settings.temperature, settings)
        (gradient,) = torch.autograd.grad(divergence.sum(), leaf)
    return gradient


def _divergence(
    policy: Float[Tensor, "n V"], teacher: Float[Tensor, "n V"], settings: SDPOSettings
) -> Float[Tensor, " n"]:
    p, t = _compared(policy.softmax(-1), teacher.softmax(-1), settings)
    beta = settings.beta
    if beta == 0:
        value = _kl(t, p)
    elif beta == 1:
        value = _kl(p, t)
    else:
        m = (1 - beta) * p + beta * t
        value = beta * _kl(t, m) + (1 - beta) * _kl(p, m)
    if settings.entropy_scale is not None:
        entropy = -torch.xlogy(t, t).sum(-1)
        value = value * torch.exp(-entropy / settings.entropy_scale)
    if settings.clip == "token" and settings.clip_value is not None:
        value = value * (settings.clip_value / value.detach()).clamp(max=1.0)
    return value


def _compared(
    p: Float[Tensor, "n V"], t: Float[Tensor, "n V"], settings: SDPOSettings
) -> tuple[Float[Tensor, "n K"], Float[Tensor, "n K"]]:
    """The entries that are compared: all, or the k largest of one side and perhaps the rest."""
    if settings.top_k is None:
        return p, t
    kept = (t if settings.top_k_from == "teacher" else p).topk(settings.top_k, dim=-1).indices
    first, second = p.gather(-1, kept), t.gather(-1, kept)
    if not settings.tail:
        return first / first.sum(-1, keepdim=True), second / second.sum(-1, keepdim=True)
    rest_p, rest_t = (side.scatter(-1, kept, 0.0).sum(-1, keepdim=True) for side in (p, t))
    return torch.cat([first, rest_p], -1), torch.cat([second, rest_t], -1)


def _kl(a: Float[Tensor, "n K"], b: Float[Tensor, "n K"]) -> Float[Tensor, " n"]:
    return (torch.xlogy(a, a) - torch.xlogy(a, b)).sum(-1)
