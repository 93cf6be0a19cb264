"""Rollouts of one prompt stay in one micro-batch, where they share their prefix.

TRL shuffles the rollouts of a generation before it splits them, which scatters groups over
micro-batches; advantages are computed before, so the order changes no loss. Here the order is that
of sampling: it is known before the split, so that the error turns of a group can be planned into
the micro-batch that holds it.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

MicroBatches = list[dict[str, Tensor]]
"""As TRL declares them; a value may also be a list, a number or None."""
PromptIds = tuple[int, ...]
"""Without padding."""


class WholeGroups:
    """Which groups each micro-batch of a generation holds.

    Example: `groups.note(output, 2)`, then `groups.regroup(TRL's shuffled micro-batches)`.
    """

    def __init__(self) -> None:
        """Before the first generation."""
        self._place: dict[PromptIds, int] = {}

    def note(self, output: Mapping[str, Tensor], num_rows: int) -> list[frozenset[PromptIds]]:
        """Keep the order of the groups.

        Args:
            output: this rank's rollouts of a generation, as they were sampled.
            num_rows: of a micro-batch.

        Returns:
            The prompts of each micro-batch that `regroup` will make.
        """
        prompts = _prompts(output)
        self._place = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
        ordered = sorted(prompts, key=self._place.__getitem__)
        return [frozenset(ordered[i : i + num_rows]) for i in range(0, len(ordered), num_rows)]

    def regroup(self, micro_batches: MicroBatches) -> MicroBatches:
        """The same rows, group after group in the order that was noted.

        A group larger than a micro-batch goes on in the next. Values without a row each (numbers,
        None) stay as they are.
        """
        first = micro_batches[0]
        size = len(first["prompt_ids"])
        prompts = [prompt for batch in micro_batches for prompt in _prompts(batch)]
        order = sorted(range(len(prompts)), key=lambda row: self._place[prompts[row]])
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        columns = {name: [batch[name] for batch in micro_batches] for name in first}
        whole = [{name: _rows(parts, chunk) for name, parts in columns.items()} for chunk in chunks]
        return cast(MicroBatches, whole)


def _prompts(rows: Mapping[str, Tensor]) -> list[PromptIds]:
    columns = rows["prompt_ids"].tolist(), rows["prompt_mask"].tolist()
    return [
        tuple(token for token, is_real in zip(ids, mask, strict=True) if is_real)
        for ids, mask in zip(*columns, strict=True)
    ]


def _rows(parts: Sequence[object], chunk: Sequence[int]) -> object:
    first = parts[0]
    if isinstance(first, Tensor) and first.ndim:
        return torch.cat([part for part in parts if isinstance(part, Tensor)])[list(chunk)]
    if isinstance(first, list):
        rows = [row for part in parts if isinstance(part, list) for row in part]
        return [rows[index] for index in chunk]
    return first
