"""Generalized Jensen-Shannon divergence of two rows of logits, with its exact gradient.

Letters: n rows (tokens), V vocabulary, K entries of the support (V, or top-k and the rest).
p is the policy, t the teacher, m = (1 - beta) p + beta t; divergences are in nats. An in-place
function (trailing underscore) overwrites its logits: a tile at a vocabulary of 150k is large.

Nearly equal distributions are the normal case of self-distillation, and there the textbook sum
of a (log a - log b) is the difference of first-order terms that cancel: fp32 noise of 1e-7, of
either sign. Every sum here has second-order terms instead, which are equal because a and b each
sum to 1, and each of which is >= 0:

    KL(a || b) = sum a log(a/b) + (b - a),   b - a = a expm1(-log(a/b))
    D(m)       = sum max(p, t) h(s),         s = -|log(t/p)|, w = beta where t <= p else 1 - beta,
                 h = w e^s s - (1 + u) log1p(u), u = w expm1(s)

The second line is beta t log(t/m) + (1 - beta) p log(p/m) with m / max(p, t) = 1 + u.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from composer_replication.errors import ConfigError, nearest
from composer_replication.losses.head import check_temperature, compute_dtype, tiles

_SIDES = ("teacher", "policy")
_CLIPS = ("token", "entry")

_CPU_BLOCK_ELEMENTS = 2**22
"""Logits handled at once outside the matrix products: 16 MiB of fp32 per temporary. Blocks of
1 MiB stay in cache and are a third faster on an idle machine, but on a busy one the threads wait
for each other once per operation: a call of 3 s then takes 80 s."""

_GPU_BLOCK_ELEMENTS = 2**24
"""64 MiB of fp32 per temporary: enough work per kernel to hide its launch."""

_BLOCK_ELEMENTS = {"cpu": _CPU_BLOCK_ELEMENTS, "cuda": _GPU_BLOCK_ELEMENTS}
_BLOCKS_OF: ContextVar[str | None] = ContextVar("blocks_of", default=None)
"""Kind of device whose blocks are taken; None: that of the logits. See `blocks_of`."""


@dataclass(frozen=True, slots=True)
class DivergenceOptions:
    """Which divergence; see `losses.sdpo.generalized_jsd` for what each option means."""

    beta: float
    temperature: float
    top_k: int | None
    top_k_from: str
    tail: bool
    clip: str | None
    clip_value: float | None
    entropy_scale: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ConfigError(
                f"beta is {self.beta}; it mixes policy and teacher, so it must be within [0, 1]. "
                "0 is KL(teacher || policy), 1 is KL(policy || teacher), 0.5 weighs both."
            )
        check_temperature(self.temperature)
        self._check_support()
        self._check_clip()
        if self.entropy_scale is not None and not self.entropy_scale > 0:
            raise ConfigError(
                f"entropy_scale is {self.entropy_scale}; a token is weighed by exp(-entropy / "
                "entropy_scale), so it must be above 0 nats. Pass None to weigh all tokens alike."
            )

    def _check_support(self) -> None:
        if self.top_k_from not in _SIDES:
            raise ConfigError(
                f"top_k_from is {self.top_k_from!r}; the k largest entries are those of the "
                f"teacher or of the policy. {nearest(self.top_k_from, _SIDES)}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(
                f"top_k is {self.top_k}; without an entry there is nothing to compare. "
                "Pass 1 or more, or None for the whole vocabulary."
            )
        if self.top_k == 1 and not self.tail:
            raise ConfigError(
                "top_k is 1 without tail; one renormalised entry always has probability 1, so "
                "the divergence is always 0. Pass tail=True or a larger top_k."
            )
        if self.tail and self.top_k is None:
            raise ConfigError(
                "tail is True without top_k; the whole vocabulary leaves no rest to add. "
                "Set top_k or drop tail."
            )

    def _check_clip(self) -> None:
        if self.clip is not None and self.clip not in _CLIPS:
            raise ConfigError(
                f"clip is {self.clip!r}; a divergence is clipped by token or by entry. "
                f"{nearest(self.clip, _CLIPS)}"
            )
        if (self.clip is None) != (self.clip_value is None):
            raise ConfigError(
                f"clip is {self.clip!r} and clip_value is {self.clip_value}; one says what is "
                "clipped, the other at which value in nats, so neither works alone. Pass both."
            )
        if self.clip_value is not None and not self.clip_value > 0:
            raise ConfigError(
                f"clip_value is {self.clip_value}; no divergence would be left to train on. "
                "Pass a value above 0, in nats."
            )

    def num_entries(self, num_vocab: int) -> int:
        """Entries that one token's divergence sums over."""
        if self.top_k is None or self.top_k == num_vocab:
            return num_vocab
        return self.top_k + int(self.tail)


