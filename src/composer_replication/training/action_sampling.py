"""One sampled action for each context, on TRL's own generation path: transformers or vLLM."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

from composer_replication.training.shared_prefill import shared_prefill
from composer_replication.training.trl_hooks import GRPOTrainer


@dataclass(frozen=True, slots=True)
class SampledAction:
    """The exact ids of one action; empty where the sampler stopped at once."""

    ids: list[int]
    logps: list[float] | None
    """The sampler's own log-probs, which vLLM gives and TRL's correction needs; else None."""

    def cut(self, num_tokens: int) -> "SampledAction":
        """The first tokens of it."""
        logps = self.logps
        return SampledAction(self.ids[:num_tokens], None if logps is None else logps[:num_tokens])


def sample_actions(
    trainer: GRPOTrainer, contexts: Sequence[list[int]], max_new_tokens: int
) -> list[SampledAction]:
    """One sampled action for each context, with TRL's own generation path and settings.

    Each ends with its end-of-turn token unless `max_new_tokens` cut it off.
    """
    whole = trainer.generation_config
    trainer.generation_config = copy.deepcopy(whole)
    trainer.generation_config.max_new_tokens = max_new_tokens
    whole_length = 0
    if trainer.use_vllm:
        # vLLM reads its limit here at every call.
        whole_length = trainer.vllm_generation.max_completion_length
        trainer.vllm_generation.max_completion_length = max_new_tokens
    try:
        # Autocast keeps its casts of the weights until the outermost context ends; without this
        # one it casts every weight again for each token (half of the decode time on CPU).
        with trainer.accelerator.autocast(), shared_prefill(cast(nn.Module, trainer.model)):
            # One completion a context: after the first turn each rollout has its own history.
            action_ids, logps = trainer._generate_single_turn(
                list(contexts), None, {}, num_generations=1
            )
    finally:
        trainer.generation_config = whole
        if trainer.use_vllm:
            trainer.vllm_generation.max_completion_length = whole_length
    all_ids = cast(list[list[int]], action_ids)
    if logps is None:
        return [SampledAction(list(ids), None) for ids in all_ids]
    return [
        SampledAction(list(ids), list(given))
        for ids, given in zip(all_ids, cast(list[list[float]], logps), strict=True)
    ]
