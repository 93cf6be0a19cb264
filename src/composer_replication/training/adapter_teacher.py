"""An EMA teacher under LoRA: the average of the adapter's product, not of its two factors.

The mean of `B A` over time is not the product of the means of `B` and `A`: that product lags
quadratically behind (0.25 % of the way after the first update at rate 0.05). So each adapted layer
keeps its averaged `scaling * B A` as one matrix, which hooks add to the frozen base layer's output.
It costs 4 bytes for each weight of the adapted layers.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from composer_replication.errors import ConfigError
from composer_replication.step.separate import in_eval_mode


class AdapterAverageTeacher:
    """The base model plus the moving average of a LoRA adapter's product."""

    def __init__(
        self,
        policy: nn.Module,
        autocast: Callable[[], AbstractContextManager[object]],
        *,
        ema_rate: float,
    ) -> None:
        """Start the average where the adapter stands.

        Args:
            policy: a PEFT model whose only adapters are LoRA's on linear layers.
            autocast: opens the policy's precision.
            ema_rate: share of the policy that enters at each update.

        Raises:
            ConfigError: an adapter whose effect is not one matrix added to a linear layer.
        """
        self._policy = policy
        self._autocast = autocast
        self._ema_rate = ema_rate
        self._layers = _lora_layers(policy)
        self._average = {name: _product(layer) for name, layer in self._layers.items()}

    @contextmanager
    def open(self) -> Iterator[nn.Module]:
        """The policy in eval mode, its adapter replaced by the average."""
        adapters_off = cast(AbstractContextManager[None], self._policy.disable_adapter())  # pyright: ignore
        with adapters_off, self._autocast(), in_eval_mode(self._policy):
            handles = [
                cast(nn.Module, layer.base_layer).register_forward_hook(
                    _adding(self._average[name])
                )
                for name, layer in self._layers.items()
            ]
            try:
                yield self._policy
            finally:
                for handle in handles:
                    handle.remove()

    @torch.no_grad()
    def update(self) -> None:
        """Move each layer's product `ema_rate` of the way to the adapter's."""
        for name, layer in self._layers.items():
            self._average[name].lerp_(_product(layer), self._ema_rate)

    def state(self) -> Mapping[str, Tensor]:
        """The averaged products by layer name."""
        return self._average

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Overwrite the averaged products."""
        for name, average in self._average.items():
            average.copy_(state[name])


def _lora_layers(policy: nn.Module) -> dict[str, nn.Module]:
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    layers: dict[str, nn.Module] = {}
    for name, module in policy.named_modules():
        if not isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            continue
        if not isinstance(module, Linear) or any(module.use_dora.values()):
            raise ConfigError(
                f"teacher is 'ema' and the adapter has {name} ({type(module).__name__}), whose "
                "effect is not one matrix added to a linear layer, so its average is not known. "
                "Set teacher = 'frozen', or adapt linear layers with plain LoRA."
            )
        layers[name] = module
    return layers


@torch.no_grad()
def _product(layer: nn.Module) -> Tensor:
    """`scaling * B A` of the active adapters in fp32, `[out, in]` as the base layer's weight is."""
    names = cast(list[str], layer.active_adapters)
    deltas = [cast(Tensor, layer.get_delta_weight(name)) for name in names]  # pyright: ignore
    return torch.stack([delta.float() for delta in deltas]).sum(0)


def _adding(average: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + functional.linear(inputs[0], average.to(inputs[0].dtype)).to(output.dtype)

    return hook
