"""Bytes beside what stays while rows are sampled, and while what was sampled is scored."""

import math
from dataclasses import replace

from composer_replication.planner.forwards import forwards_of
from composer_replication.planner.head_memory import head_memory
from composer_replication.planner.layer_memory import BF16, FP32, Precision, layer_memory
from composer_replication.planner.model_shape import ModelShape, model_shape
from composer_replication.planner.sampling_shape import RolloutShape
from composer_replication.planner.step_case import StepCase

_LAYERS_COPIED = 2
"""Of the cache, while it grows: old keys and values beside new ones."""


def sampling_bytes(rollouts: RolloutShape, case: StepCase) -> int:
    """The most while rows are sampled by transformers: rollouts, then actions at hint sites."""
    resampled = RolloutShape(
        rollouts.num_resampled,
        rollouts.num_resampled,
        case.state_tokens,
        rollouts.resampled_tokens,
    )
    return max(_sampled(each, case) for each in (rollouts, resampled))


def _sampled(rollouts: RolloutShape, case: StepCase) -> int:
    """The cache of every row, one layer's copy while it grows, last logits, cast weights."""
    if rollouts.sampled_tokens == 0:
        return 0
    model, compute = model_shape(case.model), Precision.of(case).compute
    tokens = rollouts.num_rows * (rollouts.prompt_tokens + rollouts.sampled_tokens)
    cache = 2 * compute * model.kv_dim * tokens * (model.num_layers + _LAYERS_COPIED)
    prompt_tokens = rollouts.num_contexts * rollouts.prompt_tokens
    prefill = layer_memory(case).forward_per_token * prompt_tokens
    logits = 3 * FP32 * rollouts.num_rows * model.vocab
    return cache + max(prefill, logits) + _cast_weights(case, model)


def scoring_bytes(rollouts: RolloutShape, case: StepCase) -> int:
    """The most while TRL scores the rollouts without gradient, before they are trained on.

    A tree scores all that was sampled in one forward, a forward for each role a micro-batch.
    """
    shape, layer = model_shape(case.model), layer_memory(case)
    is_tree = case.executor == "packed"
    rows = rollouts.num_rows if is_tree else case.num_rollouts
    prompts = math.ceil(rows * case.num_prompts / case.num_rollouts) if is_tree else rows
    alone = replace(case, num_sites=0, num_rollout_sites=0, num_pairs=0)
    (forward,) = forwards_of(replace(alone, num_rollouts=rows, num_prompts=prompts))
    hidden = layer.output_per_token * forward.output_tokens
    head = head_memory(case).forward_bytes(forward)
    layers = layer.forward_per_token * max(piece.num_tokens for piece in forward.pieces)
    return max(layers, hidden + head) + _cast_weights(case, shape)


def _cast_weights(case: StepCase, model: ModelShape) -> int:
    """bf16 copies of all trained weights, which autocast keeps until its outermost end."""
    return BF16 * model.num_parameters if case.casts_trained_weights else 0
