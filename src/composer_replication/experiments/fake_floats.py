"""Floating-point tensors without memory; integers stay real.

A step's sizes follow from its masks and index lists alone. With those real, everything that
depends on their values (which rows are scored, which mask attention takes, how sequences share a
prefix) happens as in a real step, and nothing asks a fake tensor for a number that it lacks.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from composer_replication.training.tensor_memory import TensorMemory


class FakeFloatsMemory(TensorMemory):
    """`TensorMemory` in which operators on floating-point tensors compute shapes only.

    The tensors claim to be on the CPU: a fake CUDA tensor needs a CUDA device to differentiate.
    """

    # Fake tensors keep their sizes in storages of the meta device.
    storage_devices = frozenset({"cpu", "meta"})

    def __init__(self) -> None:
        super().__init__(held=())
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """Run the operator for real, or for its shapes."""
        inputs = list(_tensors((*args, *kwargs.values())))
        if any(isinstance(tensor, FakeTensor) for tensor in inputs):
            if func is torch.ops.prim.device.default:
                # Autograd asks at every node; the full way round takes most of a simulation.
                return cast(FakeTensor, inputs[0]).fake_device
            if not all(isinstance(tensor, FakeTensor) for tensor in inputs):
                args = tuple(self._without_numbers(argument) for argument in args)
                kwargs = {name: self._without_numbers(value) for name, value in kwargs.items()}
            return self._fake.__torch_dispatch__(func, (), args, kwargs)
        if inputs or func.namespace != "aten":
            return func(*args, **kwargs)
        # A factory: what it makes decides.
        made = self._fake.__torch_dispatch__(func, (), args, kwargs)
        is_floating = isinstance(made, Tensor) and made.dtype.is_floating_point
        return made if is_floating else func(*args, **kwargs)

    def _without_numbers(self, argument: Any) -> Any:  # noqa: ANN401
        """An argument with its real tensors made fake: the mode's cache takes no others."""
        if isinstance(argument, list | tuple):
            return [self._without_numbers(item) for item in argument]
        if not isinstance(argument, Tensor) or isinstance(argument, FakeTensor):
            return argument
        shape = torch.empty_strided(
            argument.shape, argument.stride(), dtype=argument.dtype, device="meta"
        )
        return FakeTensor(self._fake, shape, argument.device)


def _tensors(arguments: Sequence[object]) -> Iterator[Tensor]:
    """Tensors among an operator's arguments, which are values or flat lists of them."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from (item for item in argument if isinstance(item, Tensor))
