"""Each channel's own gradient of an optimizer step: its norm, its share, cosines between channels.

With g_c the gradient of channel c's weighted loss, summed over the step's micro-batches and
averaged over the ranks as DDP does, the step's gradient is g = sum of g_c. All figures follow from
the inner products <g_a, g_b>:

    grad_norm/c = |g_c|      grad_share/c = <g_c, g> / |g|^2      grad_cosine/a_b = cos(g_a, g_b)

Shares sum to 1; one is below 0 where a channel pushes against the step. Clipping comes later, so
none of it is clipped.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from composer_replication.errors import ConfigError

_WHOLE_GRADIENTS = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class ChannelGradients:
    """Sums each channel's gradient over the micro-batches of one optimizer step.

    Example:
        >>> gradients = ChannelGradients(accelerator, is_reentrant=False)
        >>> gradients.add(model, {"grpo": grpo_loss, "sdpo": 0.1 * sdpo_loss})
        >>> gradients.take_figures()["grad_share/sdpo"]
    """

    def __init__(self, accelerator: Accelerator, *, is_reentrant: bool) -> None:
        """Refuse what cannot be measured.

        Args:
            accelerator: of the trainer.
            is_reentrant: gradient checkpointing is on and of the reentrant kind.

        Raises:
            ConfigError: weights in shards, fp16's loss scaling, or reentrant checkpointing on
                several processes.
        """
        _check(accelerator, is_reentrant)
        self._accelerator = accelerator
        self._is_reentrant = is_reentrant
        self._sums: dict[str, list[Tensor]] = {}

    def add(self, model: nn.Module, contributions: Mapping[str, Tensor]) -> None:
        """Add a micro-batch, before its own backward.

        The graph stays for that backward, every `.grad` stays as it is, and so does the random
        state.

        Args:
            model: the policy; its trainable parameters are measured.
            contributions: each channel's weighted loss, as it enters the step's loss.
        """
        parameters = [p for p in model.parameters() if p.requires_grad]
        device = self._accelerator.device
        # A checkpointed block draws its dropout anew where it does not keep the random state.
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            # The training's own backward runs outside autocast too.
            torch.autocast(device.type, enabled=False),
        ):
            for name, loss in contributions.items():
                if name not in self._sums:
                    self._sums[name] = [torch.zeros_like(p) for p in parameters]
                for total, gradient in zip(
                    self._sums[name], self._gradients(loss, parameters), strict=True
                ):
                    if gradient is not None:
                        total.add_(gradient)

    def take_figures(self) -> dict[str, float]:
        """The figures of the step by metric name; nan where a gradient is 0. Starts anew.

        Every rank must call it at the same time.
        """
        sums, self._sums = self._sums, {}
        if self._accelerator.num_processes > 1:
            sums = {name: [self._mean(g) for g in gradients] for name, gradients in sums.items()}
        return gradient_figures(sums)

    def _mean(self, gradient: Tensor) -> Tensor:
        return cast(Tensor, self._accelerator.reduce(gradient, reduction="mean"))

    def _gradients(self, loss: Tensor, parameters: list[nn.Parameter]) -> Sequence[Tensor | None]:
        if not loss.requires_grad:
            return [None] * len(parameters)
        if not self._is_reentrant:
            # Runs none of the hooks that accumulate, so DDP's reducer takes no notice of it.
            return torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        # Reentrant checkpointing knows `backward` alone.
        held = [p.grad for p in parameters]
        try:
            for parameter in parameters:
                parameter.grad = None
            loss.backward(retain_graph=True)
            return [p.grad for p in parameters]
        finally:
            for parameter, gradient in zip(parameters, held, strict=True):
                parameter.grad = gradient


def gradient_figures(gradients: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
    """Norm, share and cosines by metric name, from each channel's gradient tensors.

    Example: `{"a": [tensor([3.0])], "b": [tensor([1.0])]}` gives shares 0.75 and 0.25, cosine 1.
    """
    names = list(gradients)
    inner = {(name, name): _inner(gradients[name], gradients[name]) for name in names}
    for a, b in combinations(names, 2):
        inner[a, b] = inner[b, a] = _inner(gradients[a], gradients[b])
    total = sum(inner.values())
    figures = {f"grad_norm/{name}": math.sqrt(inner[name, name]) for name in names}
    for name in names:
        share = sum(inner[name, other] for other in names)
        figures[f"grad_share/{name}"] = share / total if total > 0 else math.nan
    for a, b in combinations(names, 2):
        norms = math.sqrt(inner[a, a] * inner[b, b])
        figures[f"grad_cosine/{a}_{b}"] = inner[a, b] / norms if norms > 0 else math.nan
    return figures


def _inner(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Summed in fp64: shares and cosines are small differences of large sums."""
    parts = [
        (a.float() * b.float()).sum(dtype=torch.float64) for a, b in zip(one, other, strict=True)
    ]
    return float(torch.stack(parts).sum()) if parts else 0.0


def _check(accelerator: Accelerator, is_reentrant: bool) -> None:
    kind = accelerator.distributed_type
    if kind not in _WHOLE_GRADIENTS:
        raise ConfigError(
            f"diagnostics.gradients_every is set and the run is distributed by {kind.value}, which "
            "keeps weights or gradients in shards, so no process could measure a channel's own "
            "gradient. Use one process or DDP, or set diagnostics.gradients_every = 0."
        )
    if accelerator.scaler is not None:
        raise ConfigError(
            "diagnostics.gradients_every is set and the run uses fp16, whose small gradients are 0 "
            "without loss scaling, so the figures would be wrong. Use bf16 or fp32, or set "
            "diagnostics.gradients_every = 0."
        )
    if is_reentrant and accelerator.num_processes > 1:
        raise ConfigError(
            "diagnostics.gradients_every is set with reentrant gradient checkpointing on "
            f"{accelerator.num_processes} processes. That kind needs a whole backward for each "
            "channel, which DDP would take for the step's own. Set "
            "grpo.gradient_checkpointing_kwargs = {use_reentrant = false}, or "
            "diagnostics.gradients_every = 0."
        )
