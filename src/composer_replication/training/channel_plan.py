"""Which hint sites and pairs each micro-batch trains on, planned once a generation.

TRL generates for several optimizer steps at once and walks through them in micro-batches. The plan
spreads each step's records over its micro-batches and counts them over the whole step and all
ranks, so that accumulation and data parallelism equal one large batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from composer_replication.batch.batches import StepBatch
from composer_replication.batch.collate import ComposerDataCollator, StepTensors
from composer_replication.step.channels import CHANNELS
from composer_replication.traces.hints import HintSite
from composer_replication.traces.pairs import PreferencePair

SumOverRanks = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Tensors of one micro-batch, with each channel's count over the whole optimizer step."""

    tensors: StepTensors
    step_counts: dict[str, float]

    def inputs(self, device: torch.device) -> StepTensors:
        """The tensors as they join TRL's inputs; counts under `NAME_step_count`."""
        counts = {f"{name}_step_count": torch.tensor(c) for name, c in self.step_counts.items()}
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return {**tensors, **counts}


def plan_step(
    sites: Sequence[HintSite],
    pairs: Sequence[PreferencePair],
    *,
    num_micro_batches: int,
    collator: ComposerDataCollator,
    channels: Sequence[str],
    sum_over_ranks: SumOverRanks,
) -> list[MicroBatch]:
    """The micro-batches of one optimizer step; every rank must call this at the same time."""
    batches = [
        StepBatch(
            hint_sites=tuple(sites[i::num_micro_batches]), pairs=tuple(pairs[i::num_micro_batches])
        )
        for i in range(num_micro_batches)
    ]
    tensors = [collator(batch) for batch in batches]
    local = [sum(CHANNELS[name].count(part) for part in tensors) for name in channels]
    total = sum_over_ranks(torch.tensor(local, dtype=torch.float64)).tolist()
    counts = dict(zip(channels, total, strict=True))
    return [MicroBatch(part, counts) for part in tensors]


def scheduled(channels: Sequence[str], schedule: str, global_step: int) -> tuple[str, ...]:
    """The extra channels of an optimizer step; under `alternate` they take turns."""
    if schedule == "alternate" and channels:
        return (channels[global_step % len(channels)],)
    return tuple(channels)
