"""Before sampling, a context goes through the model once, and only where it is new.

`generate` computes keys and values of the whole context for each row of its batch. The rollouts of
a group begin with the same prompt: at P = 1024, G = 4 and actions of 64 tokens its copies are three
quarters of all that sampling computes. And each turn begins with everything up to the turn before,
so that T turns cost T squared. Here each distinct context is computed once, its cache repeated, and
the next turn goes on from the caches of this one. A system prompt and tool descriptions, with which
the contexts of all prompts begin, are computed once too, where that saves enough.

Letters: B rows, U distinct contexts, K kept columns, T columns, H heads, D head size.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from composer_replication.step.hidden_states import causal_lm
from composer_replication.training.growing_cache import let_grow

_CACHED_LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers whose cache is keys and values, a row of them for each context."""

_WORTH_A_FORWARD = 1024
"""Tokens: what all contexts begin with gets a forward of its own where that saves so many. On a GPU
the launches of a small model's forward take about as long as those tokens."""


@contextlib.contextmanager
def shared_prefill(model: nn.Module) -> Iterator[None]:
    """Within it, `generate` of the causal LM inside `model` computes no context twice.

    Sampled tokens are those of `generate` itself up to the rounding of another batch shape. A model
    with other caches than keys and values, and a call that is not plain text, are left alone.

    The model must stay as it is inside; the caches of the last call are held until the end. Within
    another `shared_prefill` of the same model this one does nothing.
    """
    lm = causal_lm(model)
    kinds = set(getattr(lm.config.get_text_config(), "layer_types", None) or ["full_attention"])
    is_stateful = getattr(lm, "_is_stateful", False)
    is_inner = isinstance(vars(lm).get("generate"), _GenerateFromShared)
    if is_inner or not kinds <= _CACHED_LAYERS or lm.config.is_encoder_decoder or is_stateful:
        yield
        return
    vars(lm)["generate"] = _GenerateFromShared(lm)
    try:
        yield
    finally:
        # The class's own method again.
        del vars(lm)["generate"]


@dataclass(slots=True)
class _Kept:
    """Keys and values of a finished `generate`; its columns are those of `ids`."""

    ids: Int[Tensor, "B T"]
    num_padded: Int[Tensor, " B"]
    """Columns on the left of each row that hold nothing."""
    layers: list[tuple[Tensor, Tensor]]
    """Keys and values, [B, H, T, D] each."""

    def shared_with(self, ids: Int[Tensor, " n"]) -> tuple[int, int]:
        """The row that begins most like these ids, and the number of tokens they share."""
        columns = self.num_padded[:, None] + torch.arange(len(ids), device=ids.device)
        is_there = columns < self.ids.shape[1]
        found = self.ids.gather(1, columns.clamp(max=self.ids.shape[1] - 1))
        lengths = ((found == ids) & is_there).cumprod(1).sum(1)
        row = int(lengths.argmax())
        return row, int(lengths[row])


