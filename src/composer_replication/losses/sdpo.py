"""Divergence between the policy and its hint-conditioned teacher, per token, in nats.

Letters: B sequences, T tokens, N rows (tokens), H and G hidden sizes of policy and teacher,
V vocabulary. `fused_generalized_jsd` is for training; `generalized_jsd` is the same divergence
from logits that already exist, and `generalized_jsd_loss` adds OPSD's reductions.
"""

from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from composer_replication.errors import ConfigError, DataError, nearest
from composer_replication.losses.divergence import (
    DivergenceOptions,
    LogitDivergence,
    blocks,
    divergence_,
)
from composer_replication.losses.head import (
    HeadGrads,
    OutputHead,
    as_head,
    check_projection,
    compute_dtype,
    hidden_grad,
    projection_slope,
    tempered_logits,
    tile_rows_for,
    tiles,
)

_REDUCTIONS = ("batchmean", "sum", "mean", "none")
_IGNORED_LABEL = -100


def generalized_jsd(
    policy_logits: Float[Tensor, "*batch T V"],
    teacher_logits: Float[Tensor, "*batch T V_teacher"],
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_k_from: str = "teacher",
    tail: bool = False,
    clip: str | None = None,
    clip_value: float | None = None,
    entropy_scale: float | None = None,
) -> Float[Tensor, "*batch T"]:
    """Divergence of policy p from teacher t for each token, in nats; fp32, or fp64 for fp64.

    With m = (1 - beta) p + beta t it is beta KL(t || m) + (1 - beta) KL(p || m). The endpoints are
    special: beta 0 is KL(t || p) and beta 1 is KL(p || t), while the formula itself goes to 0
    there, so the scale of the loss jumps: near 0 it is about beta KL(t || p).

    No gradient reaches the teacher. A token whose divergence is not finite keeps that value and
    gets gradient 0: mask it with `torch.where`.

    Args:
        policy_logits: logits without the hint.
        teacher_logits: logits with the hint, aligned to the same completion tokens.
        beta: share of the teacher in m, in [0, 1].
        temperature: both sides' logits are divided by it.
        top_k: compare only the k largest entries; None compares the whole vocabulary.
        top_k_from: whose k largest: "teacher" (OPSD) or "policy" (SDPO).
        tail: keep full-vocabulary probabilities and add one entry with the mass of all others;
            otherwise both sides are renormalised on the k entries.
        clip: "token" scales a token's divergence d by the constant min(1, clip_value / d), which
            keeps the gradient's direction. "entry" caps each vocabulary entry's term before the
            sum; it is OPSD's, for comparisons: values can be negative, and a capped entry's
            gradient has the wrong sign.
        clip_value: nats per token or per entry, above 0.
        entropy_scale: weigh each token by exp(-teacher's entropy / entropy_scale), in nats, before
            the clip by token sees it; None weighs all tokens alike.

    Raises:
        ConfigError: an option is out of range, or top_k exceeds the vocabulary.
        DataError: the two sides' shapes differ, or the vocabulary has one entry.

    Source: GKD, arXiv:2306.13649 eq. 1; SDPO, arXiv:2601.20802; the stable form is derived in
    `losses/divergence.py`.
    """
    options = DivergenceOptions(
        beta, temperature, top_k, top_k_from, tail, clip, clip_value, entropy_scale
    )
    if policy_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise DataError(
            f"policy logits are for tokens of shape {tuple(policy_logits.shape[:-1])} and teacher "
            f"logits for {tuple(teacher_logits.shape[:-1])}; a token has no counterpart. "
            "Slice both to the same completion tokens."
        )
    check_vocabulary(policy_logits.shape[-1], teacher_logits.shape[-1], options)
    rows = LogitDivergence.apply(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        policy_logits.flatten(0, -2),
        teacher_logits.detach().flatten(0, -2),
        options,
        torch.is_grad_enabled(),
    )
    return clip_tokens(cast("Tensor", rows), options).reshape(policy_logits.shape[:-1])


