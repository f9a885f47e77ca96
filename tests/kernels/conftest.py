import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty is filled with NaN, so that an unwritten result cannot pass."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
