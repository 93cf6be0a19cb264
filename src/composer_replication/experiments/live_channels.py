"""`channels_live`: each channel had data, lost something, and pushes the weights by itself.

With g the gradient of a channel's weighted loss alone, the step's gradient must hold exactly g: the
trainer's whole loss, with that channel and without it, is differentiated on rollouts whose
advantages are 0, so that GRPO does not hide a channel that is many times smaller.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from composer_replication.experiments.channel_probe import (
    Inputs,
    channel_loss,
    gradient_norm,
    undisturbed,
    with_separate_forwards,
    without_dropout,
)
from composer_replication.experiments.run_figures import (
    channel_signal,
    missing_rows,
    row_problem,
)
from composer_replication.experiments.trained_batches import TrainedBatches, few_rows
from composer_replication.runs.summary import Check
from composer_replication.step.channels import CHANNELS
from composer_replication.training.metrics import MetricsRow
from composer_replication.training.trainer import ComposerReplicationTrainer

MAX_LOST = 0.05
"""Both are sums over the same rows in the same shapes, which half precision rounds alike; what a
term beside the channels, such as a router's, loses to rounding stays below this."""
SUM_TOLERANCE = 1e-4
"""Of the logged loss against the weighted sum of its channels; both are sums in fp32."""


@dataclass(frozen=True, slots=True)
class OwnGradient:
    """What one channel alone does to the trained weights."""

    norm: float
    """Of its weighted loss."""
    lost: float = 0.0
    """Share of it that does not arrive in the step's gradient, or arrives beside it."""


def own_gradients(
    trainer: ComposerReplicationTrainer, batches: TrainedBatches
) -> dict[str, OwnGradient]:
    """The gradient of each extra channel on a batch it trained on; none where it had no batch."""
    found: dict[str, OwnGradient] = {}
    for name in trainer.channel_weights:
        if name in batches.last:
            with (
                undisturbed(trainer),
                with_separate_forwards(trainer),
                without_dropout(trainer),
            ):
                found[name] = _own_gradient(trainer, name, batches.last[name].inputs)
    return found


def check_channels(
    rows: Sequence[MetricsRow],
    weights: Mapping[str, float],
    gradients: Mapping[str, OwnGradient],
    *,
    largest_advantage: float,
    alternates: bool,
    asked: Mapping[str, float] | None = None,
) -> list[Check]:
    """The verdict of GRPO and of each extra channel.

    Args:
        rows: of every step.
        weights: of the extra channels that are on.
        gradients: by channel, `grpo` included.
        largest_advantage: of any rollout in the run, in absolute value.
        alternates: the extra channels took turns.
        asked: the weights in the run's configuration; None: `weights`.
    """
    asked = weights if asked is None else asked
    causes: dict[str, str] = {}
    for name in weights.keys() | asked.keys():
        if weights.get(name) != asked.get(name):
            causes[name] = (
                f"The configuration gives {name} the weight {asked.get(name, 0.0)} and the trainer "
                f"{weights.get(name, 0.0)}. Look at training/channel_weights.py."
            )
    for name in ("grpo", *weights):
        signal = largest_advantage if name == "grpo" else channel_signal(rows, name)
        cause = row_problem(rows, name, signal) or missing_rows(
            rows, name, list(weights), alternates=alternates
        )
        if cause:
            causes.setdefault(name, cause)
    # A sum with a missing or infinite part would blame the wrong channel.
    causes = causes or _wrong_sum(rows, weights)
    for name in ("grpo", *weights):
        cause = causes.get(name) or _gradient_problem(name, gradients.get(name))
        if cause:
            causes.setdefault(name, cause)
    norms = {name: gradient.norm for name, gradient in gradients.items()}
    return [
        Check(
            f"channels_live/{name}",
            passed=name not in causes,
            value=norms.get(name, 0.0),
            bound="gradient norm > 0",
            cause=causes.get(name),
        )
        for name in dict.fromkeys(("grpo", *weights, *asked))
    ]


def _own_gradient(trainer: ComposerReplicationTrainer, name: str, inputs: Inputs) -> OwnGradient:
    weight = trainer.channel_weights[name]
    loss = weight * channel_loss(trainer, name, inputs)
    if not loss.requires_grad:
        return OwnGradient(0.0)
    trainer.accelerator.backward(loss)
    norm = gradient_norm(trainer)
    # All three go into the same `.grad`: own - (with the channel) + (without it) leaves 0.
    if CHANNELS[name].data != "rollouts":
        inputs = few_rows(inputs, 1)
        inputs = {**inputs, "advantages": torch.zeros_like(inputs["advantages"])}
    for channels, sign in (({name: weight}, -1), ({}, 1)):
        trainer.channel_weights = channels
        _backward_whole(trainer, inputs, sign)
    rest = gradient_norm(trainer)
    return OwnGradient(norm, rest / norm if norm > 0 else 0.0)


def _backward_whole(trainer: ComposerReplicationTrainer, inputs: Inputs, sign: int) -> None:
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(cast(nn.Module, trainer.model_wrapped), inputs)
    trainer.accelerator.backward(sign * loss)


def _gradient_problem(name: str, gradient: OwnGradient | None) -> str | None:
    if gradient is None:
        return f"No micro-batch of the run had anything for {name}, so it had no gradient."
    if not 0 < gradient.norm < float("inf"):
        return (
            f"The {name} loss moves no weight: the norm of its own gradient is {gradient.norm}. It "
            "is detached from the policy, or a constant is returned for it."
        )
    if not gradient.lost <= MAX_LOST:
        return (
            f"{gradient.lost:.0%} of the {name} channel's own gradient is missing from the step's "
            "gradient, or something else comes with it. The trainer's _compute_loss must add the "
            "channel's loss times its weight and nothing more."
        )
    return None


def _wrong_sum(rows: Sequence[MetricsRow], weights: Mapping[str, float]) -> dict[str, str]:
    """The channel that explains best why a step's loss is not the sum of its channels, and how."""
    for row in rows:
        parts = {name: _number(row, f"loss/{name}") * weight for name, weight in weights.items()}
        grpo, loss = _number(row, "loss/grpo"), _number(row, "loss")
        rest = loss - grpo - sum(parts.values())
        if not abs(rest) <= SUM_TOLERANCE * max(1.0, abs(loss)) and parts:
            name = min(parts, key=lambda name: abs(abs(rest) - abs(parts[name])))
            return {
                name: f"The loss of step {row['step']} is {loss:.6g} and the weighted sum of its "
                f"channels {loss - rest:.6g}. What is logged for a channel is not what is trained."
            }
    return {}


def _number(row: MetricsRow, name: str) -> float:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else 0.0
