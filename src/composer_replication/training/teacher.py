"""The weights that score as the hint-conditioned teacher: live, ema or frozen.

A live teacher is cheapest but collapses in training (`docs/concepts.md`); a copy costs the model's
size in memory, and under LoRA the frozen teacher is the adapters switched off, for free. The EMA
under LoRA is in `adapter_teacher.py`.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from composer_replication.step.hidden_states import causal_lm
from composer_replication.step.separate import in_eval_mode
from composer_replication.step.settings import TeacherKind
from composer_replication.training.adapter_teacher import AdapterAverageTeacher

Autocast = Callable[[], AbstractContextManager[object]]


class Teacher(Protocol):
    """Weights to score with, and what an optimizer step does to them."""

    def open(self) -> AbstractContextManager[nn.Module]:
        """The teacher's model, in eval mode, at the policy's precision."""
        ...

    def update(self) -> None:
        """Follow the policy after one optimizer step."""
        ...

    def state(self) -> Mapping[str, Tensor]:
        """What a checkpoint has to keep; empty where the policy's own weights suffice."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned."""
        ...


class PolicyTeacher:
    """The policy's own weights: live, or with its LoRA adapters switched off (frozen)."""

    def __init__(self, policy: nn.Module, autocast: Autocast, *, without_adapters: bool) -> None:
        self._policy = policy
        self._autocast = autocast
        self._without_adapters = without_adapters

    @contextmanager
    def open(self) -> Iterator[nn.Module]:
        """The policy in eval mode."""
        adapters_off = cast(
            AbstractContextManager[None],
            self._policy.disable_adapter() if self._without_adapters else nullcontext(),  # pyright: ignore
        )
        with adapters_off, self._autocast(), in_eval_mode(self._policy):
            yield self._policy

    def update(self) -> None:
        """Nothing to do: the weights are the policy's."""

    def state(self) -> Mapping[str, Tensor]:
        """Nothing: the policy's checkpoint holds it."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to put back."""
        del state


class CopyTeacher:
    """Another copy of the weights: the start (rate 0), or their exponential moving average."""

    def __init__(self, policy: nn.Module, autocast: Autocast, *, ema_rate: float) -> None:
        self._policy = causal_lm(policy)
        self._model = detached_copy(policy)
        self._autocast = autocast
        self._ema_rate = ema_rate

    @contextmanager
    def open(self) -> Iterator[nn.Module]:
        """The copy, always in eval mode."""
        with self._autocast():
            yield self._model

    @torch.no_grad()
    def update(self) -> None:
        """Move each weight `ema_rate` of the way to the policy's."""
        if self._ema_rate == 0:
            return
        for mine, policys in zip(self._model.parameters(), self._policy.parameters(), strict=True):
            mine.lerp_(policys.detach().to(mine.dtype), self._ema_rate)

    def state(self) -> Mapping[str, Tensor]:
        """The copy's parameters by name, each tied one once."""
        return dict(self._model.named_parameters())

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Overwrite the copy's parameters."""
        for name, parameter in self._model.named_parameters():
            parameter.copy_(state[name])


def make_teacher(
    kind: TeacherKind | None,
    policy: nn.Module,
    autocast: Autocast,
    *,
    ema_rate: float,
    has_adapters: bool,
) -> Teacher:
    """The teacher of that kind; None is `ema`, or `frozen` under LoRA.

    Raises:
        ConfigError: `ema` under an adapter that is not plain LoRA.
    """
    kind = kind or ("frozen" if has_adapters else "ema")
    if kind == "live":
        return PolicyTeacher(policy, autocast, without_adapters=False)
    if kind == "frozen" and has_adapters:
        return PolicyTeacher(policy, autocast, without_adapters=True)
    if has_adapters:
        return AdapterAverageTeacher(policy, autocast, ema_rate=ema_rate)
    return CopyTeacher(policy, autocast, ema_rate=ema_rate if kind == "ema" else 0.0)


def detached_copy(policy: nn.Module) -> nn.Module:
    """A copy of the model that shares nothing with the policy, in eval mode, without gradient.

    TRL replaces `forward` on the instance by a closure over the policy's own forward, and a plain
    deep copy would go on calling the policy through it. The copy gets its class's forward back.
    """
    lm = causal_lm(policy)
    patched = {name: lm.__dict__.pop(name) for name in ("forward",) if name in lm.__dict__}
    try:
        clone = copy.deepcopy(lm)
    finally:
        lm.__dict__.update(patched)
    return clone.eval().requires_grad_(False)
