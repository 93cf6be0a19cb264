"""Bytes of the output head's tiles, as `losses/head.py`, `sdpo.py` and `head_pass.py` hold them.

Letters: V vocabulary, H hidden, S scored rows, n rows of a tile.
"""

from dataclasses import dataclass

from composer_replication.planner.forwards import Forward
from composer_replication.planner.layer_memory import FP32, Precision
from composer_replication.planner.model_shape import model_shape
from composer_replication.planner.step_case import StepCase

_TILE_ROWS = {"cpu": 64, "cuda": 512}
_TREE_TILE_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
"""Of one tile of logits in the pass that serves a whole tree."""
_BLOCK_ELEMENTS = {"cpu": 2**22, "cuda": 2**24}
_CAST_ROWS = 16_384
_BLOCK_TEMPORARIES = 7
"""Arrays of one block that the divergence's element-wise part has at once."""


@dataclass(frozen=True, slots=True)
class HeadMemory:
    """The head of a case."""

    vocab: int
    hidden: int
    stream: int
    """Bytes of a number of the hidden rows."""
    weight: int
    """Bytes of a number of the head's weight."""
    is_trained: bool
    device_type: str

    def saved_bytes(self, forward: Forward) -> int:
        """Hidden rows that wait for the backward."""
        row = self.stream * self.hidden
        if forward.tree_parts:
            return (forward.num_scored + forward.num_compared) * row
        if forward.is_divergence:
            return forward.num_scored * (2 * row + FP32 * self.hidden)
        return forward.num_scored * row

    def forward_bytes(self, forward: Forward) -> int:
        """Tiles of the forward, beside what it saves."""
        tiles = self._tree_tiles(forward) if forward.tree_parts else self._tiles(forward)
        return self.saved_bytes(forward) + tiles

    def backward_bytes(self, forward: Forward) -> int:
        """Tiles of the backward and the fp32 sum of the head's gradient."""
        rows_grad = self.rows_gradient_bytes(forward)
        if not self.is_trained and forward.is_divergence and not forward.tree_parts:
            # The forward has kept the gradient of the hidden rows already.
            return rows_grad
        gradient = FP32 * self.vocab * self.hidden if self.is_trained else 0
        in_weight_precision = (
            self.weight * self.vocab * self.hidden if self.is_trained and self.weight < FP32 else 0
        )
        tiles = (
            self._tree_tiles(forward, is_backward=True)
            if forward.tree_parts
            else self._tiles(forward)
        )
        return gradient + rows_grad + max(tiles, in_weight_precision)

    def rows_gradient_bytes(self, forward: Forward) -> int:
        """The gradient of the scored hidden rows."""
        return forward.num_scored * FP32 * self.hidden

    def _tiles(self, forward: Forward) -> int:
        rows = min(_TILE_ROWS[self.device_type], max(forward.num_scored, 1))
        tile = FP32 * rows * self.vocab
        if not forward.is_divergence:
            return 2 * tile + self._cast_bytes()
        # Both sides are projected before the first block, so the two peaks never meet.
        return 2 * tile + max(self._block_bytes(rows), self._cast_bytes())

    def _tree_tiles(self, forward: Forward, *, is_backward: bool = False) -> int:
        """The largest tile of a tree, in the backward its gradient too, and one part's own rows.

        A part gathers its rows of the tile. A compared one makes one more array of them, the
        teacher's logits; another one does in the forward, the probabilities, and turns its rows
        into their gradient in the backward. Parts take turns.
        """
        row = FP32 * self.vocab
        tile_rows = max(1, min(_TREE_TILE_BYTES[self.device_type] // row, forward.num_scored))
        most = start = 0
        for rows, is_compared in forward.tree_parts:
            own = _most_in_a_tile(start, start + rows, tile_rows)
            start += rows
            scratch = max(self._block_bytes(own), self._cast_bytes()) if is_compared else 0
            arrays = 1 if is_backward and not is_compared else 2
            most = max(most, arrays * own * row + scratch)
        # On CUDA the gradient of a half-precision head's rows is cast to be multiplied.
        casts = is_backward and self.device_type == "cuda" and self.weight < FP32
        cast = tile_rows * row // 2 if casts else self._cast_bytes()
        return (2 if is_backward else 1) * tile_rows * row + max(most, cast)

    def _block_bytes(self, rows: int) -> int:
        """What the divergence's element-wise part has at once."""
        block_rows = max(1, _BLOCK_ELEMENTS[self.device_type] // self.vocab)
        return _BLOCK_TEMPORARIES * FP32 * min(rows, block_rows) * self.vocab

    def _cast_bytes(self) -> int:
        """fp32 copies of part of a half-precision head; CUDA multiplies bf16 as it is."""
        if self.weight == FP32 or self.device_type == "cuda":
            return 0
        return FP32 * min(self.vocab, _CAST_ROWS) * self.hidden


def _most_in_a_tile(start: int, stop: int, tile_rows: int) -> int:
    """Most rows of `start:stop` that one tile holds."""
    first, last = start // tile_rows, max(start, stop - 1) // tile_rows
    return max(
        min(stop, (tile + 1) * tile_rows) - max(start, tile * tile_rows)
        for tile in {first, min(first + 1, last), last}
    )


def head_memory(case: StepCase) -> HeadMemory:
    """The head of this case."""
    shape, precision = model_shape(case.model), Precision.of(case)
    return HeadMemory(
        vocab=shape.vocab,
        hidden=shape.hidden,
        stream=precision.stream,
        weight=precision.weights,
        is_trained=case.lora_r is None,
        device_type=case.device_type,
    )
