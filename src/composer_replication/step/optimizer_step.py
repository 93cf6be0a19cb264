"""The heart: `step(model, batch)` scores a step batch once and sums each channel's loss.

No trl, no configuration, no logging: the trainer and `examples/plain_loop.py` both call this.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from composer_replication.batch.batches import StepBatch
from composer_replication.batch.collate import ComposerDataCollator, StepTensors
from composer_replication.errors import ConfigError, TrainingError, nearest
from composer_replication.step.channels import CHANNELS, Channel, ChannelSum
from composer_replication.step.hidden_states import zero_in_graph
from composer_replication.step.scores import Executor
from composer_replication.step.separate import score_separately
from composer_replication.step.settings import StepSettings, TeacherContext


def step(
    model: nn.Module,
    batch: StepBatch,
    collator: ComposerDataCollator,
    *,
    channels: tuple[str, ...] = ("grpo", "sdpo", "dpo"),
    settings: StepSettings | None = None,
    teacher: TeacherContext | None = None,
    executor: Executor = score_separately,
) -> dict[str, ChannelSum]:
    """Each channel's loss sum and count over a step batch, ready for `total_loss`.

    Args:
        model: the policy; gradients reach nothing else.
        batch: records; a channel whose part is empty gives a zero that is in the graph.
        collator: renders and aligns the records.
        channels: names in `step.channels.CHANNELS`.
        settings: of every channel; None: the defaults.
        teacher: opens the teacher's weights; None: the live policy without gradient.
        executor: how the scores are computed; all executors give the same numbers.

    Raises:
        ConfigError: an unknown channel.
        DataError: a record that cannot be rendered, aligned or scored.
    """
    device = next(model.parameters()).device
    tensors = {name: tensor.to(device) for name, tensor in collator(batch).items()}
    return channel_sums(
        model, tensors, channels, settings or StepSettings(), teacher, executor=executor
    )


def channel_sums(
    model: nn.Module,
    tensors: StepTensors,
    channels: tuple[str, ...],
    settings: StepSettings,
    teacher: TeacherContext | None,
    *,
    executor: Executor = score_separately,
) -> dict[str, ChannelSum]:
    """The same from tensors that are collated and on the model's device."""
    asked = [find_channel(name) for name in channels]
    live = [channel for channel in asked if channel.count(tensors) > 0]
    needs = frozenset(channel.data for channel in live)
    scores = executor(model, tensors, needs, settings, teacher)
    return {
        channel.name: channel.sum_loss(scores, tensors, settings)
        if channel in live
        else ChannelSum(zero_in_graph(model), 0)
        for channel in asked
    }


def total_loss(
    sums: Mapping[str, ChannelSum],
    weights: Mapping[str, float],
    counts: Mapping[str, float] | None = None,
) -> Float[Tensor, ""]:
    """`sum of weight * loss_sum / count` over the channels.

    Args:
        sums: of one micro-batch.
        weights: a factor for each channel.
        counts: each channel's count over the whole optimizer step; None: `sums` is all of it.

    Raises:
        TrainingError: a channel's loss is not finite; the message names it.
    """
    total: Tensor | None = None
    for name, channel in sums.items():
        if not torch.isfinite(channel.loss_sum):
            raise TrainingError(
                f"The {name} loss of this step is {channel.loss_sum.item()}. Nothing was updated. "
                "Look for nan or infinite log-probs in its rows, or lower the learning rate."
            )
        count = channel.count if counts is None else counts[name]
        part = weights[name] * channel.loss_sum / max(count, 1)
        total = part if total is None else total + part
    if total is None:
        raise ConfigError("No channel was asked for, so there is no loss. Name at least one.")
    return total


def find_channel(name: str) -> Channel:
    """The channel of that name, or a `ConfigError` naming the nearest."""
    if name not in CHANNELS:
        raise ConfigError(f"There is no channel {name!r}. {nearest(name, CHANNELS)}")
    return CHANNELS[name]
