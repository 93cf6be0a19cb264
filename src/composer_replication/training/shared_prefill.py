"""Equal contexts go through the model once before sampling, however many rollouts start from them.

The rollouts of a group begin with the same prompt, and `generate` computes the prompt's keys and
values for each row of its batch: at P = 1024, G = 4 and actions of 64 tokens that is three quarters
of all that sampling computes. Here each distinct context is computed once and its cache repeated.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from composer_replication.step.hidden_states import causal_lm

_CACHED_LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers whose cache is keys and values, a row of them for each context."""


@contextlib.contextmanager
def shared_prefill(model: nn.Module) -> Iterator[None]:
    """Within it, `generate` of the causal LM inside `model` computes each distinct context once.

    Sampled tokens are those of `generate` itself up to the rounding of another batch shape. A model
    with other caches than keys and values, and a call that is not plain text, are left alone.
    """
    lm = causal_lm(model)
    kinds = set(getattr(lm.config.get_text_config(), "layer_types", None) or ["full_attention"])
    is_stateful = getattr(lm, "_is_stateful", False)
    if not kinds <= _CACHED_LAYERS or lm.config.is_encoder_decoder or is_stateful:
        yield
        return
    generate = cast(Callable[..., Tensor], lm.generate)

    def generate_from_shared(
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **keywords: Any,  # noqa: ANN401, those of `generate`
    ) -> Tensor:
        if input_ids is not None and attention_mask is not None and _is_plain(keywords):
            keywords["past_key_values"] = _cache_of(lm, input_ids, attention_mask)
        return generate(input_ids=input_ids, attention_mask=attention_mask, **keywords)

    vars(lm)["generate"] = generate_from_shared
    try:
        yield
    finally:
        # The class's own method again.
        del vars(lm)["generate"]


def _is_plain(keywords: dict[str, Any]) -> bool:
    """Whether nothing but text goes in, and the cache is the one that `generate` would make."""
    settings = keywords.get("generation_config")
    inputs = [name for name, value in keywords.items() if isinstance(value, Tensor)]
    has_own_cache = getattr(settings, "cache_implementation", None) not in (None, "dynamic")
    uses_cache = getattr(settings, "use_cache", None) is not False
    return not inputs and not has_own_cache and uses_cache and "past_key_values" not in keywords


def _cache_of(lm: PreTrainedModel, input_ids_BT: Tensor, mask_BT: Tensor) -> DynamicCache | None:
    """Keys and values of all tokens but each row's last, which `generate` feeds itself.

    Rows are padded on the left and stay so: the cache has a place for each column.
    """
    ids_BT, mask_BT = input_ids_BT[:, :-1], mask_BT[:, :-1]
    if ids_BT.shape[1] == 0:
        return None
    keys = torch.cat([ids_BT * mask_BT, mask_BT], dim=1)
    _, row_of = torch.unique(keys, dim=0, return_inverse=True)
    # The first row of each distinct context stands for all of its copies.
    first_of = torch.full((int(row_of.max()) + 1,), len(row_of), device=row_of.device)
    rows = torch.arange(len(row_of), device=row_of.device)
    first_of.scatter_reduce_(0, row_of, rows, reduce="amin")
    ids, mask = ids_BT[first_of], mask_BT[first_of]
    positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
    cache = DynamicCache(config=lm.config)
    lm(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    cache.reorder_cache(row_of)
    return cache
