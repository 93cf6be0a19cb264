"""Endless shuffled passes: every record once a pass, ranks apart, resumable, no global state."""

import random

import pytest
import torch

from composer_replication import HintSite, Message
from composer_replication.errors import DataError
from composer_replication.training.record_loader import RecordLoader, hint_sites_from, pairs_from

RECORDS = list("abcde")


def test_every_record_comes_once_a_pass_and_passes_differ():
    loader = RecordLoader(RECORDS, seed=0)
    passes = [loader.take(5) for _ in range(4)]
    assert all(sorted(one) == RECORDS for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_ranks_share_out_what_one_process_would_take():
    whole = RecordLoader(RECORDS, seed=3).take(4)
    ranks = [RecordLoader(RECORDS, seed=3).take(2, rank=r, num_ranks=2) for r in range(2)]
    assert ranks[0] + ranks[1] == whole


def test_a_position_restores_the_order_exactly():
    first = RecordLoader(RECORDS, seed=1)
    first.take(7)
    second = RecordLoader(RECORDS, seed=1)
    second.position = first.position
    assert first.take(9) == second.take(9)


def test_the_global_random_states_are_neither_read_nor_moved():
    random.seed(0)
    torch.manual_seed(0)
    before = (random.getstate(), torch.get_rng_state())
    first = RecordLoader(RECORDS, seed=1).take(5)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    random.seed(99)
    assert RecordLoader(RECORDS, seed=1).take(5) == first


def test_rows_of_a_dataset_become_records():
    row = {"state": [{"role": "user", "content": "u"}], "hint": "h", "action": "a"}
    assert hint_sites_from([row]) == [HintSite((Message("user", "u"),), "h", "a")]


@pytest.mark.parametrize("read", [hint_sites_from, pairs_from])
def test_an_empty_list_is_refused_since_its_channel_could_never_train(read):
    with pytest.raises(DataError, match="could never train"):
        read([])
