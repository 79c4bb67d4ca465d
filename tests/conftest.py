"""Every test runs with fresh memory filled with NaN (an unwritten output shows) and a fixed seed."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
