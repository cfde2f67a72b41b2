"""``python -m steermoe_kernels``: what it prints, and that a backend which computes wrongly is found out."""

from __future__ import annotations

import platform
import re
import sys

import pytest
import torch
from torch import Tensor

from steermoe_kernels import __main__ as diagnostics
from steermoe_kernels import __version__
from steermoe_kernels.backends import backend_states, get_backend


@pytest.fixture
def only_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend that is there on every machine, and one that is not."""
    monkeypatch.setattr(diagnostics, "backend_states", lambda: {"reference": None, "absent": "it was never written"})


def test_everything_is_named_and_right(capsys: pytest.CaptureFixture[str]) -> None:
    status = diagnostics.main([])
    text = capsys.readouterr().out
    assert status == 0, text
    for fact in (f"steermoe_kernels {__version__}", platform.python_version(), torch.__version__, f"{torch.get_num_threads()} threads"):
        assert fact in text, fact
    head, check = text.split("self-check:")
    for name, reason in backend_states().items():
        assert f"{name:<{diagnostics._COLUMN}} {'available' if reason is None else 'unavailable: ' + reason}" in head
        assert f"  {name:<{diagnostics._COLUMN}} {'float32' if reason is None else 'skipped'}" in check
    assert check.rstrip().endswith("passed")


@pytest.mark.usefixtures("only_reference")
def test_an_absent_core_and_backend_give_their_reasons(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "steermoe_kernels._cpu", None)
    assert diagnostics.main([]) == 0
    text = capsys.readouterr().out
    assert re.search(r"_cpu +absent: ", text)
    assert re.search(r"absent +unavailable: it was never written", text)


@pytest.mark.usefixtures("only_reference")
def test_an_automatic_backend_that_cannot_run_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERMOE_BACKEND", "tpu")
    assert diagnostics.main([]) == 1
    text = capsys.readouterr().out
    assert re.search(r"auto +FAILS for tensors on cpu: STEERMOE_BACKEND=tpu names no backend", text) and text.rstrip().endswith("FAILED")


def test_an_instruction_set_that_is_not_there_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("steermoe_kernels._cpu")
    monkeypatch.setattr(diagnostics, "backend_states", lambda: {"reference": None})
    monkeypatch.setenv("STEERMOE_SIMD", "AVX2")  # they are written small
    with pytest.warns(RuntimeWarning, match="STEERMOE_SIMD=AVX2"):
        assert diagnostics.main([]) == 1
    text = capsys.readouterr().out
    assert "kernels FAIL: STEERMOE_SIMD=AVX2 names none" in text and text.rstrip().endswith("FAILED")


@pytest.mark.usefixtures("only_reference")
@pytest.mark.parametrize(
    "function, result", [("steer_forward", 0), ("steer_forward", 2), ("steer_backward", 3)], ids=["y", "gates", "dvectors"]
)
@pytest.mark.parametrize("fault", [1.01, float("nan")])
def test_a_wrong_result_fails(
    function: str, result: int, fault: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = get_backend("reference")
    right = getattr(backend, function)

    def wrong(*arguments: object) -> tuple[Tensor | None, ...]:
        results = list(right(*arguments))
        results[result] = results[result] * fault
        return tuple(results)

    monkeypatch.setattr(backend, function, wrong)
    assert diagnostics.main([]) == 1
    check = capsys.readouterr().out.split("self-check:")[1]
    assert all("FAILED" in line for line in check.splitlines() if line.startswith("  reference"))
    assert check.rstrip().endswith("FAILED")


@pytest.mark.usefixtures("only_reference")
def test_a_backend_that_raises_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(get_backend("reference"), "steer_forward", broken)
    assert diagnostics.main([]) == 1
    assert "FAILED: RuntimeError: out of order" in capsys.readouterr().out
