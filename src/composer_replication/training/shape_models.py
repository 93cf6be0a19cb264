"""Models with the public shape of Qwen2.5-Instruct and random weights, for timing and memory.

The configurations are `config/shapes/*.json`. The weights mean nothing and every caller says so;
the tokenizer is SmolLM2's, whose 49 152 tokens lie inside the shape's full vocabulary.
"""

from typing import cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from composer_replication.planner.model_files import shipped_config

# A prime number of values: no row length divides it, so a tensor larger than the block repeats
# its values at another column each time and no two rows are equal.
_BLOCK_LEN = 16_777_213


def shape_config(name: str) -> PreTrainedConfig:
    """The public configuration of one shape.

    Raises:
        ModelError: no such shape is shipped.
    """
    settings = dict(shipped_config(name))
    return AutoConfig.for_model(cast(str, settings.pop("model_type")), **settings)


def build_shape_model(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    attn_implementation: str,
    seed: int,
) -> PreTrainedModel:
    """A model of the shape with seeded random weights, allocated once and directly in `dtype`.

    Generation stops at the tokenizer's own end token, not at Qwen's.
    """
    config = shape_config(name)
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    model.tie_weights()
    _fill_with_random_weights(model, config.initializer_range, seed)
    return model.eval()


@torch.no_grad()
def _fill_with_random_weights(model: nn.Module, std: float, seed: int) -> None:
    """Matrices from N(0, std**2), norm weights 1, biases 0, as the architecture starts out.

    Drawing billions of normal numbers takes a CPU a minute; copying one block of them from a random
    offset takes seconds and leaves every matrix full rank and unrelated to the others.
    """
    generator = torch.Generator().manual_seed(seed)
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    block_len = min(_BLOCK_LEN, max(weight.numel() for weight in matrices))
    block = torch.empty(block_len, dtype=matrices[0].dtype).normal_(0.0, std, generator=generator)
    for weight in matrices:
        offset = int(torch.randint(block_len, (), generator=generator))
        _copy_cyclic(block, offset, weight.view(-1))
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(0.0 if parameter_name.endswith("bias") else 1.0)


def _copy_cyclic(block: Tensor, offset: int, target: Tensor) -> None:
    """Fill the flat `target` with the block's values, starting at `offset` and wrapping around."""
    num_done = 0
    while num_done < target.numel():
        piece = block[offset : offset + target.numel() - num_done]
        target[num_done : num_done + piece.numel()].copy_(piece)
        num_done += piece.numel()
        offset = 0
