"""Rollouts of one prompt stay in one micro-batch, where they share their prefix.

TRL shuffles the rollouts of a generation before it splits them, which scatters groups over
micro-batches; advantages are computed before, so the order changes no loss.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

MicroBatches = list[dict[str, Tensor]]
"""As TRL declares them; a value may also be a list, a number or None."""


def keep_groups_whole(micro_batches: MicroBatches) -> MicroBatches:
    """The same rows, group after group in the order in which the shuffle first met them.

    A group larger than a micro-batch goes on in the next. Values without a row each (numbers,
    None) stay as they are.
    """
    first = micro_batches[0]
    size = len(first["prompt_ids"])
    prompts = [
        tuple(row.tolist())
        for batch in micro_batches
        for row in torch.cat([batch["prompt_mask"], batch["prompt_ids"]], 1)
    ]
    met = {prompt: place for place, prompt in reversed(list(enumerate(prompts)))}
    order = sorted(range(len(prompts)), key=lambda row: met[prompts[row]])
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    columns = {name: [batch[name] for batch in micro_batches] for name in first}
    whole = [{name: _rows(parts, chunk) for name, parts in columns.items()} for chunk in chunks]
    return cast(MicroBatches, whole)


def _rows(parts: Sequence[object], chunk: Sequence[int]) -> object:
    first = parts[0]
    if isinstance(first, Tensor) and first.ndim:
        return torch.cat([part for part in parts if isinstance(part, Tensor)])[list(chunk)]
    if isinstance(first, list):
        rows = [row for part in parts if isinstance(part, list) for row in part]
        return [rows[index] for index in chunk]
    return first
