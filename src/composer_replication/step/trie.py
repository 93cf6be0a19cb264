"""The prefix tree of a step batch: every token that sequences share is laid out once.

Sequences are sorted, so each adds only the tokens beyond its common prefix with the one before it:
a *run* of rows. What lies below any row is then contiguous, and one number for each row, its
*reach*, says who may attend to it: row `q` sees row `k` exactly when `k <= q < reach[k]`.

Letters: T rows of the tree (unique tokens), n tokens of one sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

Ids = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Run:
    """Rows that one sequence added: a path of the tree, without a branch into it from outside."""

    start: int
    stop: int
    depth: int
    """Tokens before the first of the run, in each sequence through it."""
    ancestors: tuple[tuple[int, int], ...]
    """Intervals of rows that hold those tokens, in order."""


# Not a dataclass: FSDP rebuilds dataclasses and dicts that travel as arguments of a forward.
class PrefixTree:
    """Sequences merged by common prefix, laid out depth first.

    Example: `[5, 6, 7]`, `[5, 6, 8]` and `[5, 6]` become the rows `5 6 7 8` at positions `0 1 2 2`
    with reach `4 4 3 4`: only 8 cannot see 7.
    """

    def __init__(self, sequences: Sequence[Ids]) -> None:
        """Lay the sequences out; empty ones, duplicates and prefixes of others are fine."""
        self.runs: list[Run] = []
        self._reach: list[tuple[Ids, int]] = []
        self.rows: list[Ids] = [_NO_ROWS] * len(sequences)
        """For each sequence, the row of each of its tokens."""
        tokens: list[Ids] = []
        path = previous = _NO_ROWS
        num_rows = 0
        for index in dfs_order(sequences):
            ids = sequences[index]
            shared = common_prefix(previous, ids)
            # What the last sequence has below the branch is seen by no row from here on.
            self._reach.append((path[shared:], num_rows))
            # The last sequence is a prefix of this one, so its run goes on.
            continues_last = 0 < len(path) == shared
            new_rows = np.arange(num_rows, num_rows + len(ids) - shared)
            if len(new_rows):
                self._add_run(new_rows, path[:shared], extends_last=continues_last)
            path = np.concatenate([path[:shared], new_rows])
            self.rows[index] = path
            tokens.append(ids[shared:])
            previous = ids
            num_rows += len(new_rows)
        self._reach.append((path, num_rows))
        self.num_rows = num_rows
        self.token_ids = torch.from_numpy(np.concatenate([*tokens, _NO_ROWS]))
        self.positions = torch.empty(num_rows, dtype=torch.long)
        for run in self.runs:
            self.positions[run.start : run.stop] = torch.arange(run.stop - run.start) + run.depth

    def _add_run(self, rows: Ids, above: Ids, *, extends_last: bool) -> None:
        if extends_last:
            last = self.runs.pop()
            self.runs.append(Run(last.start, int(rows[-1]) + 1, last.depth, last.ancestors))
            return
        run = Run(int(rows[0]), int(rows[-1]) + 1, len(above), _intervals(above))
        self.runs.append(run)

    @property
    def reach(self) -> Int[Tensor, " T"]:
        """One past the last row that sees each row."""
        reach = np.empty(self.num_rows, dtype=np.int64)
        for rows, stop in self._reach:
            reach[rows] = stop
        return torch.from_numpy(reach)

    def visible(self) -> Bool[Tensor, "T T"]:
        """True where a row (first dim) sees another; for tests and the dense kernel."""
        row = torch.arange(self.num_rows)
        reach = self.reach
        return (row[None] <= row[:, None]) & (row[:, None] < reach[None])


def dfs_order(sequences: Sequence[Ids]) -> list[int]:
    """Indices of the sequences in the order in which a tree lays them out."""
    # Bytes with the high one first compare as the ids do, and 30 times as fast as lists.
    keys = [ids.astype(_BIG_ENDIAN).tobytes() for ids in sequences]
    return sorted(range(len(sequences)), key=keys.__getitem__)


def num_unique_tokens(sequences: Sequence[Ids]) -> int:
    """Rows that the tree of these sequences has.

    Example: `num_unique_tokens([array([5, 6, 7]), array([5, 6, 8])])` -> `4`.
    """
    ordered = [sequences[index] for index in dfs_order(sequences)]
    shared = sum(common_prefix(first, second) for first, second in pairwise(ordered))
    return sum(map(len, ordered)) - shared


def split_at_nodes(sequences: Sequence[Ids], max_tokens: int | None) -> list[list[int]]:
    """Indices of sequences, in parts whose trees hold at most `max_tokens` tokens each.

    A part is a stretch of the depth-first order, so the tree is cut at a node and only the path to
    that node is laid out again. A sequence that is longer by itself is a part of its own: nothing
    shorter has its gradient.
    """
    parts: list[list[int]] = []
    num_tokens = 0
    previous = _NO_ROWS
    for index in dfs_order(sequences):
        ids = sequences[index]
        num_new = len(ids) - common_prefix(previous, ids)
        is_over = max_tokens is not None and num_tokens + num_new > max_tokens
        # Empty sequences come first; a part of nothing else would have no row.
        if not parts or (is_over and num_tokens):
            parts.append([])
            num_tokens, num_new = 0, len(ids)
        parts[-1].append(index)
        num_tokens += num_new
        previous = ids
    return parts


def common_prefix(first: Ids, second: Ids) -> int:
    """Number of leading tokens that both sequences share."""
    length = min(len(first), len(second))
    differs = first[:length] != second[:length]
    return int(differs.argmax()) if differs.any() else length


def _intervals(rows: Ids) -> tuple[tuple[int, int], ...]:
    """Ascending rows as half-open intervals of consecutive ones."""
    if not len(rows):
        return ()
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    return tuple((int(part[0]), int(part[-1]) + 1) for part in np.split(rows, breaks))


_BIG_ENDIAN = np.dtype(">u8")

_NO_ROWS: Ids = np.empty(0, dtype=np.int64)
