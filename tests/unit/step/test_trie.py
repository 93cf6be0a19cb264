"""The prefix tree's layout against a quadratic oracle, on hand-made and random sequences."""

import numpy as np
import pytest
import torch

from composer_replication.step.trie import (
    PrefixTree,
    Run,
    common_prefix,
    dfs_order,
    num_unique_tokens,
    split_at_nodes,
)


def ids(*tokens):
    return np.array(tokens, np.int64)


def random_sequences(seed, num=9, length=14, vocab=3):
    """Few tokens, so that branches, prefixes and duplicates happen at every depth."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, rng.integers(0, length)) for _ in range(num)]


def assert_layout_is_right(sequences):
    tree = PrefixTree(sequences)
    prefixes = {tuple(s[: n + 1].tolist()) for s in sequences for n in range(len(s))}
    assert tree.num_rows == len(tree.token_ids) == len(prefixes)
    assert num_unique_tokens(sequences) == len(prefixes)
    visible = tree.visible()
    prefix_of_row = {}
    for sequence, rows in zip(sequences, tree.rows, strict=True):
        assert tree.token_ids[rows].tolist() == sequence.tolist()
        assert tree.positions[rows].tolist() == list(range(len(sequence)))
        for place, row in enumerate(rows.tolist()):
            prefix = tuple(sequence[: place + 1].tolist())
            assert prefix_of_row.setdefault(row, prefix) == prefix
            assert visible[row].nonzero().squeeze(-1).tolist() == rows[: place + 1].tolist()


def test_shared_tokens_are_laid_out_once():
    tree = PrefixTree([ids(5, 6, 7), ids(5, 6, 8), ids(5, 6)])
    assert tree.token_ids.tolist() == [5, 6, 7, 8]
    assert tree.positions.tolist() == [0, 1, 2, 2]
    assert tree.reach.tolist() == [4, 4, 3, 4]
    assert [rows.tolist() for rows in tree.rows] == [[0, 1, 2], [0, 1, 3], [0, 1]]
    assert tree.runs == [Run(0, 3, 0, ()), Run(3, 4, 2, ((0, 2),))]


@pytest.mark.parametrize("seed", range(30))
def test_every_row_of_a_random_tree_sees_exactly_its_own_prefix(seed):
    assert_layout_is_right(random_sequences(seed))


def test_sequences_are_laid_out_in_the_order_of_their_ids():
    rng = np.random.default_rng(0)
    # Around 256 and 65,536 an order of bytes from the low end would part from that of the ids.
    pool = np.array([0, 1, 255, 256, 257, 65_535, 65_536, 151_935])
    sequences = [rng.choice(pool, rng.integers(0, 5)) for _ in range(200)]
    lists = [sequences[index].tolist() for index in dfs_order(sequences)]
    assert lists == sorted(lists)


@pytest.mark.parametrize(
    "sequences",
    [
        [],
        [ids()],
        [ids(), ids(1)],
        [ids(1, 2, 3)],
        [ids(1, 2), ids(3, 4)],
        [ids(1, 2), ids(1, 2), ids(1, 2)],
        [ids(1), ids(1, 2), ids(1, 2, 3), ids(1, 2, 3, 4)],
        [ids(1, 2, 3), ids(2, 3), ids(3)],
        [ids(9, 1, 2), ids(7, 9, 1, 2)],
    ],
    ids=[
        "nothing",
        "an empty sequence",
        "an empty one beside another",
        "one sequence",
        "no shared token",
        "duplicates",
        "each a prefix of the next",
        "each a suffix of the one before",
        "a hint at position 0",
    ],
)
def test_odd_sequences_are_laid_out_too(sequences):
    assert_layout_is_right(sequences)


def test_a_chain_of_prefixes_is_one_run():
    assert PrefixTree([ids(1), ids(1, 2), ids(1, 2, 3)]).runs == [Run(0, 3, 0, ())]


def test_the_order_of_sequences_does_not_change_the_layout():
    sequences = random_sequences(3)
    one, other = PrefixTree(sequences), PrefixTree(sequences[::-1])
    assert torch.equal(one.token_ids, other.token_ids)
    assert one.runs == other.runs


def test_prefixes_of_100k_tokens_are_merged_in_seconds():
    prefix = np.arange(100_000)
    tree = PrefixTree([np.append(prefix, [branch, branch]) for branch in range(8)])
    assert tree.num_rows == 100_000 + 16
    assert [len(run.ancestors) for run in tree.runs] == [0] + 7 * [1]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("budget", [1, 9, 20, 1000])
def test_parts_hold_every_sequence_once_within_the_budget(seed, budget):
    sequences = random_sequences(seed)
    parts = split_at_nodes(sequences, budget)
    assert sorted(index for part in parts for index in part) == list(range(len(sequences)))
    for part in parts:
        num_rows = PrefixTree([sequences[index] for index in part]).num_rows
        longest = max(len(sequences[index]) for index in part)
        # A single sequence cannot be cut: what remains has another gradient.
        assert num_rows <= max(budget, longest)


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_no_part_is_of_empty_sequences_alone(budget):
    sequences = [ids(), ids(1, 2, 3), ids(), ids(1, 2, 4)]
    parts = split_at_nodes(sequences, budget)
    assert [sorted(part) for part in parts] == [[0, 1, 2], [3]]


def test_a_step_within_its_budget_is_not_cut():
    sequences = random_sequences(1)
    size = PrefixTree(sequences).num_rows
    assert len(split_at_nodes(sequences, size)) == 1
    assert len(split_at_nodes(sequences, size - 1)) == 2
    assert len(split_at_nodes(sequences, None)) == 1


def test_the_common_prefix_is_counted_in_tokens():
    assert common_prefix(ids(1, 2, 3), ids(1, 2, 4)) == 2
    assert common_prefix(ids(1, 2), ids(1, 2, 4)) == 2
    assert common_prefix(ids(), ids(1)) == 0
    assert common_prefix(ids(2), ids(1)) == 0
