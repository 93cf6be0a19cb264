"""Actions of a model that is in memory, greedy or sampled, without a trainer."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from composer_replication.batch.render import end_of_turn_ids
from composer_replication.step.hidden_states import causal_lm
from composer_replication.training.action_sampling import SampledAction
from composer_replication.training.shared_prefill import shared_prefill

Decoding = Literal["greedy", "sampled"]


@dataclass(frozen=True, slots=True)
class PolicySampler:
    """Samples one action for each context, in batches of equal work.

    Example: `PolicySampler(model, tokenizer, "greedy")([[1, 2, 3]], 40)[0].ids`.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    decoding: Decoding
    temperature: float = 1.0
    """Of sampled decoding."""
    batch_size: int = 64
    """Contexts decoded at a time."""

    def __call__(self, contexts: Sequence[list[int]], max_new_tokens: int) -> list[SampledAction]:
        """One action for each context, in order; it ends with its end-of-turn token, or is cut."""
        # Neighbours in length share a batch, so that little of it is padding.
        order = sorted(range(len(contexts)), key=lambda index: len(contexts[index]))
        actions: list[SampledAction | None] = [None] * len(contexts)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            found = self._generate([contexts[index] for index in chosen], max_new_tokens)
            for index, ids in zip(chosen, found, strict=True):
                actions[index] = SampledAction(ids, None)
        return cast(list[SampledAction], actions)

    def _generate(self, contexts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        device = next(self.model.parameters()).device
        width = max(map(len, contexts))
        pad = cast(int, self.tokenizer.pad_token_id)
        ends = sorted(end_of_turn_ids(self.tokenizer))
        rows = [[pad] * (width - len(ids)) + ids for ids in contexts]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in contexts]
        how = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=ends,
            pad_token_id=pad,
            **(how if self.decoding == "sampled" else {"do_sample": False}),
        )
        lm = causal_lm(self.model)
        with shared_prefill(self.model), _without_own_settings(lm):
            generate = cast(Callable[..., torch.Tensor], lm.generate)
            output = generate(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=settings,
            )
        return [_until_end(row[width:], ends) for row in output.tolist()]


@contextlib.contextmanager
def _without_own_settings(lm: PreTrainedModel) -> Iterator[None]:
    """A model's own settings, such as a repetition penalty, enter where a call leaves one out."""
    own = lm.generation_config
    lm.generation_config = GenerationConfig()
    try:
        yield
    finally:
        lm.generation_config = own


@contextlib.contextmanager
def evaluating(model: nn.Module, *, seed: int, is_bf16: bool) -> Iterator[None]:
    """Eval mode, no gradient, seeded sampling; afterwards mode and random state are as before.

    Args:
        model: any; put back into training mode where it was.
        seed: of the sampling.
        is_bf16: compute under bf16 autocast.
    """
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    was_training = model.training
    model.eval()
    try:
        with (
            torch.random.fork_rng(devices),
            torch.no_grad(),
            # One context around all of it: leaving it drops the casts of the weights.
            torch.autocast(device.type, torch.bfloat16, enabled=is_bf16),
        ):
            torch.manual_seed(seed)
            yield
    finally:
        model.train(was_training)


def _until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """The ids up to the first end-of-turn token, that token included."""
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: stop + 1]
