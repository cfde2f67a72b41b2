"""What every test shares: the loop over backends, and poisoned memory."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Idle OpenMP threads sleep instead of spinning: several times faster where the machine has other work. Read once, when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from steermoe_kernels import available_backends


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "unpoisoned: leaves torch's deterministic mode, which poisons fresh memory, off")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``backend`` runs on every backend of this machine; TRITON_INTERPRET=1 adds triton where there is no GPU."""
    if "backend" in metafunc.fixturenames and not _parametrised(metafunc, "backend"):
        metafunc.parametrize("backend", available_backends())


def _parametrised(metafunc: pytest.Metafunc, name: str) -> bool:
    marks = metafunc.definition.iter_markers("parametrize")
    return any(name in [part.strip() for part in mark.args[0].split(",")] for mark in marks if isinstance(mark.args[0], str))


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """``torch.empty`` and its kin return NaN (the largest value for integers), so that an element nobody wrote cannot hide.

    In deterministic mode PyTorch fills uninitialised memory inside its allocating operators, for Python and C++ callers alike; no
    patching, and nothing that torch.compile would trace. Operators without a deterministic version only warn.
    """
    if request.node.get_closest_marker("unpoisoned"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