def generalized_jsd_loss(
    policy_logits: Float[Tensor, "B T V"],
    teacher_logits: Float[Tensor, "B T V_teacher"],
    labels: Int[Tensor, "B T"] | None = None,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    top_k: int | None = None,
    top_k_from: str = "teacher",
    tail: bool = False,
    clip: str | None = None,
    clip_value: float | None = None,
    entropy_scale: float | None = None,
) -> Float[Tensor, ""] | Float[Tensor, "B T"]:
    """`generalized_jsd` with OPSD's reductions, for comparisons; zero valid tokens give 0.

    Training does not use it: a mean over a micro-batch weighs tokens by how they were batched.

    Args:
        policy_logits: logits without the hint (OPSD: student_logits).
        teacher_logits: logits with the hint.
        labels: tokens with label -100 are ignored, whatever their logits hold.
        beta: see `generalized_jsd`, as the options below.
        temperature: both sides' logits are divided by it.
        reduction: "batchmean" is the sum over the number of valid tokens (over B without labels);
            "sum"; "mean" is the sum over the number of valid vocabulary entries, V or k per token;
            "none" is the divergence of each token with 0 where ignored (OPSD returns the terms of
            each vocabulary entry instead, of the valid tokens only).
        top_k: compare only the k largest entries.
        top_k_from: whose k largest: "teacher" or "policy".
        tail: add one entry with the mass of all others.
        clip: "token" or "entry".
        clip_value: nats per token or per entry.
        entropy_scale: weigh tokens by the teacher's certainty.

    Raises:
        ConfigError: an option is out of range.
        DataError: the two sides' shapes differ.

    Source: OPSD, github.com/siyan-zhao/OPSD, opsd_trainer.py, generalized_jsd_loss.
    """
    if reduction not in _REDUCTIONS:
        raise ConfigError(
            f"reduction is {reduction!r}; it must be one of {', '.join(_REDUCTIONS)}. "
            f"{nearest(reduction, _REDUCTIONS)}"
        )
    options = DivergenceOptions(
        beta, temperature, top_k, top_k_from, tail, clip, clip_value, entropy_scale
    )
    token_BT = generalized_jsd(
        policy_logits,
        teacher_logits,
        beta=beta,
        temperature=temperature,
        top_k=top_k,
        top_k_from=top_k_from,
        tail=tail,
        clip=clip,
        clip_value=clip_value,
        entropy_scale=entropy_scale,
    )
    num_tokens = torch.tensor(token_BT.numel(), device=token_BT.device)
    num_batch = torch.tensor(token_BT.shape[0], device=token_BT.device)
    if labels is not None:
        loss_mask = labels != _IGNORED_LABEL
        token_BT = torch.where(loss_mask, token_BT, 0.0)
        num_tokens = num_batch = loss_mask.sum()
    if reduction == "none":
        return token_BT
    if reduction == "sum":
        return token_BT.sum()
    if reduction == "mean":
        num_entries = options.num_entries(policy_logits.shape[-1])
        return token_BT.sum() / (num_tokens * num_entries).clamp(min=1)
    return token_BT.sum() / num_batch.clamp(min=1)


