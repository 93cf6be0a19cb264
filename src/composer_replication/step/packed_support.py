"""Whether a prefix tree reproduces a model's own forwards, and if not, why.

Known obstacles are named first; a probe then compares both on a few random sequences, so that an
architecture that nobody thought of falls back to `separate` instead of training on wrong numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from composer_replication.errors import ModelError
from composer_replication.step.hidden_states import (
    causal_lm,
    final_hidden_states,
    in_eval_mode,
    tree_hidden_states,
)
from composer_replication.step.tree_attention import RectangleKernel
from composer_replication.step.trie import PrefixTree

_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
_PROBE_TOKENS = 40
_MAX_PROBE_WINDOW = 512
"""Windows up to here are crossed by the probe's sequences."""
_MAX_ERROR = {torch.float64: 1e-6, torch.float32: 1e-3}
_MAX_HALF_ERROR = 0.1
"""Relative to the norm of the hidden states. A mask that is wrong moves them by 0.3 and more; bf16
rounds 30 layers to a few hundredths."""


def why_not_packed(model: nn.Module) -> str | None:
    """The reason why `score_packed` would not give the model's own numbers; None: it does.

    Costs a forward of a few hundred random tokens, twice.

    Args:
        model: the policy, wrapped or not; nothing about it changes.
    """
    return _known_obstacle(model) or _probed_difference(model)


def _known_obstacle(model: nn.Module) -> str | None:
    if hasattr(causal_lm(model).config, "vision_config"):
        return "it reads images, whose tokens ids do not tell apart"
    config = causal_lm(model).config.get_text_config()
    layer_types: list[str] = getattr(config, "layer_types", None) or []
    foreign = sorted(set(layer_types) - _ATTENTION_LAYERS)
    if foreign:
        return (
            f"it has {', '.join(foreign)} layers: the state that they pass from token to token, or "
            "their chunks of a row, would pass from one branch of a tree to the next"
        )
    dropped = next(_dropout(model), None)
    if dropped is not None:
        return (
            f"{dropped}, and a token shared by several sequences would be dropped for all of them "
            "at once"
        )
    peft_configs = getattr(model, "peft_config", None) or {}
    if any(peft.is_prompt_learning for peft in peft_configs.values()):
        return "its adapter puts virtual tokens before each sequence, and a tree has several"
    return None


def _dropout(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        rate = module.p if isinstance(module, nn.Dropout) else vars(module).get("attention_dropout")
        if isinstance(rate, float) and rate > 0:
            yield f"{name} drops {rate:.0%} of its values"


def _probed_difference(model: nn.Module) -> str | None:
    lm = causal_lm(model)
    device = next(lm.parameters()).device
    sequences = _probe_sequences(lm.config.get_text_config())
    tree = PrefixTree(sequences)
    with torch.no_grad(), in_eval_mode(lm), _exact_products():
        try:
            packed = tree_hidden_states(lm, tree, RectangleKernel(tree, device))
        except ModelError as error:
            return str(error)
        except (RuntimeError, TypeError, ValueError) as error:
            # A forward that knows no such arguments or shapes; its own words say which.
            return f"its forward refuses a tree ({type(error).__name__}: {error})"
        error = max(
            _difference(packed[torch.from_numpy(rows).to(device)], _alone(lm, ids, device))
            for ids, rows in zip(sequences, tree.rows, strict=True)
        )
    bound = _MAX_ERROR.get(packed.dtype, _MAX_HALF_ERROR)
    if error <= bound:
        return None
    return (
        f"its hidden states on a tree of random tokens are {error:.2g} away from those of separate "
        f"forwards, relative to their norm, and {bound:g} is allowed"
    )


@contextmanager
def _exact_products() -> Iterator[None]:
    """fp32 products in fp32: TF32, which a run may have on, is as far off as what is allowed."""
    products = torch.backends.cuda.matmul
    precision = products.fp32_precision
    # Where it is not set, it follows that of all backends, and goes on to do so.
    follows = precision == torch.backends.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        products.fp32_precision = "none" if follows else precision


def _probe_sequences(config: object) -> list[np.ndarray]:
    """A stem, two branches off it, and a branch off a branch, each longer than a short window."""
    window = getattr(config, "sliding_window", None) or 0
    length = _PROBE_TOKENS + (window if window <= _MAX_PROBE_WINDOW else 0)
    vocab_size = int(getattr(config, "vocab_size"))  # noqa: B009 - transformers' own type is open
    draw = np.random.default_rng(0)
    stem, branch, first, second, third = (
        draw.integers(0, vocab_size, size) for size in (length, 12, 9, 7, 15)
    )
    middle = np.concatenate([stem, branch])
    return [np.concatenate(parts) for parts in ((middle, first), (middle, second), (stem, third))]


def _alone(lm: nn.Module, ids: np.ndarray, device: torch.device) -> Tensor:
    row = torch.from_numpy(ids).to(device)[None]
    return final_hidden_states(lm, row, torch.ones_like(row))[0]


def _difference(packed: Tensor, alone: Tensor) -> float:
    return float((packed - alone).float().norm() / alone.float().norm())
