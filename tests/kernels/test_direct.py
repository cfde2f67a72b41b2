"""The CPU backend's direct way, from tensors to tensors in one call: when it is taken, and that nobody can tell."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import Problem, call, draw, fused
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from steermoe_kernels import eager
from steermoe_kernels import functional as SF
from steermoe_kernels.backends import Options, cpu, get_backend

pytestmark = pytest.mark.skipif(
    cpu.unavailable() is not None or not cpu._core().connect_tensors(Tensor, torch.nn.Parameter),
    reason="no compiled module, or a torch that does not show it tensors",
)

PROBLEMS = [
    Problem(num_experts=7, bias=False),
    Problem(batch=2, num_experts=8, top_k=2, float32_parameters=True),
    Problem(num_experts=8, top_k=3, renormalize=False, norm="layer", residual=True, norm_bias=False),
    Problem(batch=3, frames=5, num_experts=4, norm="layer", pool="max", pool_size=2, residual=True),
    Problem(batch=2, frames=5, num_experts=4, norm="rms", pool="mean", pool_size=3, norm_weight=False, norm_bias=False),
    Problem(incoming=("gates",)),
    Problem(norm="layer", incoming=("normed",), wanted=("vectors", "norm_weight")),
]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directions of the passes that went the direct way."""
    directions: list[str] = []
    make = cpu.direct

    class Telling:
        def __init__(self, way: Any) -> None:
            self.way = way

        def forward(self, *arguments: Any) -> Any:
            return self.tell("forward", self.way.forward(*arguments))

        def backward(self, *arguments: Any) -> Any:
            return self.tell("backward", self.way.backward(*arguments))

        def tell(self, direction: str, results: Any) -> Any:
            if results is not None:
                directions.append(direction)
            return results

    monkeypatch.setattr(cpu, "direct", lambda *settings: Telling(make(*settings)))
    eager.forget_ways()
    return directions


@pytest.fixture
def long_way(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    def close() -> None:
        monkeypatch.setattr(eager, "steer_directly", lambda *arguments: None)

    yield close


# --- the same results ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_the_same_bits(problem: Problem, dtype: torch.dtype, taken: list[str], long_way: Callable[[], None]) -> None:
    inputs, incoming = draw(problem, dtype)
    direct = fused(problem, inputs, incoming, "cpu")
    assert taken == ["forward", "backward"]
    long_way()
    usual = fused(problem, inputs, incoming, "cpu")
    assert taken == ["forward", "backward"]
    assert direct.keys() == usual.keys()
    for name, tensor in usual.items():
        assert direct[name].dtype == tensor.dtype and direct[name].shape == tensor.shape, name
        assert direct[name].is_contiguous() and torch.equal(direct[name], tensor), name


@pytest.mark.parametrize("shape", [(5,), (1, 5), (4, 5), (2, 3, 5), (2, 1, 3, 5)])
def test_any_number_of_dimensions(shape: tuple[int, ...], taken: list[str]) -> None:
    h, weight, vectors = torch.randn(shape, requires_grad=True), torch.randn(3, 5), torch.randn(3, 5)
    y, gates = SF.steer(h, weight, None, vectors, torch.tensor(0.5))
    y.sum().backward()
    assert taken == ["forward"], "its gradient is one number for all frames, which is not laid out like a stream"
    assert y.shape == h.shape and gates.shape == (*shape[:-1], 3) and h.grad is not None and h.grad.shape == shape


def test_no_gradient_where_nobody_asks(taken: list[str]) -> None:
    h, weight, vectors, scale = torch.randn(4, 5), torch.randn(3, 5), torch.randn(3, 5), torch.tensor(0.5)
    assert SF.steer(h, weight, None, vectors, scale)[0].grad_fn is None
    with torch.no_grad():
        assert SF.steer(h.requires_grad_(), weight, None, vectors, scale)[0].grad_fn is None
    with torch.inference_mode():
        assert SF.steer(h, weight, None, vectors, scale)[0].is_inference()
    assert taken == ["forward"] * 3


# --- when it is not taken -----------------------------------------------------------------------------------------------------------------


class _Subclass(Tensor):
    pass


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t | {"x": t["x"].mT.contiguous().mT},
        lambda t: t | {"weight": t["weight"].mT.contiguous().mT},
        lambda t: t | {"vectors": t["vectors"].as_subclass(_Subclass)},
        lambda t: t | {"x": torch._neg_view(t["x"])},
        lambda t: t | {"x": t["x"][:0]},
        lambda t: t | {"scale": t["scale"].reshape(1)},
        lambda t: t | {"scale": 0.5},
        lambda t: t | {"x": t["x"].double()[..., ::1], "residual": t["residual"].float()},
    ],
    ids=["stream-laid-out", "weight-laid-out", "subclass", "negated", "empty", "scale-of-one", "scale-a-number", "two-dtypes"],
)
def test_what_is_left_to_the_long_way(change: Callable[[dict], dict], taken: list[str]) -> None:
    problem = Problem(residual=True, norm="layer")
    tensors = {name: tensor.detach() for name, tensor in draw(problem, torch.float32)[0].items()}
    changed = change(tensors)
    if changed["x"].numel() == 0:
        changed["residual"] = changed["residual"][:0]
    outputs = call(SF, problem, changed, {"backend": "cpu"})
    assert taken == []
    plain = {name: torch.as_tensor(tensor).clone().contiguous() for name, tensor in changed.items()}
    expected = call(SF, problem, plain, {"backend": "reference"})
    for name in expected:
        torch.testing.assert_close(outputs[name].as_subclass(Tensor), expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"top_k": 0}, ValueError),
        ({"top_k": 4}, ValueError),
        ({"top_k": True}, TypeError),
        ({"top_k": [2]}, TypeError),
        ({"renormalize": 1}, TypeError),
        ({"backend": "tpu"}, ValueError),
        ({"backend": ["cpu"]}, (TypeError, ValueError)),
    ],
)
def test_wrong_settings_get_their_words_every_time(settings: dict, error: Any, taken: list[str]) -> None:
    h, weight, vectors, scale = torch.randn(4, 5), torch.randn(3, 5), torch.randn(3, 5), torch.tensor(0.5)
    SF.steer(h, weight, None, vectors, scale, top_k=1, renormalize=True)
    for _ in range(2):
        with pytest.raises(error):
            SF.steer(h, weight, None, vectors, scale, **settings)
    assert taken == ["forward"]