@contextmanager
def blocks_of(device_type: str) -> Generator[None]:
    """Within it, blocks are those of a `cpu` or a `cuda` device, wherever the logits are.

    For a simulation, whose tensors claim to be on the CPU.
    """
    token = _BLOCKS_OF.set(device_type)
    try:
        yield
    finally:
        _BLOCKS_OF.reset(token)


def blocks(logits: Float[Tensor, "n V"]) -> Iterator[slice]:
    """Slices of rows whose logits fill one block of elementwise work each."""
    device_type = _BLOCKS_OF.get() or logits.device.type
    num_elements = _BLOCK_ELEMENTS.get(device_type, _GPU_BLOCK_ELEMENTS)
    return tiles(logits.shape[0], max(1, num_elements // logits.shape[1]))


def divergence_(
    policy_logits: Float[Tensor, "n V"],
    teacher_logits: Float[Tensor, "n V"],
    options: DivergenceOptions,
    *,
    need_grad: bool,
) -> Float[Tensor, " n"]:
    """Divergence in nats of each row of tempered logits, and its gradient if needed.

    Overwrites both inputs; with `need_grad`, d/d policy_logits replaces `policy_logits`. A row
    whose divergence is not finite (nan logits, or an event that only one side allows) keeps that
    value and gets gradient 0, so a caller who masks it out is not poisoned by 0 * nan. The clip
    by token is left to the caller.
    """
    if options.top_k is None or options.top_k == policy_logits.shape[1]:
        return _support_divergence_(policy_logits, teacher_logits, options, need_grad=need_grad)
    chooser = teacher_logits if options.top_k_from == "teacher" else policy_logits
    kept = chooser.topk(options.top_k, dim=-1).indices
    support, rest_lse = _support(policy_logits, kept, options)
    teacher_support, _ = _support(teacher_logits, kept, options)
    values = _support_divergence_(support, teacher_support, options, need_grad=need_grad)
    if need_grad:
        # `_support` left -inf at the kept entries if there is a tail, so exp() is 0 there.
        if options.tail:
            rest_share = policy_logits.sub_(rest_lse).exp_().nan_to_num_(0.0)
            rest_share.mul_(support[:, options.top_k :])
        else:
            policy_logits.zero_()
        policy_logits.scatter_(-1, kept, support[:, : options.top_k])
    return values


class LogitDivergence(torch.autograd.Function):
    """`divergence_` of logits that exist in full; keeps their gradient from the forward on."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's own
        policy_logits: Tensor,
        teacher_logits: Tensor,
        options: DivergenceOptions,
        is_grad_enabled: bool,
    ) -> Tensor:
        """Policy and teacher logits [n, V], before temperature, to divergences [n]."""
        need_grad = is_grad_enabled and ctx.needs_input_grad[0]
        dtype = compute_dtype(policy_logits, teacher_logits)
        values = torch.empty(policy_logits.shape[0], dtype=dtype, device=policy_logits.device)
        grad = torch.empty_like(policy_logits, dtype=dtype) if need_grad else None
        for rows in blocks(policy_logits):
            policy = policy_logits[rows].to(dtype, copy=True).div_(options.temperature)
            teacher = teacher_logits[rows].to(dtype, copy=True).div_(options.temperature)
            values[rows] = divergence_(policy, teacher, options, need_grad=need_grad)
            if grad is not None:
                grad[rows] = policy.div_(options.temperature)
        if grad is not None:
            ctx.save_for_backward(policy_logits, grad)
        return values

    @staticmethod
    @once_differentiable  # pyright: ignore[reportUntypedFunctionDecorator]
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401 - torch's own
        *value_grads: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """Scale each row's gradient; nothing for the teacher."""
        policy_logits, grad = ctx.saved_tensors
        return (grad * value_grads[0][:, None]).to(policy_logits.dtype), None, None, None


def _support(
    logits: Float[Tensor, "n V"], kept: Int[Tensor, "n k"], options: DivergenceOptions
) -> tuple[Float[Tensor, "n K"], Float[Tensor, "n 1"]]:
    """The kept logits and, with a tail, the log-sum-exp of all others as one more entry.

    The rest is summed, not taken as log(1 - kept mass): that difference has no correct digit
    once the kept entries hold all but 1e-7 of the mass. Kept entries become -inf in `logits`.
    """
    chosen = logits.gather(-1, kept)
    if not options.tail:
        return chosen, chosen[:, :1]
    rest_lse = logits.scatter_(-1, kept, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([chosen, rest_lse], dim=-1), rest_lse


def _support_divergence_(
    policy_logits: Float[Tensor, "n K"],
    teacher_logits: Float[Tensor, "n K"],
    options: DivergenceOptions,
    *,
    need_grad: bool,
) -> Float[Tensor, " n"]:
    policy_lse = policy_logits.logsumexp(-1, keepdim=True)
    teacher_lse = teacher_logits.logsumexp(-1, keepdim=True)
    # log(t/p) from the logits' difference, which is exact when they are close; the difference
    # of two rounded log-probabilities is not.
    log_ratio = torch.sub(teacher_logits, policy_logits).sub_(teacher_lse - policy_lse)
    p = policy_logits.sub_(policy_lse).exp_()
    t = teacher_logits.sub_(teacher_lse).exp_()
    weight = certainty(t, options.entropy_scale) if options.entropy_scale is not None else None
    if options.clip == "entry":
        terms, grad = _clipped_terms(p, t, log_ratio, options)
    elif options.beta == 0:
        terms, grad = _kl_terms_(t, p, log_ratio)
    elif options.beta == 1:
        log_ratio.neg_()
        terms, _ = _kl_terms_(p, t, log_ratio)
        grad = log_ratio.mul_(p)
    else:
        terms, grad = _mixture_terms_(p, t, log_ratio, options.beta)
    # `_make_finite_` cannot tell a nan logit from two excluded entries; the row's sum can.
    values = terms.sum(-1) + 0.0 * (policy_lse + teacher_lse).squeeze(-1)
    if weight is not None:
        values *= weight
        grad *= weight[:, None]
    if need_grad:
        # `grad` is d/d log p; through the log-softmax it loses its mean under p.
        # `p` is the memory of `policy_logits`: the gradient is now there.
        p.mul_(grad.sum(-1, keepdim=True).neg_()).add_(grad)
        p.masked_fill_(~values.isfinite()[:, None], 0.0)
    return values


def certainty(t: Float[Tensor, "n K"], scale: float) -> Float[Tensor, " n"]:
    """exp(-entropy / scale) of each row of teacher probabilities: 1 where it is sure, in (0, 1].

    A teacher that spreads over many tokens has little to say about any of them.

    Source: our reading of the entropy-aware weights of SRPO, arXiv:2604.02288, which its abstract
    describes in words only.
    """
    return torch.xlogy(t, t).sum(-1).div_(scale).exp_()


def _kl_terms_(
    a: Float[Tensor, "n K"], b: Float[Tensor, "n K"], log_ratio: Float[Tensor, "n K"]
) -> tuple[Float[Tensor, "n K"], Float[Tensor, "n K"]]:
    """Non-negative terms of KL(a || b), and b - a, from log_ratio = log(a/b) (made finite)."""
    _make_finite_(log_ratio, posinf=float("inf"))
    # b - a = a expm1(-log_ratio) keeps its digits where b is close to a; where b >> a it is inf.
    excess = torch.where(log_ratio >= -1, torch.expm1(-log_ratio).mul_(a), b - a)
    return (a * log_ratio).add_(excess).clamp_(min=0), excess


def _mixture_terms_(
    p: Float[Tensor, "n K"], t: Float[Tensor, "n K"], log_ratio: Float[Tensor, "n K"], beta: float
) -> tuple[Float[Tensor, "n K"], Float[Tensor, "n K"]]:
    """Non-negative terms of the divergence from m, and (1 - beta) p log(p/m)."""
    larger = torch.maximum(p, t)
    log_m_over_larger, terms = _mixture_shape_(log_ratio, beta)
    terms.mul_(larger).clamp_(min=0)
    log_m_over_p = log_m_over_larger.add_(log_ratio.clamp_(min=0))
    return terms, log_m_over_p.mul_(p).mul_(beta - 1)


def _mixture_shape_(
    log_ratio: Float[Tensor, "n K"], beta: float
) -> tuple[Float[Tensor, "n K"], Float[Tensor, "n K"]]:
    """log1p(u) and h(s) of the module docstring; log_ratio = log(t/p) is made finite."""
    _make_finite_(log_ratio, posinf=torch.finfo(log_ratio.dtype).max)
    weight = (log_ratio > 0).to(log_ratio.dtype).mul_(1 - 2 * beta).add_(beta)
    gap = log_ratio.abs().neg_()
    growth = torch.expm1(gap)
    excess = growth * weight
    log_m_over_larger = torch.log1p(excess)
    terms = growth.add_(1).mul_(gap).mul_(weight)
    terms.sub_(excess.add_(1).mul_(log_m_over_larger))
    return log_m_over_larger, terms


def _clipped_terms(
    p: Float[Tensor, "n K"],
    t: Float[Tensor, "n K"],
    log_ratio: Float[Tensor, "n K"],
    options: DivergenceOptions,
) -> tuple[Float[Tensor, "n K"], Float[Tensor, "n K"]]:
    """OPSD's raw terms, each at most clip_value, and their d/d log p.

    Raw terms of either sign, so that clipping the positive ones equals OPSD; no gradient passes
    through a clipped entry. Source: OPSD, github.com/siyan-zhao/OPSD 8ae338d, opsd_trainer.py.
    """
    clip_value = options.clip_value
    assert clip_value is not None, "DivergenceOptions lets no clip pass without its value"
    if options.beta == 0:
        terms = _raw_kl_terms(t, log_ratio)
        grad = t.neg()
    elif options.beta == 1:
        terms = _raw_kl_terms(p, log_ratio.neg_())
        grad = terms + p
    else:
        terms, grad = _mixture_terms_(p, t, log_ratio, options.beta)
    grad.masked_fill_(terms > clip_value, 0.0)
    return terms.clamp_(max=clip_value), grad


def _raw_kl_terms(a: Float[Tensor, "n K"], log_ratio: Float[Tensor, "n K"]) -> Float[Tensor, "n K"]:
    # Where a is 0 its term is 0, and 0 * inf would be nan.
    return torch.where(a > 0, a * log_ratio, a)


def _make_finite_(log_ratio: Float[Tensor, "n K"], *, posinf: float) -> None:
    """An entry that both sides exclude (-inf minus -inf) has no difference; -inf stays usable."""
    log_ratio.nan_to_num_(nan=0.0, posinf=posinf, neginf=torch.finfo(log_ratio.dtype).min)
