"""Attention of one rectangle: a flash kernel, or plain matrix products where none fits.

Both return the softmax over this rectangle's keys alone with its log-sum-exp, and take gradients
of the softmax over all keys. Letters: K key-value heads, G query heads each, Q queries, T keys,
D head size.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Mask = Literal["none", "causal", "banded"]

_TILE_ELEMENTS = 2**24
"""Scores held at once by the plain kernel: 64 MiB of fp32 for each temporary."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """How queries and keys become scores: `softcap * tanh(scale * q k / softcap)`."""

    scale: float
    softcap: float | None = None
    window: int | None = None
    """Positions that a banded rectangle's queries see, themselves included."""


@dataclass(frozen=True, slots=True)
class Merged:
    """Attention of some rows over all of their keys, and its gradient."""

    output: Float[Tensor, "K G Q D"]
    lse: Float[Tensor, "K G Q"]
    output_grad: Float[Tensor, "K G Q D"]


def rectangle_forward(
    query: Float[Tensor, "K G Q D"],
    key: Float[Tensor, "K T D"],
    value: Float[Tensor, "K T D_v"],
    distance: Int[Tensor, "..."],
    mask: Mask,
    scoring: Scoring,
) -> tuple[Float[Tensor, "K G Q D_v"], Float[Tensor, "K G Q"]]:
    """Softmax attention over these keys and the log-sum-exp of their scores.

    Args:
        query: rows that attend.
        key: rows attended to.
        value: theirs.
        distance: positions from key to query, `[Q, T]`, where the mask is banded.
        mask: `none`, `causal` (same rows on both sides), or `banded`: by distance and window.
        scoring: scale, soft cap and window.
    """
    if _has_cpu_flash(query, value, mask, scoring):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, *_for_groups(query, key, value), 0.0, mask == "causal", scale=scoring.scale
        )
    parts = [
        _plain_forward(
            query[:, :, rows], key, value, _allowed(distance, mask, rows, query, scoring), scoring
        )
        for rows in _chunks(query, key)
    ]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def rectangle_backward(
    query: Float[Tensor, "K G Q D"],
    key: Float[Tensor, "K T D"],
    value: Float[Tensor, "K T D_v"],
    distance: Int[Tensor, "..."],
    mask: Mask,
    scoring: Scoring,
    whole: Merged,
) -> tuple[Float[Tensor, "K G Q D"], Float[Tensor, "K T D"], Float[Tensor, "K T D_v"]]:
    """This rectangle's share of the gradients of query, key and value; arguments as above."""
    if _has_cpu_flash(query, value, mask, scoring):
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            whole.output_grad,
            query,
            *_for_groups(query, key, value),
            whole.output,
            whole.lse,
            0.0,
            mask == "causal",
            scale=scoring.scale,
        )
        return grads[0], grads[1].sum(1), grads[2].sum(1)
    dtype = whole.lse.dtype
    query_grad = torch.empty_like(query, dtype=dtype)
    key_grad, value_grad = (torch.zeros_like(tensor, dtype=dtype) for tensor in (key, value))
    for rows in _chunks(query, key):
        chunk = Merged(
            whole.output[:, :, rows], whole.lse[:, :, rows], whole.output_grad[:, :, rows]
        )
        allowed = _allowed(distance, mask, rows, query, scoring)
        query_grad[:, :, rows] = _plain_backward_(
            query[:, :, rows], key, value, allowed, scoring, chunk, key_grad, value_grad
        )
    return query_grad, key_grad, value_grad


def _has_cpu_flash(query: Tensor, value: Tensor, mask: Mask, scoring: Scoring) -> bool:
    return (
        query.device.type == "cpu"
        and mask != "banded"
        and scoring.softcap is None
        and query.shape[-1] == value.shape[-1]
    )


def _for_groups(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    # Stride 0 over the group: key-value heads are read by each of their query heads, never copied.
    num_groups = query.shape[1]
    return (
        key.unsqueeze(1).expand(-1, num_groups, -1, -1),
        value.unsqueeze(1).expand(-1, num_groups, -1, -1),
    )


def _chunks(query: Tensor, key: Tensor) -> list[slice]:
    scores_per_row = query.shape[0] * query.shape[1] * key.shape[1]
    num_rows = max(1, _TILE_ELEMENTS // scores_per_row)
    return [slice(i, i + num_rows) for i in range(0, query.shape[2], num_rows)]


def _allowed(
    distance: Tensor, mask: Mask, rows: slice, query: Tensor, scoring: Scoring
) -> Tensor | None:
    """True where a query of the chunk sees a key, `[Q, T]`; None: everywhere."""
    if mask == "none":
        return None
    if mask == "banded":
        assert scoring.window is not None, "only a window makes rectangles banded"
        return (distance[rows] >= 0) & (distance[rows] < scoring.window)
    row = torch.arange(query.shape[2], device=query.device)
    return row[None] <= row[rows, None]


def _scores(
    query: Tensor, key: Tensor, allowed: Tensor | None, scoring: Scoring
) -> Float[Tensor, "K G Q T"]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = query.to(dtype) @ key.to(dtype).unsqueeze(1).mT
    scores *= scoring.scale
    if scoring.softcap is not None:
        scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
    return scores if allowed is None else scores.masked_fill_(~allowed, float("-inf"))


def _plain_forward(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    scores = _scores(query, key, allowed, scoring)
    lse = scores.logsumexp(-1)
    # A query that sees none of these keys has lse -inf, and -inf minus -inf would be nan.
    probs = scores.sub_(lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp_()
    return probs @ value.to(probs.dtype).unsqueeze(1), lse


def _plain_backward_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    scoring: Scoring,
    whole: Merged,
    key_grad: Tensor,
    value_grad: Tensor,
) -> Float[Tensor, "K G Q D"]:
    """The query's gradient; adds to those of key and value.

    Source: FlashAttention, arXiv:2205.14135 appendix B.4, with log-sum-exp and output of all keys.
    """
    scores = _scores(query, key, allowed, scoring)
    dtype = scores.dtype
    output_grad = whole.output_grad.to(dtype)
    slope = None if scoring.softcap is None else 1 - (scores / scoring.softcap).square()
    probs = scores.sub_(whole.lse[..., None]).exp_()
    value_grad += (probs.mT @ output_grad).sum(1)
    row_dot = (output_grad * whole.output.to(dtype)).sum(-1, keepdim=True)
    score_grad = (output_grad @ value.to(dtype).unsqueeze(1).mT).sub_(row_dot).mul_(probs)
    if slope is not None:
        # Of a masked score the slope is -inf, and its probability 0.
        score_grad.mul_(slope.nan_to_num_(0.0, neginf=0.0))
    score_grad *= scoring.scale
    key_grad += (score_grad.mT @ query.to(dtype)).sum(1)
    return score_grad @ key.to(dtype).unsqueeze(1)