def test_more_settings_than_are_remembered(taken: list[str]) -> None:
    h, weight, vectors, scale = torch.randn(4, 5), torch.randn(3, 5), torch.randn(3, 5), torch.tensor(0.5)
    several = [0.01 * step for step in range(1, 100)]
    count = sys.getrefcount(several[0])
    for _ in range(2):
        for eps in several:
            y, normed, _ = SF.steer_norm(h, weight, None, vectors, scale, None, None, eps=eps)
            torch.testing.assert_close(normed, torch.nn.functional.layer_norm(y, (5,), eps=eps))
    assert taken == ["forward"] * 198
    del eps
    first, last = sys.getrefcount(several[0]), sys.getrefcount(several[-1])  # outside the assertion, which holds what it looks at
    assert first == count < last


def test_every_dtype_has_its_own_way(taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "rejects", lambda device, dtype, options: "it takes no float64" if dtype == torch.float64 else None)
    tensors = torch.randn(4, 5), torch.randn(3, 5), None, torch.randn(3, 5), torch.tensor(0.5)
    SF.steer(*tensors, backend="cpu")
    with pytest.raises(RuntimeError, match="it takes no float64"):
        SF.steer(tensors[0].double(), *tensors[1:], backend="cpu")
    assert taken == ["forward"]


@pytest.mark.parametrize(
    "change",
    [
        {"weight": torch.zeros(3, 6)},
        {"weight": torch.zeros(0, 5)},
        {"weight": torch.zeros(15)},
        {"vectors": torch.zeros(4, 5)},
        {"bias": torch.zeros(4)},
        {"bias": torch.zeros(3, 1)},
        {"scale": torch.zeros(2)},
        {"h": torch.zeros(())},
        {"h": torch.zeros(4, 0)},
        {"h": torch.zeros(4, 5, dtype=torch.int32)},
        {"weight": torch.zeros(3, 5, dtype=torch.complex64)},
        {"vectors": torch.zeros(3, 5, device="meta")},
        {"h": None},
        {"weight": "W"},
    ],
)
def test_wrong_tensors_get_their_words(change: dict) -> None:
    good = {
        "h": torch.zeros(4, 5),
        "weight": torch.zeros(3, 5),
        "bias": torch.zeros(3),
        "vectors": torch.zeros(3, 5),
        "scale": torch.ones(()),
    }
    with pytest.raises((ValueError, TypeError)):
        SF.steer(**(good | change))


