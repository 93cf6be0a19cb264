"""Unmodified transformers models attend over a prefix tree, through their attention interface.

The kernel travels as the keyword `prefix_tree` from the model's forward to its attention modules,
and so also through the recomputation of gradient checkpointing. A hook on those modules switches
the attention while the keyword is there; every other forward, generation included, is untouched.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from composer_replication.errors import ModelError
from composer_replication.step.rectangle_kernels import Scoring
from composer_replication.step.tree_attention import TreeKernel

_NAME = "composer_prefix_tree"


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
