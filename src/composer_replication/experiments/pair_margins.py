"""Which of two actions a model prefers: log-probs of held-out preference pairs, nothing sampled."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from composer_replication.batch.collate import ComposerDataCollator
from composer_replication.experiments.policy_sampling import evaluating
from composer_replication.experiments.proportions import Proportion, proportion
from composer_replication.step.separate import score_actions
from composer_replication.traces.pairs import PreferencePair

_BATCH_SIZE = 8


@dataclass(frozen=True, slots=True)
class PairMargin:
    """How much likelier the chosen actions are than the rejected ones.

    Example: `PairMargin(mean_nats=-3.1, preferred=Proportion(0.1, 0.03, 0.29, 24))`.
    """

    mean_nats: float
    """Mean of log p(chosen) - log p(rejected), each summed over its tokens."""
    preferred: Proportion
    """Pairs whose chosen action is the likelier one."""


def pair_margin(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    *,
    is_bf16: bool = False,
) -> PairMargin:
    """The margin over the pairs, of which there is at least one."""
    with evaluating(model, seed=0, is_bf16=is_bf16):
        margins = [
            chosen - rejected
            for (chosen, _), (rejected, _) in zip(
                action_logps(model, tokenizer, pairs, "chosen"),
                action_logps(model, tokenizer, pairs, "rejected"),
                strict=True,
            )
        ]
    preferred = proportion([float(margin > 0) for margin in margins])
    return PairMargin(sum(margins) / len(margins), preferred)


def action_logps(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    side: Literal["chosen", "rejected"],
) -> Iterator[tuple[float, int]]:
    """Log-prob in nats and token count of one action of each pair; call it under `evaluating`."""
    collator = ComposerDataCollator(tokenizer)
    device = next(model.parameters()).device
    for start in range(0, len(pairs), _BATCH_SIZE):
        tensors, _ = collator.collate_pairs(pairs[start : start + _BATCH_SIZE])
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        with torch.no_grad():
            sums = score_actions(model, tensors, f"dpo_{side}").tolist()
        counts = tensors[f"dpo_{side}_response_mask"].sum(-1).tolist()
        yield from zip(sums, counts, strict=True)
