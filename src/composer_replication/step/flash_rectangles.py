"""A tree's rectangles in few launches of CUDA's flash attention, whose rows may be cut anywhere.

One launch of the kernel's variable-length form takes any number of rectangles, as long as no row
attends in two of them. All causal squares are one launch; of the dense rectangles, which nest, each
level is one. So a step costs a layer as many launches as its tree is deep in branches, not as many
as it has branches. What a launch returns merges by log-sum-exp, as in `rectangles.py`.

Letters: H query heads, K key-value heads, T rows, D head size; of one launch n rows that attend,
m rows attended to, and R - 1 rectangles.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from composer_replication.step.rectangle_kernels import Scoring
from composer_replication.step.rectangles import Rectangle

_MAX_HEAD_SIZE = 192
"""Larger ones have no backward on some cards."""
_HEAD_SIZE_MULTIPLE = 8
_OLDEST_CAPABILITY = (8, 0)
"""Ampere; before it torch has no flash kernel."""


@dataclass(frozen=True, eq=False, slots=True)
class Launch:
    """Rectangles of one mask that one launch computes, one after another."""

    queries: slice | Int[Tensor, " n"]
    """Rows that attend; a slice where they lie together."""
    keys: slice | Int[Tensor, " m"]
    """Rows attended to."""
    q_bounds: Int[Tensor, " R"]
    """Where each rectangle's queries start among the launch's, and the end of the last; int32."""
    k_bounds: Int[Tensor, " R"]
    """The same of its keys."""
    max_queries: int
    """Of one rectangle."""
    max_keys: int
    is_causal: bool


def why_no_flash(query: Tensor, value: Tensor, scoring: Scoring) -> str | None:
    """Why CUDA's flash kernel does not take this attention; None: it does."""
    if not query.is_cuda or torch.version.cuda is None:
        return "it is CUDA's"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes bf16 and fp16 (bf16 = true), and queries are {query.dtype}"
    if torch.cuda.get_device_capability(query.device) < _OLDEST_CAPABILITY:
        return "this card is older than the kernel (Ampere)"
    if scoring.softcap is not None:
        return f"it knows no soft cap, and the model's is {scoring.softcap:g}"
    size, value_size = query.shape[-1], value.shape[-1]
    if size != value_size or size > _MAX_HEAD_SIZE or size % _HEAD_SIZE_MULTIPLE:
        return (
            f"heads of {size} numbers with values of {value_size}: it takes equal ones up to "
            f"{_MAX_HEAD_SIZE}, in multiples of {_HEAD_SIZE_MULTIPLE}"
        )
    return None


def launches_of(rectangles: Sequence[Rectangle], device: torch.device) -> list[Launch]:
    """The rectangles in as few launches as they nest deep; the one of the squares comes first.

    Empty where a window cuts rectangles, which no launch computes.

    Example: five branches below one prefix are five squares and one dense rectangle: two launches.
    """
    if any(part.mask == "banded" for part in rectangles):
        return []
    launches = [_launch([part for part in rectangles if part.mask == "causal"], device)]
    levels: list[list[Rectangle]] = []
    dense = sorted((part for part in rectangles if part.mask == "none"), key=_first_query)
    for part in dense:
        free = (level for level in levels if level[-1].q_stop <= part.q_start)
        level = next(free, None)
        if level is None:
            levels.append([part])
        else:
            level.append(part)
    return launches + [_launch(level, device) for level in levels]


