"""Which backends there are, which one runs, and what is said when one cannot."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from problems import device_for

from steermoe_kernels import FusedSteerMoE, available_backends, backends
from steermoe_kernels import functional as SF

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of the choice start without STEERMOE_BACKEND."""
    monkeypatch.delenv("STEERMOE_BACKEND", raising=False)


@pytest.fixture
def ran(listen: Callable[..., None]) -> list[str]:
    """A list that every backend adds its name and direction to when it runs."""
    heard: list[str] = []
    for name in available_backends():
        listen(name, lambda direction, arguments, name=name: heard.append(f"{name} {direction}"))
    return heard


def _run(backend: str = "auto", device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> None:
    h, weight, vectors = (torch.ones(shape, device=device, dtype=dtype, requires_grad=True) for shape in ((4, 6), (3, 6), (3, 6)))
    y, _ = SF.steer(h, weight, None, vectors, 0.1, backend=backend)
    y.sum().backward()


def test_the_reference_is_always_there() -> None:
    assert "reference" in available_backends()


def test_every_backend_keeps_the_contract() -> None:
    for name in backends._modules():
        module = backends._load(name)
        assert isinstance(module.AUTO_DEVICES, frozenset), name
        assert isinstance(module.PRIORITY, int), name
        assert module.unavailable() is None or isinstance(module.unavailable(), str), name
        for function in ("rejects", "steer_forward", "steer_backward"):
            assert callable(getattr(module, function)), f"{name}.{function}"


def test_a_state_is_none_or_a_sentence() -> None:
    states = backends.backend_states()
    assert [name for name, reason in states.items() if reason is None] == available_backends()
    for name, reason in states.items():
        if reason is not None:
            assert len(reason.split()) > 3, f"{name}: {reason!r}"
            with pytest.raises(RuntimeError) as caught:
                backends.get_backend(name)
            assert str(caught.value) == f"backend {name!r} is unavailable: {reason}"


def test_the_backend_asked_for_runs(backend: str, ran: list[str]) -> None:
    _run(backend, device_for(backend))
    assert ran == [f"{backend} forward", f"{backend} backward"]


def test_the_environment_chooses_for_auto(backend: str, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERMOE_BACKEND", backend)
    _run("auto", device_for(backend))
    assert ran == [f"{backend} forward", f"{backend} backward"]


def test_the_module_runs_the_backend_it_was_given(backend: str, ran: list[str]) -> None:
    device = device_for(backend)
    aligner, h = FusedSteerMoE(6, 3, backend=backend, device=device), torch.ones(4, 6, device=device)
    aligner(h).sum().backward()
    aligner.steer_norm(h, 0, torch.nn.LayerNorm(6, device=device))
    assert ran == [f"{backend} forward", f"{backend} backward", f"{backend} forward"]


def test_the_environment_reaches_the_module(backend: str, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    aligner = FusedSteerMoE(6, 3, device=device_for(backend))
    monkeypatch.setenv("STEERMOE_BACKEND", backend)
    aligner(torch.ones(4, 6, device=device_for(backend)))
    assert ran == [f"{backend} forward"]


def test_an_argument_outranks_the_environment(backend: str, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERMOE_BACKEND", "nonsense")
    _run(backend, device_for(backend))
    assert ran == [f"{backend} forward", f"{backend} backward"]


@pytest.mark.parametrize("value", ["", "auto"])
def test_an_environment_that_leaves_it_open(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_choice = backends.select_backend("auto", CPU, torch.float32)
    monkeypatch.setenv("STEERMOE_BACKEND", value)
    assert backends.select_backend("auto", CPU, torch.float32) is open_choice


def test_an_unknown_name_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERMOE_BACKEND", "tpu")
    with pytest.raises(ValueError, match=r"STEERMOE_BACKEND=tpu names no backend: choose one of auto, .*reference"):
        _run()


def test_an_unavailable_name_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.get_backend("reference"), "unavailable", lambda: "it was left out")
    monkeypatch.setenv("STEERMOE_BACKEND", "reference")
    with pytest.raises(RuntimeError, match="backend 'reference' is unavailable: it was left out"):
        _run()


def test_a_backend_that_is_missing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.get_backend("reference"), "unavailable", lambda: "it was left out")
    assert "reference" not in available_backends()
    with pytest.raises(RuntimeError, match="backend 'reference' is unavailable: it was left out"):
        _run("reference")


def test_a_backend_that_does_not_take_this_stream(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = device_for(backend)
    monkeypatch.setattr(backends.get_backend(backend), "rejects", lambda device, dtype, options: f"no {dtype} on {device}")
    with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run this: no torch.float32 on {device}"):
        _run(backend, device)


def test_a_pass_that_a_backend_does_not_take(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its neighbours go on as before, by the direct way, which is remembered; "auto" takes the next backend, whoever names it is told."""
    if "cpu" not in available_backends():
        pytest.skip("the compiled module is not here")
    cpu = backends.get_backend("cpu")
    monkeypatch.setattr(cpu, "rejects", lambda device, dtype, options: "it takes two experts" if options.num_experts > 2 else None)
    h, two, three, scale = torch.ones(4, 6), torch.ones(2, 6), torch.ones(3, 6), torch.tensor(0.1)
    for weight in (two, three, two, three):
        SF.steer(h, weight, None, weight, scale)
    assert ran == ["cpu forward", "reference forward"] * 2
    for _ in range(2):
        with pytest.raises(RuntimeError, match="backend 'cpu' cannot run this: it takes two experts"):
            SF.steer(h, three, None, three, scale, backend="cpu")
    SF.steer(h, two, None, two, scale, backend="cpu")
    assert ran == [*["cpu forward", "reference forward"] * 2, "cpu forward"]


def test_auto_takes_the_highest_priority_that_can() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        able = [backends.get_backend(name) for name in available_backends()]
        able = [module for module in able if "cpu" in module.AUTO_DEVICES and module.rejects(CPU, dtype) is None]
        best = max(able, key=lambda module: module.PRIORITY, default=backends.get_backend("reference"))
        assert backends.select_backend("auto", CPU, dtype) is best


def test_of_two_backends_for_a_device_auto_takes_the_one_of_higher_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    if "cpu" not in available_backends():
        pytest.skip("the compiled module is not here")
    cpu, reference = backends.get_backend("cpu"), backends.get_backend("reference")
    monkeypatch.setattr(reference, "AUTO_DEVICES", frozenset({"cpu"}))
    for priority, better in ((cpu.PRIORITY - 1, cpu), (cpu.PRIORITY + 1, reference)):
        monkeypatch.setattr(reference, "PRIORITY", priority)
        backends.automatic_backend.cache_clear()
        assert backends.select_backend("auto", CPU, torch.float32) is better


def test_a_backend_is_one_file(drop_in: Callable[..., None], listen: Callable[..., None]) -> None:
    drop_in(backends, backends._modules, "from .reference import *\nAUTO_DEVICES, PRIORITY = frozenset({'cpu'}), 1000\n")
    assert "dropped_in" in available_backends()
    heard: list[str] = []
    listen("dropped_in", lambda direction, arguments: heard.append(direction))
    for name in ("auto", "dropped_in"):
        _run(name)
    assert heard == ["forward", "backward"] * 2


def test_auto_falls_back_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in available_backends():
        monkeypatch.setattr(backends.get_backend(name), "AUTO_DEVICES", frozenset())
    backends.automatic_backend.cache_clear()
    assert backends.select_backend("auto", CPU, torch.float32) is backends.get_backend("reference")


def test_auto_says_once_that_it_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt variable or a failed build must not cost speed in silence."""
    if "cpu" not in available_backends():
        pytest.skip("the compiled module is not here")
    monkeypatch.setenv("STEERMOE_SIMD", "avx513")
    backends.automatic_backend.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"plain PyTorch steers here, slower than it could \(cpu: STEERMOE_SIMD=avx513 names no"):
        assert backends.select_backend("auto", CPU, torch.float32) is backends.get_backend("reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.select_backend("auto", CPU, torch.float32)
    backends.automatic_backend.cache_clear()


def test_importing_does_nothing_to_the_machine() -> None:
    """No driver is initialised, no backend loaded, nothing compiled, by the import or by asking what there is."""
    program = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import steermoe_kernels\n"
        "new = set(sys.modules) - before\n"
        "assert not any(name == 'triton' or name.startswith('triton.') for name in new), 'triton was imported'\n"
        "assert not any(name.startswith('transformers') or name.startswith('whisper') for name in new), 'an encoder package was imported'\n"
        "steermoe_kernels.available_backends()\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
