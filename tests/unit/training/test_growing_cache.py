"""A cache that grows in place holds what transformers' own holds, and copies it rarely."""

import pytest
import torch
from transformers import DynamicCache, Gemma3TextConfig, LlamaConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from composer_replication.training.growing_cache import SPARE_COLUMNS, GrowingLayer, let_grow

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8}


def states(rows, columns):
    return torch.randn(rows, 2, columns, 4)


@pytest.fixture
def caches():
    """One of transformers and one of ours."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES)
    return DynamicCache(config=config), let_grow(DynamicCache(config=config))


def update_both(caches, rows, columns, layer=0):
    keys, values = states(rows, columns), states(rows, columns)
    expected, found = (cache.update(keys, values, layer) for cache in caches)
    for theirs, ours in zip(expected, found, strict=True):
        assert torch.equal(ours, theirs)
    return found


def test_every_update_returns_all_columns_past_each_allocation(caches):
    for columns in [5, *[1] * (2 * SPARE_COLUMNS + 3), 0, SPARE_COLUMNS * 2, 1]:
        update_both(caches, 3, columns)
        update_both(caches, 3, columns, layer=1)
    assert caches[0].get_seq_length() == caches[1].get_seq_length()


def test_columns_are_copied_once_in_so_many_tokens(caches):
    allocations = {update_both(caches, 1, 1)[0].data_ptr() for _ in range(3 * SPARE_COLUMNS)}
    assert len(allocations) == 3


def test_keys_and_values_do_not_share_an_allocation(caches):
    keys, values = update_both(caches, 1, 2)
    assert keys.untyped_storage().data_ptr() != values.untyped_storage().data_ptr()


def test_a_reordered_or_cut_cache_goes_on_from_what_it_holds(caches):
    update_both(caches, 3, 4)
    # transformers 5.17 cuts no layer that holds nothing.
    update_both(caches, 3, 4, layer=1)
    for cache in caches:
        cache.reorder_cache(torch.tensor([2, 0, 0, 1]))
    update_both(caches, 4, 2)
    for cache in caches:
        cache.crop(-3)
    # An allocation of before the cut would show the columns that were cut off.
    update_both(caches, 4, 1)
    for cache in caches:
        cache.reset()
    update_both(caches, 4, 3)


def test_rows_that_were_one_are_written_apart(caches):
    update_both(caches, 1, 3)
    for cache in caches:
        cache.reorder_cache(torch.tensor([0, 0]))
    keys, _ = update_both(caches, 2, 1)
    assert not torch.equal(keys[0, :, -1], keys[1, :, -1])


def test_layers_that_forget_columns_stay_as_they_are():
    config = Gemma3TextConfig(**SIZES, layer_types=["sliding_attention", "full_attention"])
    first, second = let_grow(DynamicCache(config=config)).layers
    assert type(first) is DynamicSlidingWindowLayer
    assert type(second) is GrowingLayer
