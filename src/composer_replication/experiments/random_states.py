"""The random states of every library that a step draws from."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RandomStates:
    """One moment's states of torch, CUDA, numpy and Python.

    Example: `RandomStates.take() == RandomStates.take()`.
    """

    torch_cpu: bytes
    cuda: tuple[bytes, ...]
    numpy: tuple[str, bytes, int, int, float]
    python: tuple[Any, ...]

    @classmethod
    def take(cls) -> "RandomStates":
        """The states as they are."""
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
        return cls(
            torch_cpu=_to_bytes(torch.get_rng_state()),
            cuda=tuple(_to_bytes(state) for state in devices),
            numpy=(
                str(kind),
                np.asarray(keys).tobytes(),
                int(position),
                int(has_gauss),
                float(cached),
            ),
            python=random.getstate(),
        )

    def put_back(self) -> None:
        """Set every library to these states."""
        torch.set_rng_state(_to_tensor(self.torch_cpu))
        if self.cuda:
            torch.cuda.set_rng_state_all([_to_tensor(state) for state in self.cuda])
        kind, keys, position, has_gauss, cached = self.numpy
        words = np.frombuffer(keys, dtype=np.uint32)
        np.random.set_state((kind, words, position, has_gauss, cached))  # noqa: NPY002
        random.setstate(self.python)


def _to_bytes(state: Tensor) -> bytes:
    return state.numpy().tobytes()


def _to_tensor(state: bytes) -> Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
