"""What "auto" takes on a GPU: whatever the table of measurements says, and with no line in it what it took before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from steermoe_kernels import backends, choice

GPU = torch.device("cuda", 0)
LINE = choice.Measured((9, 0), (torch.bfloat16,), "cuda", "somewhere.json")


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which every backend runs, with a GPU of capability 9.0."""
    monkeypatch.delenv("STEERMOE_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for name in backends._names():
        monkeypatch.setattr(backends._load(name), "unavailable", lambda: None)
        monkeypatch.setattr(backends._load(name), "rejects", lambda device, dtype: None)
    backends._auto.cache_clear()
    yield
    backends._auto.cache_clear()


def _chosen(dtype: torch.dtype = torch.bfloat16, device: torch.device = GPU) -> str:
    return backends.select_backend("auto", device, dtype).__name__.rpartition(".")[2]


def test_every_line_names_a_backend_and_its_evidence() -> None:
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    for line in choice.FASTEST:
        assert line.backend in backends._names(), line
        assert (results / line.results).is_file(), line


def test_the_cuda_kernels_come_in_by_the_table_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "FASTEST", ())
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert _chosen(dtype) != "cuda"


def test_a_measured_backend_is_taken_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    otherwise = _chosen(torch.float32)
    monkeypatch.setattr(choice, "FASTEST", (LINE,))
    backends._auto.cache_clear()
    assert _chosen() == "cuda"
    assert _chosen(torch.float32) == otherwise
    assert _chosen(device=torch.device("cpu")) != "cuda"


def test_another_gpu_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "FASTEST", (LINE,))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert _chosen() != "cuda"


def test_a_measured_backend_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "FASTEST", (LINE,))
    monkeypatch.setattr(backends._load("cuda"), "unavailable", lambda: "it was left out")
    assert _chosen() != "cuda"
