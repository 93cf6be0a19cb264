"""Attention over a prefix tree: the dense oracle, and the rectangles that training uses.

Letters: H query heads, K key-value heads, T rows of the tree, D head size.
"""

import warnings
from typing import Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor

from composer_replication.step.flash_rectangles import (
    FlashAttention,
    Launch,
    launches_of,
    why_no_flash,
)
from composer_replication.step.rectangle_kernels import Scoring
from composer_replication.step.rectangles import Rectangle, RectangleAttention, rectangles_of
from composer_replication.step.trie import PrefixTree

PLAIN_PRODUCTS = "The attention of the prefix tree runs as plain matrix products on this GPU"
"""How the warning begins."""


class TreeKernel(Protocol):
    """Attention over one tree."""

    def __call__(
        self,
        query: Float[Tensor, "1 H T D"],
        key: Float[Tensor, "1 K T D"],
        value: Float[Tensor, "1 K T D_v"],
        scoring: Scoring,
    ) -> Float[Tensor, "1 T H D_v"]:
        """Each row attends to the rows above it in the tree, within the window if there is one."""
        ...


class DenseKernel:
    """The oracle: one boolean mask and torch's own softmax; memory grows with T squared."""

    def __init__(self, tree: PrefixTree, device: torch.device) -> None:
        self._visible = tree.visible().to(device)
        self._positions = tree.positions.to(device)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """See `TreeKernel`."""
        num_groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(num_groups, 1) for t in (key, value))
        scores = query @ key.mT * scoring.scale
        if scoring.softcap is not None:
            scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
        visible = self._visible
        if scoring.window is not None:
            distance = self._positions[:, None] - self._positions[None]
            visible = visible & (distance < scoring.window)
        probs = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        return (probs @ value).transpose(1, 2).contiguous()


class RectangleKernel:
    """The one for training: flash kernels on rectangles, without a mask.

    On CUDA in half precision several rectangles share a launch (`flash_rectangles.py`).
    """

    def __init__(self, tree: PrefixTree, device: torch.device) -> None:
        self._tree = tree
        self._positions = tree.positions.to(device)
        self._plans: dict[int | None, list[Rectangle]] = {}
        self._launches: dict[int | None, list[Launch]] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """See `TreeKernel`."""
        plan = self._plans.get(scoring.window)
        if plan is None:
            plan = self._plans[scoring.window] = rectangles_of(self._tree, scoring.window)
        why_not = why_no_flash(query, value, scoring)
        if why_not is None:
            launches = self._launches.get(scoring.window)
            if launches is None:
                launches = self._launches[scoring.window] = launches_of(plan, query.device)
            if launches:
                by_row = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
                output = FlashAttention.apply(*by_row, launches, scoring.scale)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
                return cast(Tensor, output).unsqueeze(0)
            why_not = f"a window of {scoring.window} tokens cuts the tree, and it takes whole rows"
        if query.is_cuda:
            _warn_of_plain_products(why_not)
        num_kv, num_rows = key.shape[1:3]
        by_group = query[0].unflatten(0, (num_kv, -1))
        output = RectangleAttention.apply(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            by_group, key[0], value[0], self._positions, plan, scoring
        )
        return cast(Tensor, output).reshape(1, num_rows, -1, value.shape[-1])


def _warn_of_plain_products(why_not: str) -> None:
    warnings.warn(
        f"{PLAIN_PRODUCTS}, which are slower than CUDA's flash kernel: {why_not}.", stacklevel=3
    )
