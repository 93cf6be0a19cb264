"""Bytes that tensors hold, counted storage by storage while a step runs.

A CPU has no allocator that says what tensors take, and resident size counts everything else too.
So every operator's outputs are looked at: a storage counts from the operator that made it until
nothing holds it any more. What a kernel allocates and frees inside itself is not seen.
"""

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from composer_replication.training.peak_memory import peak_gib, reset_peak
from composer_replication.units import gib


class TensorMemory(TorchDispatchMode):
    """The bytes of all live tensors in this machine's memory, and their peak, while it is entered.

    Example:
        >>> with TensorMemory(held=model.parameters()) as memory:
        ...     model(ids).loss.backward()
        >>> memory.peak_bytes
    """

    storage_devices = frozenset({"cpu"})
    """Where a storage has to be to count."""

    def __init__(self, *, held: Iterable[Tensor]) -> None:
        """Count what is held before the first operator.

        Args:
            held: tensors that exist already; those of one storage count once.
        """
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in held:
            self._add(tensor)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True would import the compiler, a second or more, to keep it out of this method.
        return False

    def restart_peak(self) -> int:
        """The peak since the last restart; the next one starts from what is live now."""
        peak, self.peak_bytes = self.peak_bytes, self.live_bytes
        return peak

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - torch's own
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run the operator and count the storages that it returns."""
        del types
        output = self.compute(func, args, kwargs or {})
        if isinstance(output, Tensor):
            self._add(output)
        else:
            for leaf in tree_iter(output):
                if isinstance(leaf, Tensor):
                    self._add(leaf)
        return output

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """The operator's outputs."""
        return func(*args, **kwargs)

    def _add(self, tensor: Tensor) -> None:
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages or storage.device.type not in self.storage_devices:
            return
        num_bytes = storage.nbytes()

        def forget(_dead: weakref.ref[torch.UntypedStorage]) -> None:
            del self._storages[key]
            self.live_bytes -= num_bytes

        self._storages[key] = weakref.ref(storage, forget)
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


@contextmanager
def tensor_peak_gib(device: torch.device) -> Iterator[Callable[[], float]]:
    """Measure the peak of all tensors on a device; the function it gives reads it, in GiB.

    On CUDA the allocator knows and nothing is slowed down.
    """
    if device.type == "cuda":
        reset_peak(device)
        yield lambda: peak_gib(device)
        return
    with TensorMemory(held=tensors_in_memory()) as memory:
        yield lambda: gib(memory.peak_bytes)


def tensors_in_memory() -> list[Tensor]:
    """Every tensor that a Python object holds now; none is missed between two steps."""
    # `isinstance` would ask objects for their `__class__`, and lazy modules import themselves then.
    return [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
