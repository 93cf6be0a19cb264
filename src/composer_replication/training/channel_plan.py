"""Which hint sites and pairs each micro-batch trains on, planned once a generation.

TRL generates for several optimizer steps at once and walks through them in micro-batches. The plan
spreads each step's records over its micro-batches, error turns beside the rollouts whose prompt
they share, and counts them over the whole step and all ranks, so that accumulation and data
parallelism equal one large batch.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from composer_replication.batch.batches import StepBatch
from composer_replication.batch.collate import ComposerDataCollator, StepTensors
from composer_replication.step.channels import CHANNELS
from composer_replication.traces.hints import HintSite
from composer_replication.traces.pairs import PreferencePair
from composer_replication.training.whole_groups import PromptIds

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


def place_sites(
    sites: Sequence[HintSite],
    prompts: Sequence[Collection[PromptIds]] | None,
    num_micro_batches: int,
) -> list[list[HintSite]]:
    """The sites of each micro-batch of a step, beside rollouts that begin as they do.

    No micro-batch gets more than its share, which is what memory is planned for.

    Args:
        sites: of the step.
        prompts: of the rollouts in each micro-batch; None: not known, and sites take turns.
        num_micro_batches: of the step.
    """
    if prompts is None:
        return [list(sites[i::num_micro_batches]) for i in range(num_micro_batches)]
    share = math.ceil(len(sites) / num_micro_batches)
    placed: list[list[HintSite]] = [[] for _ in range(num_micro_batches)]
    others: list[HintSite] = []
    for site in sites:
        homes = (
            there
            for there, known in zip(placed, prompts, strict=True)
            if len(there) < share and _begins_with_one_of(site, known)
        )
        next(homes, others).append(site)
    for site in others:
        min(placed, key=len).append(site)
    return placed


def _begins_with_one_of(site: HintSite, prompts: Collection[PromptIds]) -> bool:
    ids = site.state_ids
    return ids is not None and any(ids[: len(prompt)] == prompt for prompt in prompts)


def plan_step(
    sites: Sequence[Sequence[HintSite]],
    pairs: Sequence[PreferencePair],
    *,
    collator: ComposerDataCollator,
    channels: Sequence[str],
    sum_over_ranks: SumOverRanks,
) -> list[MicroBatch]:
    """The micro-batches of one optimizer step; every rank must call this at the same time.

    Args:
        sites: of each micro-batch.
        pairs: of the step, which the micro-batches take in turn.
        collator: renders and aligns the records.
        channels: to be counted.
        sum_over_ranks: adds counts up over the processes.
    """
    batches = [
        StepBatch(hint_sites=tuple(there), pairs=tuple(pairs[i :: len(sites)]))
        for i, there in enumerate(sites)
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