class FlashAttention(torch.autograd.Function):
    """Softmax attention over a union of rectangles, in the launches of `launches_of`."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's own
        query: Float[Tensor, "T H D"],
        key: Float[Tensor, "T K D"],
        value: Float[Tensor, "T K D"],
        launches: list[Launch],
        scale: float,
    ) -> Float[Tensor, "T H D"]:
        """Attention output by row."""
        squares, *others = launches
        output, lse = flash_forward(query, key, value, squares, scale)
        if others:
            merged = output.to(lse.dtype)
            for launch in others:
                rows = launch.queries
                part, part_lse = flash_forward(
                    query[rows], key[launch.keys], value[launch.keys], launch, scale
                )
                old_lse = lse[:, rows]
                # The two shares of the softmax's sum add up to 1.
                share = torch.sigmoid(part_lse - old_lse).t()[..., None]
                merged[rows] = torch.lerp(merged[rows], part.to(merged.dtype), share)
                lse[:, rows] = torch.logaddexp(old_lse, part_lse)
            output = merged.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.launches, ctx.scale = launches, scale
        return output

    @staticmethod
    @once_differentiable  # pyright: ignore[reportUntypedFunctionDecorator]
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401 - torch's own
        *output_grads: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """Every launch's share of the three gradients, from the merged output."""
        query, key, value, output, lse = ctx.saved_tensors
        squares, *others = ctx.launches
        output_grad = output_grads[0].contiguous()
        grads = flash_backward((output_grad, output, lse), query, key, value, squares, ctx.scale)
        if others:
            sums = [grad.to(lse.dtype) for grad in grads]
            for launch in others:
                rows, keys = launch.queries, launch.keys
                whole = output_grad[rows], output[rows], lse[:, rows]
                parts = flash_backward(
                    whole, query[rows], key[keys], value[keys], launch, ctx.scale
                )
                # No row is twice in a launch, so adding at indices loses nothing.
                for total, where, part in zip(sums, (rows, keys, keys), parts, strict=True):
                    total[where] += part
            grads = tuple(total.to(query.dtype) for total in sums)
        return (*grads, None, None)


def flash_forward(
    query: Float[Tensor, "n H D"],
    key: Float[Tensor, "m K D"],
    value: Float[Tensor, "m K D"],
    launch: Launch,
    scale: float,
) -> tuple[Float[Tensor, "n H D"], Float[Tensor, "H n"]]:
    """The softmax over each rectangle's own keys, and the log-sum-exp of the scores."""
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        launch.q_bounds,
        launch.k_bounds,
        launch.max_queries,
        launch.max_keys,
        0.0,
        launch.is_causal,
        False,
        scale=scale,
    )
    return output, lse


def flash_backward(
    whole: tuple[Tensor, Tensor, Tensor],
    query: Float[Tensor, "n H D"],
    key: Float[Tensor, "m K D"],
    value: Float[Tensor, "m K D"],
    launch: Launch,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The launch's share of the gradients of query, key and value.

    Args:
        whole: gradient of the merged output `[n, H, D]`, that output, and its log-sum-exp `[H, n]`.
        query: rows that attend; the others as in `flash_forward`.
        key: rows attended to.
        value: theirs.
        launch: its rectangles.
        scale: of the scores.
    """
    output_grad, output, lse = whole
    # The generator's state, which dropout alone would read.
    unused = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return torch.ops.aten._flash_attention_backward(
        output_grad,
        query,
        key,
        value,
        output,
        lse.contiguous(),
        launch.q_bounds,
        launch.k_bounds,
        launch.max_queries,
        launch.max_keys,
        0.0,
        launch.is_causal,
        unused,
        unused,
        scale=scale,
    )


def _first_query(part: Rectangle) -> int:
    return part.q_start


def _launch(parts: list[Rectangle], device: torch.device) -> Launch:
    queries, keys = [part.queries for part in parts], [part.keys for part in parts]
    return Launch(
        _rows(queries, device),
        _rows(keys, device),
        _bounds(queries, device),
        _bounds(keys, device),
        max(map(_length, queries)),
        max(map(_length, keys)),
        is_causal=parts[0].mask == "causal",
    )


def _rows(parts: list[slice], device: torch.device) -> slice | Tensor:
    if all(before.stop == after.start for before, after in pairwise(parts)):
        return slice(parts[0].start, parts[-1].stop)
    return torch.cat([torch.arange(part.start, part.stop) for part in parts]).to(device)


def _bounds(parts: list[slice], device: torch.device) -> Tensor:
    ends = accumulate(map(_length, parts), initial=0)
    return torch.tensor(list(ends), dtype=torch.int32, device=device)


def _length(rows: slice) -> int:
    return rows.stop - rows.start
