"""Fixtures that several test files share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of random inputs."""
    return torch.Generator().manual_seed(0)