class _GenerateFromShared:
    """Stands for `lm.generate`."""

    def __init__(self, lm: PreTrainedModel) -> None:
        self._lm = lm
        self._generate = cast(Callable[..., Tensor], lm.generate)
        self._kept: _Kept | None = None

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **keywords: Any,  # noqa: ANN401, those of `generate`
    ) -> Tensor:
        if input_ids is None or attention_mask is None or not _is_plain(self._lm, keywords):
            return self._generate(input_ids=input_ids, attention_mask=attention_mask, **keywords)
        cache = self._cache_of(input_ids[:, :-1], attention_mask[:, :-1])
        output = self._generate(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, **keywords
        )
        if cache is not None:
            self._kept = _kept_after(cache, output, attention_mask)
        return output

    def _cache_of(self, ids: Int[Tensor, "B T"], mask: Int[Tensor, "B T"]) -> DynamicCache | None:
        """Of all tokens but each row's last, which `generate` feeds itself.

        Rows are padded on the left and stay so: the cache has a place for each column.
        """
        if ids.shape[1] == 0:
            return None
        keys = torch.cat([ids * mask, mask], dim=1)
        _, row_of = torch.unique(keys, dim=0, return_inverse=True)
        # The first row of each distinct context stands for all of its copies.
        first_of = torch.full((int(row_of.max()) + 1,), len(row_of), device=row_of.device)
        rows = torch.arange(len(row_of), device=row_of.device)
        first_of.scatter_reduce_(0, row_of, rows, reduce="amin")
        ids, mask = ids[first_of], mask[first_of]
        positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
        if self._kept is None:
            self._kept = self._common_start(ids, mask)
        cache, start = self._kept_columns(ids, mask)
        self._lm(
            input_ids=ids[:, start:],
            attention_mask=mask,
            position_ids=positions[:, start:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.reorder_cache(row_of)
        return cache

    def _common_start(self, ids: Int[Tensor, "U T"], mask: Int[Tensor, "U T"]) -> _Kept | None:
        """What all contexts begin with, as if a turn had ended there; None where that is little."""
        num_padded = (mask == 0).sum(1)
        columns = num_padded[:, None] + torch.arange(int(mask.sum(1).min()), device=ids.device)
        starts = ids.gather(1, columns)
        num_common = int((starts == starts[0]).all(0).long().cumprod(0).sum())
        if num_common * (len(ids) - 1) < _WORTH_A_FORWARD:
            return None
        common = starts[:1, :num_common]
        cache = let_grow(DynamicCache(config=self._lm.config))
        self._lm(input_ids=common, past_key_values=cache, use_cache=True, logits_to_keep=1)
        layers = _whole_layers(cache, common.shape)
        return None if layers is None else _Kept(common, num_padded.new_zeros(1), layers)

    def _kept_columns(
        self, ids: Int[Tensor, "U T"], mask: Int[Tensor, "U T"]
    ) -> tuple[DynamicCache, int]:
        """A cache of the first K columns, and K: every row ends with at most T - K new tokens."""
        cache = let_grow(DynamicCache(config=self._lm.config))
        kept, self._kept = self._kept, None
        if kept is None:
            return cache, 0
        num_padded = (mask == 0).sum(1)
        lengths = mask.sum(1).tolist()
        found = [kept.shared_with(row[len(row) - n :]) for row, n in zip(ids, lengths, strict=True)]
        num_new = max(n - shared for n, (_, shared) in zip(lengths, found, strict=True))
        # At least one: there is no forward of nothing.
        start = ids.shape[1] - max(num_new, 1)
        if start < 1:
            return cache, 0
        sources = torch.tensor([row for row, _ in found], device=ids.device)
        shifts = kept.num_padded[sources] - num_padded
        # What stands in a padded column is masked.
        columns = (torch.arange(start, device=ids.device) + shifts[:, None]).clamp(min=0)
        columns = columns.clamp(max=kept.ids.shape[1] - 1)
        for index in range(len(kept.layers)):
            # One layer at a time, so that both caches are never whole.
            keys, values = kept.layers.pop(0)
            cache.update(_taken(keys, sources, columns), _taken(values, sources, columns), index)
        return cache, start


def _taken(states: Tensor, rows: Int[Tensor, " U"], columns: Int[Tensor, "U K"]) -> Tensor:
    """[B, H, T, D] -> [U, H, K, D]."""
    return states.transpose(1, 2)[rows[:, None], columns].transpose(1, 2)


def _kept_after(
    cache: DynamicCache, output: object, attention_mask: Int[Tensor, "B T"]
) -> _Kept | None:
    """What a finished `generate` leaves: all columns but that of the last token."""
    if not isinstance(output, Tensor):
        return None
    ids = output[:, :-1]
    layers = _whole_layers(cache, ids.shape)
    return None if layers is None else _Kept(ids, (attention_mask == 0).sum(1), layers)


def _whole_layers(cache: DynamicCache, shape: torch.Size) -> list[tuple[Tensor, Tensor]] | None:
    """Keys and values of every layer; None unless each has all of these rows and columns.

    A sliding window forgets columns.
    """
    layers: list[tuple[Tensor, Tensor]] = []
    for layer in cache.layers:
        if not isinstance(layer, CacheLayerMixin) or layer.keys is None or layer.values is None:
            return None
        if (layer.keys.shape[0], layer.keys.shape[2]) != tuple(shape):
            return None
        layers.append((layer.keys, layer.values))
    return layers


def _is_plain(lm: PreTrainedModel, keywords: dict[str, Any]) -> bool:
    """Whether nothing but text goes in, and the cache is the one that `generate` would make."""

    def setting(name: str) -> object:
        given = getattr(keywords.get("generation_config"), name, None)
        own = getattr(lm.generation_config, name, None)
        return next((v for v in (keywords.get(name), given, own) if v is not None), None)

    inputs = [name for name, value in keywords.items() if isinstance(value, Tensor)]
    has_own_cache = setting("cache_implementation") not in (None, "dynamic")
    # Beams and further samples of a row have caches of their own.
    is_expanded = any(
        setting(name) not in (None, 1) for name in ("num_beams", "num_return_sequences")
    )
    is_cached = setting("use_cache") is not False and "past_key_values" not in keywords
    return not inputs and not has_own_cache and not is_expanded and is_cached
