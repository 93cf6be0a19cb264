"""Whether a prefix tree reproduces a model's own forwards, and if not, why.

Known obstacles are named first; a probe then compares both on a few random sequences, so that an
architecture that nobody thought of falls back to `separate` instead of training on wrong numbers.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from composer_replication.errors import ModelError
from composer_replication.step.hidden_states import (
    causal_lm,
    final_hidden_states,
    in_eval_mode,
    modes_kept,
    tree_hidden_states,
)
from composer_replication.step.rectangle_kernels import Scoring
from composer_replication.step.tree_attention import PLAIN_PRODUCTS, RectangleKernel, TreeKernel
from composer_replication.step.trie import PrefixTree

_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
_MOVING_ROPE = ("dynamic", "longrope")
_PROBE_TOKENS = 40
_MAX_PROBE_WINDOW = 512
"""Windows up to here are crossed by the probe's sequences."""
_MAX_ERROR = {torch.float64: 1e-6, torch.float32: 1e-3}
_MAX_HALF_ERROR = 0.1
"""Relative to the norm of the hidden states. A branch that sees another moves them by 0.3 and more;
bf16 rounds 30 layers to a few hundredths."""
_MAX_NOISE = {torch.float64: 1e-9, torch.float32: 1e-5}
_MAX_HALF_NOISE = 0.01
"""Of one forward against the same again: sums of a GPU's threads come in any order."""


def why_not_packed(model: nn.Module) -> str | None:
    """The reason why `score_packed` would not give the model's own numbers; None: it does.

    Costs a forward of a few hundred random tokens, three times.

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
    moving = sorted(name for name in _rope_types(config) if name in _MOVING_ROPE)
    if moving:
        return (
            f"its {moving[0]} rotary frequencies follow the longest sequence of a forward, and a "
            "tree has all of a step in one"
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
    if any(getattr(peft, "alora_invocation_tokens", None) for peft in peft_configs.values()):
        return "its adapter starts at a token of each sequence, and a tree has several"
    return None


def _rope_types(config: Any) -> set[str]:  # noqa: ANN401 - transformers' own type is open
    found: Mapping[str, object] = getattr(config, "rope_parameters", None) or {}
    # Where kinds of layers differ, each has its own.
    parts = [found, *(part for part in found.values() if isinstance(part, Mapping))]
    return {str(cast(Mapping[str, object], part).get("rope_type")) for part in parts}


def _dropout(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        own = vars(module)
        rates = [module.p if isinstance(module, nn.Dropout) else own.get("attention_dropout")]
        rates.append(own.get("layerdrop"))
        for rate in rates:
            if isinstance(rate, float) and rate > 0:
                yield f"{name} drops {rate:.0%} of its values"


def _probed_difference(model: nn.Module) -> str | None:
    config = causal_lm(model).config.get_text_config()
    device = next(model.parameters()).device
    sequences = _probe_sequences(config)
    tree = PrefixTree(sequences)
    kernel = _NotingKernel(RectangleKernel(tree, device))
    with (
        torch.no_grad(),
        in_eval_mode(model),
        _exact_products(),
        warnings.catch_warnings(),
    ):
        # The probe is without autocast, in the precision of the weights; training may not be.
        warnings.filterwarnings("ignore", PLAIN_PRODUCTS)
        try:
            packed = tree_hidden_states(model, tree, kernel)
        except ModelError as error:
            return str(error)
        except (RuntimeError, TypeError, ValueError) as error:
            # A forward that knows no such arguments or shapes; its own words say which.
            return f"its forward refuses a tree ({type(error).__name__}: {error})"
        alone = [_alone(model, ids, device) for ids in sequences]
    pairs = zip(tree.rows, alone, strict=True)
    error = max(_difference(packed[torch.from_numpy(r).to(device)], own) for r, own in pairs)
    bound = _MAX_ERROR.get(packed.dtype, _MAX_HALF_ERROR)
    if not error <= bound:
        return (
            f"its hidden states on a tree of random tokens are {error:.2g} away from those of "
            f"separate forwards, relative to their norm, and {bound:g} is allowed"
        )
    window = _window(config)
    if window is not None and window not in kernel.windows:
        return (
            f"its window of {window} tokens is in its mask alone, which a tree takes the place of"
        )
    noise = _difference(_trained(model, sequences[0], device), alone[0])
    if not noise <= _MAX_NOISE.get(packed.dtype, _MAX_HALF_NOISE):
        return (
            f"its forward in training is {noise:.2g} away from its forward in evaluation, so it "
            "draws random numbers, which sequences of a tree would share"
        )
    return None


class _NotingKernel:
    """A kernel, and the windows that it was asked for."""

    def __init__(self, kernel: TreeKernel) -> None:
        self.windows: set[int | None] = set()
        self._kernel = kernel

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """See `TreeKernel`."""
        self.windows.add(scoring.window)
        return self._kernel(query, key, value, scoring)


def _window(config: Any) -> int | None:  # noqa: ANN401 - transformers' own type is open
    """Tokens that some layer's queries see at most; None: all of them."""
    kinds = getattr(config, "layer_types", None)
    if kinds and "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None)


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


def _alone(model: nn.Module, ids: np.ndarray, device: torch.device) -> Tensor:
    row = torch.from_numpy(ids).to(device)[None]
    return final_hidden_states(model, row, torch.ones_like(row))[0]


def _trained(model: nn.Module, ids: np.ndarray, device: torch.device) -> Tensor:
    """The same as it is while the model trains; the generators' states stay as they were."""
    devices = [device] if device.type == "cuda" else []
    with (
        torch.no_grad(),
        modes_kept(model),
        _exact_products(),
        torch.random.fork_rng(devices),
        warnings.catch_warnings(),
    ):
        # Checkpointing warns of inputs without gradient.
        warnings.simplefilter("ignore")
        model.train()
        return _alone(model, ids, device)


def _difference(packed: Tensor, alone: Tensor) -> float:
    return float((packed - alone).float().norm() / alone.float().norm())
