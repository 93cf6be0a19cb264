"""How many FLOPs a step needs: what its forwards compute, counted from their shapes.

A multiplication and an addition are 2. Attention counts the causal half; recomputation (of tiles
of logits, of flash attention's backward) is not counted, so a variant's rate is never flattered.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

GRAD_FACTOR = 3
"""A forward and its backward: each matrix product has two more in the backward."""


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward's work.

    Example: two padded rows of 10 tokens with full logits: `Forward(20, 2 * 55, 20)`.
    """

    tokens: int
    """Including padding."""
    attention_pairs: int
    """Sum over tokens of the tokens that each one reads."""
    head_rows: int
    """Rows that the output head projects."""
    is_trained: bool = True


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What FLOPs depend on."""

    linear_weights: int
    """Of all linear layers but the head."""
    attention_width: int
    """Heads times head dimension, summed over layers."""
    head_weights: int

    def flops(self, work: Iterable[Forward]) -> float:
        """Of these forwards and their backwards."""
        total = 0.0
        for forward in work:
            once = 2 * self.linear_weights * forward.tokens
            once += 4 * self.attention_width * forward.attention_pairs
            once += 2 * self.head_weights * forward.head_rows
            total += once * (GRAD_FACTOR if forward.is_trained else 1)
        return total


def model_size(model: PreTrainedModel) -> ModelSize:
    """Counted from the modules; embeddings are looked up, not multiplied."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    linear = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head
    )
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    width = config.num_hidden_layers * heads * head_dim
    return ModelSize(linear, width, head.weight.numel())


def padded_forward(
    lengths: Iterable[int], *, head_rows: int | None = None, is_trained: bool = True
) -> Forward:
    """Rows padded to the longest of them; `head_rows` None: full logits."""
    lengths = list(lengths)
    longest = max(lengths)
    tokens = len(lengths) * longest
    pairs = len(lengths) * longest * (longest + 1) // 2
    return Forward(tokens, pairs, tokens if head_rows is None else head_rows, is_trained)