def test_the_environment_is_asked_at_every_call(taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEERMOE_BACKEND", raising=False)
    arguments = torch.randn(4, 5), torch.randn(3, 5), None, torch.randn(3, 5), torch.tensor(0.5)
    for value, taken_then in (("reference", False), ("cpu", True), ("", True), ("auto", True)):
        monkeypatch.setenv("STEERMOE_BACKEND", value)
        SF.steer(*arguments)
        assert bool(taken) is taken_then, value
        taken.clear()
    monkeypatch.setenv("STEERMOE_BACKEND", "reference")
    SF.steer(*arguments, backend="cpu")
    assert taken == ["forward"], "an argument outranks the environment"
    monkeypatch.setenv("STEERMOE_SIMD", "portable")
    SF.steer(*arguments, backend="cpu")
    assert taken == ["forward"] * 2
    monkeypatch.setenv("STEERMOE_SIMD", "avx513")
    with pytest.raises(RuntimeError, match="STEERMOE_SIMD=avx513 names no instruction set"):
        SF.steer(*arguments, backend="cpu")


@pytest.mark.parametrize("problem", [Problem(), Problem(batch=2, frames=5, norm="layer", pool="max", pool_size=2)], ids=str)
def test_who_watches_sees_the_operator(problem: Problem, taken: list[str]) -> None:
    inputs, incoming = draw(problem, torch.float32)
    seen: list[str] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    expected = fused(problem, inputs, incoming, "cpu")
    assert taken == ["forward", "backward"]
    with Watching():
        watched = fused(problem, inputs, incoming, "cpu")
    assert taken == ["forward", "backward"] and {"steermoe.steer.default", "steermoe.steer_backward.default"} <= set(seen)
    assert all(torch.equal(watched[name], expected[name]) for name in expected)


@pytest.mark.parametrize("routing", [{"top_k": 2}, {"top_k": 2, "renormalize": False}, {"renormalize": False}], ids=str)
@pytest.mark.parametrize("shape", [(4, 5), (5,), (2, 3, 5)])
def test_watched_from_the_backward_on(shape: tuple[int, ...], routing: dict[str, Any], taken: list[str]) -> None:
    """The forward went the direct way, and left what the operator's backward does not know: (..., D), and nothing for what is absent."""
    tensors = [torch.randn(size, requires_grad=True) for size in (shape, (3, 5), (3,), (3, 5), (), (5,), (5,))]
    h, weight, bias, vectors, scale, gamma, beta = tensors

    def differentiate(watched: bool) -> tuple[Tensor, ...]:
        outputs = SF.steer_norm(h, weight, bias, vectors, scale, gamma, beta, residual=h, **routing)
        incoming = [torch.linspace(0, 1, output.numel()).view(output.shape) for output in outputs]
        if not watched:
            return torch.autograd.grad(outputs, tensors, incoming)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            grads = torch.autograd.grad(outputs, tensors, incoming)
        assert "steermoe::steer_backward" in {event.name for event in profile.events()}
        return grads

    expected = differentiate(False)
    assert taken == ["forward", "backward"]
    for grad, wanted in zip(differentiate(True), expected, strict=True):
        assert grad.shape == wanted.shape and torch.equal(grad, wanted)
    assert taken == ["forward", "backward", "forward"]


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5)])
@pytest.mark.parametrize("watched", ["forward", "backward"])
def test_a_checkpoint_whose_recomputation_goes_another_way(watched: str, shape: tuple[int, ...]) -> None:
    """It compares what the forward saves with what the recomputation does, in number and shape."""
    leaves = [torch.randn(size, requires_grad=True) for size in (shape, (3, 5), (3, 5), ())]

    def watch(direction: str) -> Any:
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        return profiler if direction == watched else contextlib.nullcontext()

    def run(x: Tensor, weight: Tensor, vectors: Tensor, scale: Tensor) -> Tensor:
        return SF.steer(2 * x, weight, None, vectors, scale)[0].square().sum()

    expected = torch.autograd.grad(run(*leaves), leaves)
    with watch("forward"):
        loss = checkpoint(run, *leaves, use_reentrant=False)
    with watch("backward"):
        loss.backward()
    for leaf, grad in zip(leaves, expected, strict=True):
        assert leaf.grad is not None and torch.equal(leaf.grad, grad)


