"""Fixtures of the kernels' tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from problems import device_for
from small_encoders import KINDS

from steermoe_kernels import backends, eager
from steermoe_kernels import functional as SF

Hear = Callable[[str, tuple[Any, ...]], None]


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where the tensors of a test of ``backend`` live."""
    return device_for(backend)


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    """Who runs a pass is decided anew in every test: some tests change what the decision rests on."""
    yield
    backends.automatic_backend.cache_clear()
    eager.forget_ways()


@pytest.fixture
def drop_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[ModuleType, Any, str], None]]:
    """``drop_in(package, found, source)``: the package has one file more, ``dropped_in.py``; ``found`` caches which files it has."""
    undo: list[Callable[[], Any]] = []

    def drop_in(package: ModuleType, found: Any, source: str) -> None:
        (tmp_path / "dropped_in.py").write_text(source)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
        found.cache_clear()
        undo.extend((found.cache_clear, lambda: sys.modules.pop(f"{package.__name__}.dropped_in", None)))

    yield drop_in
    for step in undo:
        step()


@pytest.fixture
def listen(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Hear], None]:
    """``listen(backend, hear)``: from now on ``hear("forward" or "backward", arguments)`` hears of every pass that the backend runs."""

    def listen(backend: str, hear: Hear) -> None:
        module = backends.get_backend(backend)

        def listening(direction: str, run: Callable[..., Any]) -> Callable[..., Any]:
            def heard(*arguments: Any) -> Any:
                results = run(*arguments)
                if results is not None:  # else the backend's direct way declines, and the pass comes again
                    hear(direction, arguments)
                return results

            return heard

        for direction in ("forward", "backward"):
            name = f"steer_{direction}"
            monkeypatch.setattr(module, name, listening(direction, getattr(module, name)))
        if (direct := getattr(module, "direct", None)) is not None:

            def listened(*settings: Any) -> Any:
                way = direct(*settings)
                return way and SimpleNamespace(**{name: listening(name, getattr(way, name)) for name in ("forward", "backward")})

            monkeypatch.setattr(module, "direct", listened)
        eager.forget_ways()

    return listen


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of every stream that goes through the fused operator."""
    shapes: list[tuple[int, ...]] = []
    steer = SF.steer
    monkeypatch.setattr(SF, "steer", lambda h, *args, **options: shapes.append(tuple(h.shape)) or steer(h, *args, **options))
    return shapes


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Which of the small encoders ``encoder`` is, and what ``x`` it takes."""
    return request.param


@pytest.fixture
def encoder(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return KINDS[kind][0]().eval()


@pytest.fixture
def x(kind: str) -> torch.Tensor:
    return KINDS[kind][1]()
