"""Single steps beside the training: the largest shape a run can meet, and a top-k divergence."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from composer_replication.batch.render import render_state
from composer_replication.experiments.fixed_shapes import (
    full_length_pairs,
    full_length_rollouts,
    full_length_sites,
)
from composer_replication.experiments.run_data import Row
from composer_replication.traces.hints import HintSite
from composer_replication.traces.pairs import PreferencePair
from composer_replication.traces.trace import messages_from
from composer_replication.training.channel_plan import plan_step
from composer_replication.training.metrics import StepClock, peak_gib, reset_peak
from composer_replication.training.references import fill_references, score_references
from composer_replication.training.teacher import PolicyTeacher
from composer_replication.training.trainer import ComposerReplicationTrainer

TOP_K = 100


@dataclass(frozen=True, slots=True)
class ExtraStep:
    """What one extra step took; weights are unchanged by it."""

    num_rows: int
    num_tokens: int
    step_s: float
    peak_gib: float
    loss: float


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
        inputs = _channel_inputs(trainer, sites, [], ["sdpo"])
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
    inputs |= _channel_inputs(trainer, sites, pairs, list(trainer.channel_weights))
    clock = StepClock(device)
    reset_peak(device)
    model = cast(nn.Module, trainer.model_wrapped)
    model.train()
    clock.start("step")
    loss = trainer.compute_loss(model, inputs)
    trainer.accelerator.backward(loss)
    step_s = clock.stop("step")
    peak = peak_gib(device)
    cast(nn.Module, trainer.model).zero_grad(set_to_none=True)
    num_rows = len(rollouts["prompt_ids"])
    return ExtraStep(num_rows, num_tokens, step_s, peak, loss.item())


def _channel_inputs(
    trainer: ComposerReplicationTrainer,
    sites: Sequence[HintSite],
    pairs: Sequence[PreferencePair],
    channels: Sequence[str],
) -> dict[str, Tensor]:
    """The records as one micro-batch that is the whole step of this process."""
    (micro_batch,) = plan_step(
        sites,
        pairs,
        num_micro_batches=1,
        collator=trainer.collator,
        channels=channels,
        sum_over_ranks=lambda counts: counts,
    )
    return micro_batch.inputs(trainer.accelerator.device)


def _with_current_references(
    trainer: ComposerReplicationTrainer, pairs: list[PreferencePair]
) -> list[PreferencePair]:
    """References under the current weights: this step measures memory, and its DPO is log 2."""
    current = PolicyTeacher(
        cast(nn.Module, trainer.model), trainer._autocast, without_adapters=False
    )
    scores = score_references(pairs, current, trainer.collator, batch_size=len(pairs))
    return fill_references(pairs, scores)