def test_what_is_saved_may_come_back_laid_out_otherwise(taken: list[str]) -> None:
    """Hooks may pack it, and see what the operator saves; its shape, not its strides, is what they give back."""
    leaves = [torch.randn(size, requires_grad=True) for size in ((2, 4, 5), (3, 5), (3, 5), ())]
    incoming = torch.randn(2, 4, 5)

    def differentiate() -> tuple[Tensor, ...]:
        x, weight, vectors, scale = leaves
        y, gates = SF.steer(x, weight, None, vectors, scale)
        return torch.autograd.grad((y, gates), leaves, (incoming, incoming[..., :3].contiguous()))

    expected = differentiate()
    assert taken == ["forward", "backward"]

    def reverse(tensor: Tensor) -> Tensor:
        return tensor.permute(tuple(reversed(range(tensor.dim()))))

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: reverse(tensor).contiguous(), reverse):
        hooked = differentiate()
    assert taken == ["forward", "backward"]
    for grad, wanted in zip(hooked, expected, strict=True):
        assert torch.equal(grad, wanted)


@pytest.mark.parametrize("through", [0, 2])
def test_a_norm_that_nothing_incoming_depends_on(through: int, long_way: Callable[[], None]) -> None:
    """Its parameters' gradients are zeros: they were in the graph, and optimizers tell zeros from None."""
    leaves = [torch.randn(size, requires_grad=True) for size in ((4, 5), (3, 5), (3, 5), (), (5,), (5,))]

    def differentiate() -> tuple[Tensor, ...]:
        x, weight, vectors, scale, gamma, beta = leaves
        output = SF.steer_norm(x, weight, None, vectors, scale, gamma, beta)[through]
        return torch.autograd.grad(output, leaves, torch.linspace(0, 1, output.numel()).view(output.shape))

    direct = differentiate()
    long_way()
    for grad, wanted in zip(direct, differentiate(), strict=True):
        assert torch.equal(grad, wanted)
    assert not direct[4].any() and not direct[5].any()


def test_no_gradient_comes_of_none(taken: list[str]) -> None:
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: Tensor) -> Tensor:
            return tensor.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    h = torch.randn(4, 5, requires_grad=True)
    Stop.apply(SF.steer(h, torch.randn(3, 5), None, torch.randn(3, 5), torch.tensor(0.5))[0]).sum().backward()
    assert h.grad is None and taken == ["forward"]


def test_a_tracer_before_the_dispatcher_sees_the_operator(taken: list[str]) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    arguments = torch.randn(4, 5), torch.randn(3, 5), torch.randn(3), torch.randn(3, 5), torch.tensor(0.5)
    graph = make_fx(lambda *tensors: SF.steer(*tensors), pre_dispatch=True)(*arguments)
    assert taken == [] and "steermoe.steer.default" in {str(node.target) for node in graph.graph.nodes}
    others = tuple(torch.randn_like(argument) for argument in arguments)
    for output, expected in zip(graph(*others), SF.steer(*others), strict=True):
        assert torch.equal(output, expected)


