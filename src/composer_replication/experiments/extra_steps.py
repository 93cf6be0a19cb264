"""Single steps beside the training: the largest shape a run can meet, and a top-k divergence."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from composer_replication.batch.render import render_state
from composer_replication.experiments.channel_probe import record_inputs
from composer_replication.experiments.fixed_shapes import (
    full_length_pairs,
    full_length_rollouts,
    full_length_sites,
)
from composer_replication.experiments.run_data import Row
from composer_replication.traces.hints import HintSite
from composer_replication.traces.pairs import PreferencePair
from composer_replication.traces.trace import messages_from
from composer_replication.training.metrics import StepClock
from composer_replication.training.peak_memory import peak_gib
from composer_replication.training.references import fill_references, score_references
from composer_replication.training.teacher import PolicyTeacher
from composer_replication.training.tensor_memory import tensor_peak_gib
from composer_replication.training.trainer import ComposerReplicationTrainer
from composer_replication.units import gib

TOP_K = 100


@dataclass(frozen=True, slots=True)
class ExtraStep:
    """What one extra step took; weights are unchanged by it."""

    num_rows: int
    num_tokens: int
    step_s: float
    peak_gib: float
    loss: float
    activation_gib: float | None = None
    """Peak of the allocator above what was held before the step; None on CPU, not measured."""
    peak_tensor_gib: float | None = None
    """Peak of the tensors alone; None where it was not measured."""


def longest_prompt(prompts: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest prompt of the data, as rendered."""
    lists = (messages_from(cast(list[dict[str, object]], row["prompt"]), "") for row in prompts)
    return max(len(render_state(tokenizer, messages)) for messages in lists)


def step_at_largest_shape(
    trainer: ComposerReplicationTrainer, num_tokens: int, context_tokens: int
) -> ExtraStep:
    """Forward and backward of all channels with every row full; gradients are then dropped.

    Args:
        trainer: after at least one optimizer step, so the optimizer's state is in memory.
        num_tokens: of a rollout row, prompt and completion.
        context_tokens: of a hint site's teacher row and of a pair's row.
    """
    args = trainer._composer_args
    tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)
    num_rows = args.per_device_train_batch_size
    completion = min(int(args.max_completion_length or 1), num_tokens - 1)
    weights = trainer.channel_weights
    sites = full_length_sites(tokenizer, context_tokens, args.hint_sites_per_step)
    pairs = full_length_pairs(tokenizer, context_tokens, args.pairs_per_step)
    return _run(
        trainer,
        full_length_rollouts(tokenizer, num_rows, num_tokens - completion, completion),
        sites if "sdpo" in weights else [],
        _with_current_references(trainer, pairs) if "dpo" in weights else [],
        num_tokens=num_tokens,
    )


def step_with_top_k(trainer: ComposerReplicationTrainer, sites: Sequence[HintSite]) -> ExtraStep:
    """One step of SDPO alone with `top_k` teacher tokens: the setting for large vocabularies."""
    whole = trainer.step_settings
    trainer.step_settings = replace(whole, sdpo=replace(whole.sdpo, top_k=TOP_K, tail=True))
    clock = StepClock(trainer.accelerator.device)
    try:
        inputs = record_inputs(trainer, sites, channels=["sdpo"])
        clock.start("top_k")
        loss = trainer._compute_sdpo_loss(cast(nn.Module, trainer.model_wrapped), inputs)
        trainer.accelerator.backward(loss)
        step_s = clock.stop("top_k")
    finally:
        trainer.step_settings = whole
        cast(nn.Module, trainer.model).zero_grad(set_to_none=True)
    rows, tokens = inputs["ctx_teacher_input_ids"].shape
    device = trainer.accelerator.device
    return ExtraStep(rows, tokens, step_s, peak_gib(device), loss.item())


def allocated_gib(device: torch.device) -> float | None:
    """What CUDA's allocator has handed out; None on CPU, whose allocator does not say."""
    return gib(torch.cuda.memory_allocated(device)) if device.type == "cuda" else None


def _run(
    trainer: ComposerReplicationTrainer,
    rollouts: dict[str, Tensor],
    sites: list[HintSite],
    pairs: list[PreferencePair],
    *,
    num_tokens: int,
) -> ExtraStep:
    device = trainer.accelerator.device
    inputs = {name: tensor.to(device) for name, tensor in rollouts.items()}
    inputs |= record_inputs(trainer, sites, pairs)
    if trainer.beta != 0:
        # TRL's KL reads its reference there; one far below any log-prob cannot overflow.
        shape = inputs["completion_ids"].shape
        inputs["ref_per_token_logps"] = torch.full(shape, -1e3, device=device)
    clock = StepClock(device)
    model = cast(nn.Module, trainer.model_wrapped)
    model.train()
    held_gib = allocated_gib(device)
    with tensor_peak_gib(device) as read_tensor_peak_gib:
        clock.start("step")
        loss = trainer.compute_loss(model, inputs)
        trainer.accelerator.backward(loss)
        step_s = clock.stop("step")
        tensor_peak = read_tensor_peak_gib()
    peak = peak_gib(device)
    cast(nn.Module, trainer.model).zero_grad(set_to_none=True)
    num_rows = len(rollouts["prompt_ids"])
    activation_gib = None if held_gib is None else peak - held_gib
    return ExtraStep(
        num_rows, num_tokens, step_s, peak, loss.item(), activation_gib, peak_tensor_gib=tensor_peak
    )


def _with_current_references(
    trainer: ComposerReplicationTrainer, pairs: list[PreferencePair]
) -> list[PreferencePair]:
    """References under the current weights: this step measures memory, and its DPO is log 2."""
    current = PolicyTeacher(
        cast(nn.Module, trainer.model), trainer._autocast, without_adapters=False
    )
    scores = score_references(pairs, current, trainer.collator, batch_size=len(pairs))
    return fill_references(pairs, scores)