def fused_generalized_jsd(
    policy_hidden: Float[Tensor, "N H"],
    policy_head: OutputHead | Float[Tensor, "V H"],
    teacher_hidden: Float[Tensor, "N G"],
    teacher_head: OutputHead | Float[Tensor, "V_teacher G"],
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_k_from: str = "teacher",
    tail: bool = False,
    clip: str | None = None,
    clip_value: float | None = None,
    entropy_scale: float | None = None,
    tile_rows: int | None = None,
) -> Float[Tensor, " N"]:
    """`generalized_jsd` of two LM heads' outputs, without ever building [tokens, vocabulary].

    The gradient of each row's divergence with respect to its hidden state is found in the
    forward, so a frozen head costs three matrix products instead of the seven of
    recompute-in-backward. A trainable policy head recomputes its tiles in the backward to sum
    its own gradient in fp32. Under `no_grad` only the two projections run.

    Args:
        policy_hidden: final hidden states without the hint.
        policy_head: the policy's head, or its weight alone.
        teacher_hidden: final hidden states with the hint, aligned row by row.
        teacher_head: the teacher's head (it may be the same object); gets no gradient.
        beta: see `generalized_jsd`, as the options below.
        temperature: both sides' logits are divided by it.
        top_k: compare only the k largest entries.
        top_k_from: whose k largest: "teacher" or "policy".
        tail: add one entry with the mass of all others.
        clip: "token" or "entry".
        clip_value: nats per token or per entry.
        entropy_scale: weigh tokens by the teacher's certainty.
        tile_rows: rows projected at once; memory is about 2 * tile_rows * V * 4 bytes. None: by
            device.

    Raises:
        ConfigError: an option is out of range.
        DataError: sizes of hidden states, heads or vocabularies do not match.

    Source: as `generalized_jsd`; d/dz_p is p - t for beta 0, p (log p/t - KL(p || t)) for beta 1,
    (1 - beta) p (log p/m - KL(p || m)) between.
    """
    options = DivergenceOptions(
        beta, temperature, top_k, top_k_from, tail, clip, clip_value, entropy_scale
    )
    policy, teacher = as_head(policy_head), as_head(teacher_head)
    check_projection("policy_hidden", policy_hidden, policy)
    check_projection("teacher_hidden", teacher_hidden, teacher)
    if policy_hidden.shape[0] != teacher_hidden.shape[0]:
        raise DataError(
            f"policy_hidden has {policy_hidden.shape[0]} rows and teacher_hidden "
            f"{teacher_hidden.shape[0]}; a token has no counterpart. Pass aligned rows."
        )
    check_vocabulary(policy.weight.shape[0], teacher.weight.shape[0], options)
    rows = _FusedDivergence.apply(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        policy_hidden,
        policy.weight,
        policy.bias,
        teacher_hidden.detach(),
        policy,
        teacher,
        options,
        tile_rows_for(policy_hidden, tile_rows),
        torch.is_grad_enabled(),
    )
    return clip_tokens(cast("Tensor", rows), options)


def check_vocabulary(num_policy: int, num_teacher: int, options: DivergenceOptions) -> None:
    """Raise when two vocabularies cannot be compared under these options."""
    if num_policy != num_teacher:
        raise DataError(
            f"the policy has {num_policy} vocabulary entries and the teacher {num_teacher}; "
            "entries cannot be compared by id. Use a teacher with the same tokenizer, and cut "
            "padding entries off the larger head."
        )
    if num_policy < 2:
        raise DataError(
            f"the vocabulary has {num_policy} entry; its probability is always 1, so there is "
            "nothing to learn. Check that the last dim is the vocabulary."
        )
    if options.top_k is not None and options.top_k > num_policy:
        raise ConfigError(
            f"top_k is {options.top_k} but the vocabulary has {num_policy} entries. "
            "Lower top_k, or pass None for the whole vocabulary."
        )


def clip_tokens(divergence: Float[Tensor, " N"], options: DivergenceOptions) -> Float[Tensor, " N"]:
    """Each divergence scaled down to the clip by token; others as they are."""
    if options.clip != "token" or options.clip_value is None:
        return divergence
    # A constant factor: min(d, c) itself would stop the gradient of exactly the tokens that
    # differ most. It is 0 where d is not finite, so that a masked nan does not spread.
    constant = divergence.detach()
    scale = torch.where(constant.isfinite(), (options.clip_value / constant).clamp(max=1.0), 0.0)
    return torch.where(constant.isinf(), options.clip_value, divergence * scale)


