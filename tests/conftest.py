"""A strict session: fresh buffers are NaN, so that a store left out turns a comparison red."""

import pytest
import torch

from tests.networks import Draw


@pytest.fixture(autouse=True, scope="session")
def poisoned_buffers():
    # In deterministic mode torch fills the memory of torch.empty with NaN.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def draw() -> Draw:
    return Draw(seed=0)
