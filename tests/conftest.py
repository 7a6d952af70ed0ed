"""Fixtures that several test files share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("proxyv", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("proxyv")

# Some tests fork a run, and the threads of OpenMP do not survive a fork: the child would wait for
# them for ever. One thread also gives the same sums whatever the machine.
torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of random inputs."""
    return torch.Generator().manual_seed(0)
