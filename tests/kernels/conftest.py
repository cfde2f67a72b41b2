"""Fixtures of the kernels' tests."""

from __future__ import annotations

import pytest
import torch
from problems import device_for


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where the tensors of a test of ``backend`` live."""
    return device_for(backend)
