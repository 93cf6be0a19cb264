"""Rows filled to a length, for figures at the largest shape."""

import pytest

from composer_replication.batch.collate import ComposerDataCollator
from composer_replication.errors import ConfigError
from composer_replication.experiments.fixed_shapes import (
    full_length_pairs,
    full_length_sites,
    shortest_full_row,
)


def test_rows_can_be_filled_from_the_shortest_length_on_and_not_below(smollm2_tokenizer):
    shortest = shortest_full_row(smollm2_tokenizer)
    collator = ComposerDataCollator(smollm2_tokenizer)
    for num_tokens in (shortest, shortest + 7):
        _, teacher, _ = collator.site_rows(full_length_sites(smollm2_tokenizer, num_tokens, 1)[0])
        chosen, _, _ = collator.pair_rows(full_length_pairs(smollm2_tokenizer, num_tokens, 1)[0])
        assert len(teacher.token_ids) == len(chosen.token_ids) == num_tokens
    with pytest.raises(ConfigError, match="cannot hold this model's chat template"):
        full_length_sites(smollm2_tokenizer, shortest - 1, 1)
