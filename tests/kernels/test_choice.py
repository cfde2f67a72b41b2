"""What "auto" takes on a GPU: whatever the table of measurements says, and with no line in it what it took before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steermoe_kernels import backends, choice, functional, ops

GPU = torch.device("cuda", 0)
SHAPE = choice.Shape(experts=8, frames=1500, width=1280)
LINE = choice.Measured((9, 0), (torch.bfloat16,), choice.Shape(1, 100, 384), choice.Shape(8, 10**6, 1280), "cuda", "somewhere.json")


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which every backend runs, with a GPU of capability 9.0."""
    monkeypatch.delenv("STEERMOE_BACKEND", raising=False)
    monkeypatch.setattr(choice, "_capability", lambda device: (9, 0))
    for name in backends._modules():
        monkeypatch.setattr(backends._load(name), "unavailable", lambda: None)
        monkeypatch.setattr(backends._load(name), "rejects", lambda *stream_and_pass: None)
    backends.automatic_backend.cache_clear()
    yield
    backends.automatic_backend.cache_clear()


def _chosen(dtype: torch.dtype = torch.bfloat16, device: torch.device = GPU, shape: choice.Shape = SHAPE) -> str:
    return backends.select_backend("auto", device, dtype, shape).__name__.rpartition(".")[2]


def test_every_line_names_a_backend_and_its_evidence() -> None:
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    for line in choice.FASTEST:
        assert line.backend in backends._modules(), line
        assert (results / line.results).is_file(), line


def test_the_cuda_kernels_come_in_by_the_table_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "FASTEST", ())
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert _chosen(dtype) != "cuda"


def test_a_measured_backend_is_taken_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    otherwise = _chosen(torch.float32)
    monkeypatch.setattr(choice, "FASTEST", (LINE,))
    backends.automatic_backend.cache_clear()
    assert _chosen() == "cuda"
    assert _chosen(torch.float32) == otherwise
    for size in ({"experts": 1}, {"frames": 100}, {"frames": 10**6}, {"width": 384}):
        assert _chosen(shape=SHAPE._replace(**size)) == "cuda", size
    for size in ({"experts": 9}, {"frames": 99}, {"frames": 10**6 + 1}, {"width": 376}, {"width": 1288}):
        assert _chosen(shape=SHAPE._replace(**size)) == otherwise, size
    assert _chosen(device=torch.device("cpu")) != "cuda"


def test_the_first_line_that_fits_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "FASTEST", (replace(LINE, backend="reference"), LINE))
    assert _chosen() == "reference"


def test_the_operators_ask_with_their_own_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    select = ops.select_backend
    monkeypatch.setattr(ops, "select_backend", lambda *given: asked.append(given[3]) or select(*given))
    weight, vectors = torch.zeros(3, 5, requires_grad=True), torch.zeros(3, 5)
    functional.steer(torch.zeros(2, 7, 5), weight, None, vectors, 1.0, backend="reference")[0].sum().backward()
    assert asked == [choice.Shape(experts=3, frames=14, width=5)] * 2


def test_another_gpu_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "FASTEST", (LINE,))
    monkeypatch.setattr(choice, "_capability", lambda device: (8, 0))
    assert _chosen() != "cuda"


def test_a_measured_backend_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "FASTEST", (LINE,))
    monkeypatch.setattr(backends._load("cuda"), "unavailable", lambda: "it was left out")
    assert _chosen() != "cuda"
