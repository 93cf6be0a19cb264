import sys
from pathlib import Path

import pytest
import torch

# The claims that the mutants must break live beside the unit tests that hold them for our code.
sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "losses"))


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors here are tiny: waiting for a second thread costs more than it brings."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
