"""Random states are taken, compared and put back for every library."""

import random

import numpy as np
import pytest
import torch

from composer_replication.experiments.random_states import RandomStates

DRAWS = {
    "torch": lambda: float(torch.rand(())),
    "numpy": lambda: float(np.random.rand()),  # noqa: NPY002
    "numpy gauss": lambda: float(np.random.randn()),  # noqa: NPY002
    "python": random.random,
}


@pytest.mark.parametrize("library", DRAWS)
def test_a_draw_changes_the_states_and_putting_them_back_repeats_it(library):
    before = RandomStates.take()
    first = DRAWS[library]()
    assert RandomStates.take() != before
    before.put_back()
    assert RandomStates.take() == before
    assert DRAWS[library]() == first
    before.put_back()
