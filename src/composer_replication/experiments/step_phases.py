"""Where in a step memory peaks: one peak for each stretch between two points of its forwards.

Forwards are counted in their order; a part of one is what comes before the layers (`embed`), a
layer (`first`, `middle`, `last`) or what follows them (`head`: the last norm, the tiles of the
output head and the loss). Within one stretch memory changes by the same amount for each layer that
the model has more, so two depths give every other depth (`simulate.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from composer_replication.step.hidden_states import causal_lm
from composer_replication.training.tensor_memory import TensorMemory

OPTIMIZER = "optimizer"


@dataclass(frozen=True, slots=True)
class Stretch:
    """One stretch of a step."""

    phase: str
    """`teacher`, `policy_forward`, `loss`, `backward` or `optimizer`."""
    forward: int
    part: str


class StepPhases:
    """Hooks that cut a step into stretches and note the peak of each."""

    def __init__(self, memory: TensorMemory) -> None:
        self.peaks: dict[Stretch, int] = {}
        self._memory = memory
        self._stretch = Stretch("policy_forward", 0, "start")
        self._watched: set[nn.Module] = set()
        self._num_forwards = 0
        self._is_backward = False
        self._runs_whole = False
        """Inside a decoder's forward. A part of a tree that was cut has one in the backward too."""
        memory.restart_peak()

    def watch(self, model: nn.Module) -> None:
        """Hook the decoder and its layers; a model that is watched twice counts once."""
        decoder = causal_lm(model).get_decoder()
        if decoder in self._watched:
            return
        self._watched.add(decoder)
        layers = list(cast(nn.ModuleList, decoder.layers))
        decoder.register_forward_pre_hook(self._enter_decoder)
        decoder.register_forward_hook(self._leave_decoder)
        for index, layer in enumerate(layers):
            part = "first" if index == 0 else "last" if index == len(layers) - 1 else "middle"
            layer.register_forward_pre_hook(self._entering(part))
            layer.register_forward_hook(self._leaving(part))

    def start(self, stretch: Stretch) -> None:
        """End the current stretch and begin another."""
        peak = max(self.peaks.get(self._stretch, 0), self._memory.restart_peak())
        self.peaks[self._stretch] = peak
        self._stretch = stretch
        self._is_backward = stretch.phase in ("backward", OPTIMIZER)

    def _enter_decoder(self, _module: nn.Module, _args: object) -> None:
        self._num_forwards += 1
        self._runs_whole = True
        self.start(self._forward_stretch("embed"))

    def _leave_decoder(self, _module: nn.Module, _args: object, _output: object) -> None:
        self._runs_whole = False
        phase = "backward" if self._is_backward else "loss"
        self.start(Stretch(phase, self._num_forwards, "head"))

    def _entering(self, part: str) -> Callable[[nn.Module, object], None]:
        def hook(_module: nn.Module, _args: object) -> None:
            # Under gradient checkpointing a layer runs again on its own, inside the backward.
            if self._runs_whole:
                self.start(self._forward_stretch(part))

        return hook

    def _leaving(self, part: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _args: object, output: object) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = cast(Tensor, hidden)
            if self._is_backward or not hidden.requires_grad:
                return
            stretch = Stretch("backward", self._num_forwards, part)

            def on_gradient(_grad: Tensor) -> None:
                # A part that runs again stops at what it needs, before the decoder's end.
                self._runs_whole = False
                self.start(stretch)

            hidden.register_hook(on_gradient)

        return hook

    def _forward_stretch(self, part: str) -> Stretch:
        phase = "policy_forward" if torch.is_grad_enabled() else "teacher"
        phase = "backward" if self._is_backward else phase
        return Stretch(phase, self._num_forwards, part)
