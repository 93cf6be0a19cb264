"""Attention over a prefix tree as a few rectangles of (queries, keys), each without a mask.

A run of the tree is a causal square, and the rows below a stretch of it all see that stretch: a
dense rectangle. Flash kernels compute each; partial results merge by log-sum-exp, and since a
flash backward only needs the merged output and log-sum-exp, the partial gradients add up. This is
the arithmetic of ring attention (arXiv:2310.01889) with rectangles in place of ring steps.

Letters: K key-value heads, G query heads for each of them, T rows, D head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from composer_replication.step.rectangle_kernels import (
    Mask,
    Merged,
    Scoring,
    rectangle_backward,
    rectangle_forward,
)
from composer_replication.step.trie import PrefixTree, Run

_WINDOW_CHUNK_ROWS = 256
"""Most queries of one banded rectangle; it computes up to this many keys more than the window."""


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Queries `q_start:q_stop` over keys `k_start:k_stop`, by row."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    mask: Mask

    @property
    def queries(self) -> slice:
        """Rows that attend."""
        return slice(self.q_start, self.q_stop)

    @property
    def keys(self) -> slice:
        """Rows attended to."""
        return slice(self.k_start, self.k_stop)


def rectangles_of(tree: PrefixTree, window: int | None = None) -> list[Rectangle]:
    """The rectangles that cover exactly what each row sees; a row's own position comes first.

    Args:
        tree: the laid-out sequences.
        window: a row sees the last `window` positions, itself included; None: all.
    """
    if window is not None and window <= int(tree.positions.max()):
        return [part for run in tree.runs for part in _banded(run, window)]
    squares = [Rectangle(r.start, r.stop, r.start, r.stop, "causal") for r in tree.runs]
    reach = tree.reach
    below: list[Rectangle] = []
    for run in tree.runs:
        values, counts = torch.unique_consecutive(reach[run.start : run.stop], return_counts=True)
        k_start = run.start
        for stop, count in zip(values.tolist(), counts.tolist(), strict=True):
            if stop > run.stop:
                below.append(Rectangle(run.stop, stop, k_start, k_start + count, "none"))
            k_start += count
    return squares + below


def _banded(run: Run, window: int) -> list[Rectangle]:
    """Chunks of a run over the keys that their windows reach, here and in the rows above."""
    parts: list[Rectangle] = []
    for start in range(run.start, run.stop, _WINDOW_CHUNK_ROWS):
        stop = min(start + _WINDOW_CHUNK_ROWS, run.stop)
        first_seen = run.depth + start - run.start - window + 1
        own = max(run.start, run.start + first_seen - run.depth)
        parts.append(Rectangle(start, stop, own, stop, "banded"))
        depth = 0
        for k_start, k_stop in run.ancestors:
            skipped = max(0, first_seen - depth)
            if k_start + skipped < k_stop:
                parts.append(Rectangle(start, stop, k_start + skipped, k_stop, "banded"))
            depth += k_stop - k_start
    return parts


class RectangleAttention(torch.autograd.Function):
    """Softmax attention over a union of rectangles, differentiable in queries, keys and values."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's own
        query: Float[Tensor, "K G T D"],
        key: Float[Tensor, "K T D"],
        value: Float[Tensor, "K T D_v"],
        positions: Int[Tensor, " T"],
        rectangles: list[Rectangle],
        scoring: Scoring,
    ) -> Float[Tensor, "T K G D_v"]:
        """Attention output by row."""
        num_kv, num_groups, num_rows, _ = query.shape
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        output = query.new_empty(num_rows, num_kv, num_groups, value.shape[-1], dtype=dtype)
        merged = output.permute(1, 2, 0, 3)
        lse = query.new_full((num_kv, num_groups, num_rows), float("-inf"), dtype=dtype)
        # `rectangles_of` gives each row its own position first, in order of rows: that rectangle
        # fills in the row's result, and every later one of the row is merged into it.
        num_covered = 0
        for part in rectangles:
            inputs = _inputs(part, query, key, value, positions)
            rows = part.queries
            out, part_lse = rectangle_forward(*inputs, part.mask, scoring)
            if part.q_start >= num_covered:
                merged[:, :, rows], lse[:, :, rows] = out, part_lse
                num_covered = part.q_stop
                continue
            total = torch.logaddexp(lse[:, :, rows], part_lse)
            merged[:, :, rows].mul_((lse[:, :, rows] - total).exp_()[..., None])
            merged[:, :, rows].addcmul_(out.to(dtype), (part_lse - total).exp_()[..., None])
            lse[:, :, rows] = total
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, positions, output, lse)
        ctx.rectangles, ctx.scoring = rectangles, scoring
        return output

    @staticmethod
    @once_differentiable  # pyright: ignore[reportUntypedFunctionDecorator]
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401 - torch's own
        *output_grads: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """Every rectangle's share of the three gradients, from the merged output."""
        query, key, value, positions, output, lse = ctx.saved_tensors
        merged = output.permute(1, 2, 0, 3)
        merged_grad = output_grads[0].permute(1, 2, 0, 3)
        query_grad, key_grad, value_grad = (
            torch.zeros_like(tensor, dtype=lse.dtype) for tensor in (query, key, value)
        )
        for part in ctx.rectangles:
            rows, keys = part.queries, part.keys
            whole = Merged(merged[:, :, rows], lse[:, :, rows], merged_grad[:, :, rows])
            inputs = _inputs(part, query, key, value, positions)
            of_query, of_key, of_value = rectangle_backward(*inputs, part.mask, ctx.scoring, whole)
            query_grad[:, :, rows] += of_query
            key_grad[:, keys] += of_key
            value_grad[:, keys] += of_value
        grads = (grad.to(query.dtype) for grad in (query_grad, key_grad, value_grad))
        return (*grads, None, None, None)


def _inputs(
    part: Rectangle, query: Tensor, key: Tensor, value: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, keys = part.queries, part.keys
    distance = positions[rows, None] - positions[None, keys] if part.mask == "banded" else positions
    return query[:, :, rows], key[:, keys], value[:, keys], distance