class _FusedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's own
        policy_hidden: Tensor,
        policy_weight: Tensor,
        policy_bias: Tensor | None,
        teacher_hidden: Tensor,
        policy_head: OutputHead,
        teacher_head: OutputHead,
        options: DivergenceOptions,
        tile_rows: int,
        is_grad_enabled: bool,
    ) -> Tensor:
        """Divergences, and at once the gradient of the policy's rows where one is needed."""
        needs_hidden_grad = is_grad_enabled and ctx.needs_input_grad[0]
        dtype = compute_dtype(policy_hidden, policy_weight)
        values = torch.empty(policy_hidden.shape[0], dtype=dtype, device=policy_hidden.device)
        grad_hidden = torch.empty_like(policy_hidden, dtype=dtype) if needs_hidden_grad else None
        with torch.autocast(policy_hidden.device.type, enabled=False):
            for rows in tiles(policy_hidden.shape[0], tile_rows):
                hidden_rows = policy_hidden[rows], teacher_hidden[rows]
                values[rows], logit_grad = _tile(
                    *hidden_rows, policy_head, teacher_head, options, need_grad=needs_hidden_grad
                )
                if grad_hidden is not None:
                    grad_hidden[rows] = hidden_grad(logit_grad, policy_weight)
                # Otherwise it stays until the next tile's logits are there: a third more memory.
                del logit_grad
        ctx.save_for_backward(
            policy_hidden, policy_weight, policy_bias, teacher_hidden, grad_hidden
        )
        ctx.heads, ctx.options, ctx.tile_rows = (policy_head, teacher_head), options, tile_rows
        return values

    @staticmethod
    @once_differentiable  # pyright: ignore[reportUntypedFunctionDecorator]
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401 - torch's own
        *value_grads: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """The rows' gradient as it was kept; that of a head that trains, tile by tile."""
        policy_hidden, weight, bias, teacher_hidden, grad_hidden = ctx.saved_tensors
        (value_grad,) = value_grads
        needed = ctx.needs_input_grad
        if needed[0]:
            grad_hidden = (grad_hidden * value_grad[:, None]).to(policy_hidden.dtype)
        policy_head = replace(ctx.heads[0], weight=weight, bias=bias)
        head_grads = HeadGrads((False, needed[1], needed[2]), policy_hidden, weight, bias)
        num_rows = policy_hidden.shape[0] if needed[1] or needed[2] else 0
        with torch.autocast(policy_hidden.device.type, enabled=False):
            for rows in tiles(num_rows, ctx.tile_rows):
                hidden_rows = policy_hidden[rows], teacher_hidden[rows]
                values, logit_grad = _tile(
                    *hidden_rows, policy_head, ctx.heads[1], ctx.options, need_grad=True
                )
                logit_grad *= value_grad[rows, None]
                head_grads.add_tile(rows, logit_grad, values.isfinite())
                del logit_grad
        _, grad_weight, grad_bias = head_grads.in_input_precision()
        return (grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None)


def _tile(
    policy_hidden: Float[Tensor, "n H"],
    teacher_hidden: Float[Tensor, "n G"],
    policy_head: OutputHead,
    teacher_head: OutputHead,
    options: DivergenceOptions,
    *,
    need_grad: bool,
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n V"]]:
    """Divergences of one tile and, if needed, their gradient at `hidden @ weight.T + bias`.

    Works block by block in the memory of the policy's logits, which the gradient replaces.
    """
    policy_logits = tempered_logits(policy_hidden, policy_head, options.temperature)
    teacher_logits = tempered_logits(teacher_hidden, teacher_head, options.temperature)
    values = policy_logits.new_empty(policy_logits.shape[0])
    for rows in blocks(policy_logits):
        block = policy_logits[rows]
        slope = projection_slope(block, policy_head, options.temperature) if need_grad else 0.0
        values[rows] = divergence_(block, teacher_logits[rows], options, need_grad=need_grad)
        if need_grad:
            block *= slope
    return values, policy_logits