def test_second_derivatives_are_refused(taken: list[str]) -> None:
    h, weight, vectors = torch.randn(4, 5, requires_grad=True), torch.randn(3, 5), torch.randn(3, 5)
    y, _ = SF.steer(h, weight, None, vectors, torch.tensor(0.5))
    (grad,) = torch.autograd.grad(y, h, torch.randn(4, 5, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()
    assert taken == ["forward"]


# --- results are tensors like any other ---------------------------------------------------------------------------------------------------


def test_results_are_ordinary_tensors() -> None:
    arguments = torch.randn(40, 5), torch.randn(3, 5), None, torch.randn(3, 5), torch.tensor(0.5)
    y, gates = SF.steer(*arguments)
    assert type(y) is Tensor and not y._is_view() and y.is_leaf and y.data_ptr() % 64 == 0 == gates.data_ptr() % 64
    for twin in (copy.deepcopy(y), pickle.loads(pickle.dumps(y)), torch.from_numpy(y.numpy().copy())):
        assert torch.equal(twin, y)
    before = y.clone()
    y.add_(1)
    assert torch.equal(y, before + 1)
    shared = y.share_memory_()
    assert shared.is_shared() and torch.equal(shared, before + 1)


def _large() -> tuple[Tensor, ...]:
    """Of a size that is kept: 35.2 MB."""
    return torch.randn(9000, 1024), torch.randn(2, 1024), None, torch.randn(2, 1024), torch.tensor(0.5)


def test_memory_is_used_again_but_not_while_it_is_in_use() -> None:
    arguments = _large()
    first, _ = SF.steer(*arguments)
    kept, place = first.clone(), first.data_ptr()
    others = [SF.steer(torch.zeros_like(arguments[0]), *arguments[1:])[0] for _ in range(3)]
    assert len({place, *(other.data_ptr() for other in others)}) == 4
    assert torch.equal(first, kept)
    view = first[5:7]
    del first
    assert SF.steer(*arguments)[0].data_ptr() != place, "a view still needs it"
    assert torch.equal(view, kept[5:7])
    del view
    assert SF.steer(*arguments)[0].data_ptr() == place


def test_memory_of_another_size_is_left_for_its_own() -> None:
    h, *rest = _large()
    place = SF.steer(h, *rest)[0].data_ptr()
    longer = SF.steer(torch.cat((h, h)), *rest)[0]
    assert longer.data_ptr() != place, "it is too short"
    place = longer.data_ptr()
    del longer
    first, second = SF.steer(h, *rest)[0], SF.steer(h, *rest)[0]
    assert place not in (first.data_ptr(), second.data_ptr()), "it is much too long"
    assert SF.steer(torch.cat((h, h))[:17000], *rest)[0].data_ptr() == place, "a little shorter fits"


@pytest.mark.parametrize("frames", [4, 256])
def test_smaller_results_are_left_to_the_c_library(frames: int) -> None:
    before = cpu._core().kept_bytes()
    SF.steer(torch.randn(frames, 1024), torch.randn(3, 1024), None, torch.randn(3, 1024), torch.tensor(0.5))
    assert cpu._core().kept_bytes() == before


@pytest.mark.parametrize("megabytes, kept", [("0", 0), ("40", 35), ("100", 70), ("1000", 105), ("nonsense", 0), (str(10**17), 105)])
def test_how_much_is_kept_has_a_limit(megabytes: str, kept: int) -> None:
    """Three results of 35.2 MB."""
    program = (
        "import torch; from steermoe_kernels import functional as SF; from steermoe_kernels.backends import cpu\n"
        "def run(): return SF.steer(torch.zeros(9000, 1024), torch.zeros(2, 1024), None, torch.zeros(2, 1024), torch.tensor(0.5))[0]\n"
        "results = [run() for _ in range(3)]; assert cpu._core().kept_bytes() == 0\n"
        "del results; print(cpu._core().kept_bytes() >> 20)"
    )
    environment = os.environ | {"STEERMOE_KEEP_MB": megabytes}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == kept


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="no way to make the C library give memory back")
def test_results_of_one_clip_after_another_cost_no_page_faults() -> None:
    """Whatever the C library gives back to the system meanwhile: 30 s through Whisper-large, whose stream takes 1875 pages of 4 kB."""
    program = (
        "import ctypes, resource, torch; from steermoe_kernels import functional as SF\n"
        "arguments = torch.zeros(1500, 1280), torch.zeros(2, 1280), None, torch.zeros(2, 1280), torch.tensor(0.5)\n"
        "faults = []\n"
        "for _ in range(20):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    y, _ = SF.steer(*arguments); del y\n"
        "    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
        "    ctypes.CDLL(None).malloc_trim(0)\n"
        "print(sorted(faults)[10])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no way to ask how much memory is in use")
def test_where_there_is_no_memory() -> None:
    """Torch says so, in its words, and only after what was kept for later has been given up."""
    program = (
        "import resource, torch; from steermoe_kernels import functional as SF; from steermoe_kernels.backends import cpu\n"
        "torch.set_num_threads(1); h = torch.zeros(40000, 512); rest = torch.zeros(2, 512), None, torch.zeros(2, 512), torch.tensor(0.5)\n"
        "SF.steer(h, *rest); assert cpu._core().kept_bytes() >= h.nbytes\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, used + 2**24))\n"
        "y, _ = SF.steer(h[:25000], *rest); assert cpu._core().kept_bytes() == 0\n"
        "try: SF.steer(h, *rest)\n"
        "except RuntimeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "DefaultCPUAllocator" in done.stdout


def test_threads_that_come_first_do_not_wait_for_each_other() -> None:
    """The first call imports something, in which another thread may get its turn."""
    program = (
        "import builtins, threading, time, torch; from steermoe_kernels import functional as SF\n"
        "arguments = torch.randn(4, 5), torch.randn(3, 5), None, torch.randn(3, 5), torch.tensor(0.5)\n"
        "original = builtins.__import__\n"
        "def slow(*arguments, **named): time.sleep(0.05); return original(*arguments, **named)\n"
        "builtins.__import__ = slow\n"
        "threads = [threading.Thread(target=SF.steer, args=arguments) for _ in range(4)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_many_threads_at_once() -> None:
    problem = replace(Problem(batch=1, frames=300, width=1024, num_experts=2), norm="layer")
    inputs, incoming = draw(problem, torch.float32)
    expected = fused(problem, inputs, incoming, "cpu")
    wrong: list[str] = []

    def work() -> None:
        for _ in range(20):
            got = fused(problem, inputs, incoming, "cpu")
            wrong.extend(name for name in expected if not torch.equal(got[name], expected[name]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_goes_on() -> None:
    program = (
        "import os, torch; from steermoe_kernels import functional as SF\n"
        "torch.set_num_threads(1)\n"  # OpenMP's threads do not survive a fork
        "h = torch.randn(9000, 1024); rest = torch.randn(2, 1024), None, torch.randn(2, 1024), torch.tensor(0.5)\n"
        "y, _ = SF.steer(h, *rest); SF.steer(h, *rest)\n"
        "child = os.fork()\n"
        "again, _ = SF.steer(h, *rest)\n"
        "assert torch.equal(again, y)\n"
        "if child == 0: os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_where_there_is_no_direct_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not cpu._core().connect_tensors(int, float), "a torch that shows no tensors"
    assert cpu.direct(Options(), True) is not None
    monkeypatch.setenv("STEERMOE_DIRECT", "0")
    assert cpu.direct(Options(), True) is None
    eager.forget_ways()
    assert eager._direct_way(torch.device("cpu"), torch.float32, 3, None, "", 0.0, False, None, 1, None, True, "cpu") is None


def test_an_older_torch() -> None:
    """It shows no tensors, and does not tell who packs what is saved."""
    program = (
        "import torch\n"
        "del torch.Tensor.__dlpack_c_exchange_api__, torch._C._autograd._top_saved_tensors_default_hooks\n"
        "from steermoe_kernels import functional as SF\n"
        "h = torch.randn(4, 5, requires_grad=True)\n"
        "SF.steer(h, torch.randn(3, 5), None, torch.randn(3, 5), torch.tensor(0.5))[0].sum().backward()\n"
        "assert h.grad.any()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_backend_without_a_direct_way() -> None:
    assert not hasattr(get_backend("reference"), "direct")
    eager.forget_ways()
    assert eager._direct_way(torch.device("cpu"), torch.float32, 3, None, "", 0.0, False, None, 1, None, True, "reference") is None


@pytest.mark.parametrize("direct", ["0", "1"])
def test_gradients_enabled_within_inference_mode_are_not_kept(monkeypatch: pytest.MonkeyPatch, direct: str) -> None:
    monkeypatch.setenv("STEERMOE_DIRECT", direct)
    inputs, _ = draw(Problem(frames=5, width=64, num_experts=8), torch.float32)
    expected = SF.steer(*(inputs[name].detach() for name in ("x", "weight", "bias", "vectors", "scale")))
    with torch.inference_mode(), torch.enable_grad():
        h = inputs["x"] + 0
        y, gates = SF.steer(h, *(inputs[name] for name in ("weight", "bias", "vectors", "scale")))
    assert torch.equal(y, expected[0]) and torch.equal(gates, expected[1]) and not y.requires_grad
