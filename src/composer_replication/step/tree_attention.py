"""Prefix-tree attention for unmodified transformers models, through their attention interface.

The kernel travels as the keyword `prefix_tree` from the model's forward to its attention modules,
and so also through the recomputation of gradient checkpointing. A hook on those modules switches
the attention while the keyword is there; every other forward, generation included, is untouched.

Letters: H query heads, K key-value heads, G = H / K, T rows of the tree, D head size.
"""

from typing import Any, Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from composer_replication.errors import ModelError
from composer_replication.step.flash_rectangles import (
    FlashAttention,
    Launch,
    has_flash,
    launches_of,
)
from composer_replication.step.rectangle_kernels import Scoring
from composer_replication.step.rectangles import Rectangle, RectangleAttention, rectangles_of
from composer_replication.step.trie import PrefixTree

_NAME = "composer_prefix_tree"


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
        if has_flash(query, value, scoring):
            launches = self._launches.get(scoring.window)
            if launches is None:
                launches = self._launches[scoring.window] = launches_of(plan, query.device)
            if launches:
                by_row = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
                output = FlashAttention.apply(*by_row, launches, scoring.scale)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
                return cast(Tensor, output).unsqueeze(0)
        num_kv, num_rows = key.shape[1:3]
        by_group = query[0].unflatten(0, (num_kv, -1))
        output = RectangleAttention.apply(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            by_group, key[0], value[0], self._positions, plan, scoring
        )
        return cast(Tensor, output).reshape(1, num_rows, -1, value.shape[-1])


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefix_tree: TreeKernel,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,  # noqa: ANN401 - transformers' own
) -> tuple[Tensor, None]:
    """What transformers calls in place of its own attention; the tree stands for the mask.

    Raises:
        ModelError: attention that a prefix tree does not reproduce.
    """
    del attention_mask
    _refuse_unknown_attention(module, query, key, dropout, others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = _attention_dtype(query, value)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    with torch.autocast(query.device.type, enabled=False):
        scoring = Scoring(scale, softcap, sliding_window)
        return prefix_tree(query, key, value, scoring), None


AttentionInterface.register(_NAME, attend)


def _attention_dtype(query: Tensor, value: Tensor) -> torch.dtype:
    # Under autocast norms leave queries and keys in fp32 and values in bf16; torch's own attention
    # is on autocast's list, ours has to do the cast itself.
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return value.dtype


def _refuse_unknown_attention(
    module: nn.Module, query: Tensor, key: Tensor, dropout: float, others: dict[str, Any]
) -> None:
    name = type(module).__name__
    if dropout:
        raise ModelError(
            f"{name} drops {dropout:.0%} of its attention, and shared tokens can be dropped only "
            "once for all sequences that share them. Set attention_dropout to 0."
        )
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ModelError(
            f"{name} has {query.shape[2]} queries and {key.shape[2]} keys, so it attends to "
            "something else than the sequence itself (a cache, an encoder)."
        )
    for argument in ("s_aux", "position_bias", "head_mask"):
        if others.get(argument) is not None:
            raise ModelError(
                f"{name} passes {argument}, which prefix-tree attention has no use for."
            )
    if not getattr(module, "is_causal", True):
        raise ModelError(f"{name} is not causal: a token sees what comes after it.")


def follow_trees(lm: PreTrainedModel) -> None:
    """Let the model's attention modules answer the keyword `prefix_tree`; once is enough.

    The hooks sit on the attention modules, since checkpointing recomputes a layer's forward but
    not its hooks. They hold no state, so copies of the model keep working.
    """
    for layer in lm.modules():
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        for child in layer.children():
            is_new = _use_tree not in child._forward_pre_hooks.values()
            if hasattr(child, "config") and is_new:
                child.register_forward_pre_hook(_use_tree, with_kwargs=True)
                child.register_forward_hook(_use_own, with_kwargs=True, always_call=True)


def _use_tree(module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:  # noqa: ANN401
    if kwargs.get("prefix_tree") is not None:
        config = cast(Any, module.config)
        module._own_attention = config._attn_implementation  # pyright: ignore
        config._attn_implementation = _NAME


def _use_own(module: nn.Module, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:  # noqa: ANN401
    if kwargs.get("prefix_tree") is not None:
        config = cast(Any, module.config)
        config._attn_implementation = module._own_attention  # pyright: ignore
