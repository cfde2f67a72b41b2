"""The CUDA kernels on an emulated GPU: the same sources, compiled for the host, every thread of them run (see cuda_emulator/emulator.h).

What this shows is that the kernels compute the right thing, whatever order their threads run in. What it cannot show is time.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_errors_within, stack
from problems import Problem, call, draw, fused
from test_accuracy import _allowed, _as_float32, _compared, assert_accurate_with_large_steering

from steermoe_kernels import eager, reference
from steermoe_kernels import functional as SF
from steermoe_kernels.backends import Options, get_backend

ROOT = Path(__file__).parents[2]
SOURCES, EMULATOR = ROOT / "csrc" / "cuda", Path(__file__).parent / "cuda_emulator"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))

if shutil.which(COMPILER[0]) is None:
    pytest.skip("there is no C++ compiler to build the emulated kernels with", allow_module_level=True)
if importlib.util.find_spec("pybind11") is None:
    pytest.skip("pybind11, which the emulated kernels are bound with, is not installed", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KIB = 1024
P = Problem


class Device:
    """The emulated GPU: its backend module's compiled part, and its controls."""

    def __init__(self, library: Path) -> None:
        spec = importlib.util.spec_from_file_location(library.stem, library)
        assert spec is not None and spec.loader is not None
        self.core = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.core)
        self._controls = ctypes.CDLL(str(library))
        self._controls.emulator_take_launched.restype = ctypes.c_char_p
        self._controls.emulator_set_machine.argtypes = [ctypes.c_int, ctypes.c_int64]

    def set_order(self, order: str, seed: int = 0) -> None:
        self._controls.emulator_set_order(("ascending", "descending", "random").index(order), seed)

    def set_machine(self, multiprocessors: int = 3, shared_bytes: int = 163 * KIB) -> None:
        """By default sm_80's shared memory, and few multiprocessors, so that small problems make several tiles a block."""
        self._controls.emulator_set_machine(multiprocessors, shared_bytes)

    def take_launched(self) -> list[str]:
        """Names of the kernels launched since the last call."""
        return [name for name, _ in self.take_grids()]

    def take_grids(self) -> list[tuple[str, int]]:
        """The same, with their numbers of blocks."""
        launches = (line.split() for line in self._controls.emulator_take_launched().decode().splitlines())
        return [(name, int(blocks)) for name, blocks in launches]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Device:
    import pybind11

    folder = tmp_path_factory.mktemp("emulated")
    includes = [f"-I{path}" for path in (EMULATOR, SOURCES, pybind11.get_include(), sysconfig.get_paths()["include"])]
    # Fibers jump between stacks, which fortified jumps refuse; products and sums are rounded where the kernels say.
    flags = ["-std=c++17", "-O1", "-fPIC", "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-DSTEER_MODULE=_cuda_emulated"]
    flags.append("-DSTEER_TENSORS_DEVICE=steer::Device::kCpu")  # its tensors are the CPU's
    bindings = [SOURCES / "bindings.cpp", SOURCES / "direct.cpp", SOURCES.parent / "tensors.cpp"]
    sources = [*sorted(SOURCES.glob("*.cu")), *bindings, EMULATOR / "emulator.cpp"]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run([*COMPILER, *flags, *includes, "-c", "-x", "c++", source, "-o", target], check=True, capture_output=True, text=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "_cuda_emulated.so"
    subprocess.run([*COMPILER, "-shared", *objects, "-o", library], check=True)
    return Device(library)


@pytest.fixture(autouse=True)
def device_in_place(emulated: Device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Backend "cuda" runs on the emulated device, and takes tensors on the CPU."""
    cuda = get_module()
    rejects = cuda.rejects

    def rejects_but_for_the_device(device: torch.device, dtype: torch.dtype, *options: Options) -> str | None:
        reason = rejects(device, dtype, *options)
        return None if reason == f"the stream must be on a CUDA device, got {device}" else reason

    monkeypatch.setattr(cuda, "_core", lambda: emulated.core)
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(cuda, "rejects", rejects_but_for_the_device)
    emulated.set_machine()
    emulated.set_order("ascending")
    emulated.take_launched()
    yield


def get_module() -> Any:
    from steermoe_kernels.backends import cuda

    return cuda


FAST = {"steer_forward_kernel", "steer_backward_kernel", "steer_reduction_kernel"}
AGAIN = FAST | {"steer_parameters_kernel"}
PLAIN = {"steer_forward_plain_kernel", "steer_backward_plain_kernel", "steer_parameters_plain_kernel", "steer_reduction_kernel"}

CASES = [
    (P(frames=37, width=40, num_experts=8), FAST),
    (P(frames=1, width=8, num_experts=1), FAST),
    (P(frames=37, width=136, num_experts=8, norm="layer", residual=True), FAST),
    (P(frames=37, width=136, num_experts=7, norm="layer", residual=True, float32_parameters=True), FAST),
    (P(frames=21, width=520, num_experts=5, top_k=2, norm="rms", norm_bias=False), FAST),
    (P(frames=21, width=136, num_experts=8, top_k=3, renormalize=False, bias=False, float32_parameters=True), FAST),
    (P(batch=3, frames=37, width=72, num_experts=8, norm="layer", pool="max", pool_size=4, residual=True), FAST),
    (P(batch=3, frames=11, width=72, num_experts=8, norm="rms", pool="mean", pool_size=3, float32_parameters=True), FAST),
    (P(batch=2, frames=5, width=72, num_experts=2, norm="layer", pool="max", pool_size=9), FAST),
    (P(frames=37, width=136, num_experts=20, norm="layer", residual=True, float32_parameters=True), AGAIN),
    (P(batch=2, frames=37, width=136, num_experts=64, top_k=2, norm="layer", pool="max", pool_size=4), AGAIN),
    (P(frames=21, width=72, num_experts=130, top_k=129, renormalize=False, norm="layer"), AGAIN),
    (P(frames=5, width=40, num_experts=256), AGAIN),
    (P(frames=5, width=1544, num_experts=8, norm="layer", residual=True), AGAIN),
    (P(frames=7, width=33, num_experts=8, norm="layer", residual=True), PLAIN),
    (P(batch=2, frames=7, width=33, num_experts=20, top_k=2, renormalize=False, norm="rms", pool="max", pool_size=3), PLAIN),
    (P(batch=1, frames=40, width=40, num_experts=8, norm="layer", pool="mean", pool_size=17), PLAIN),
    # Of the kernel for many sums: expert counts that fill their groups of eight and that do not, one group, whose frames are shared out,
    # tables that are copied by fours and one by one, tiles of 32 frames, of more than 16 and of fewer.
    (P(frames=33, width=72, num_experts=9, norm="layer", residual=True), AGAIN),
    (P(frames=50, width=104, num_experts=17, norm="rms", top_k=3, float32_parameters=True), AGAIN),
    (P(batch=2, frames=35, width=64, num_experts=33, norm="layer", pool="mean", pool_size=9), AGAIN),
    (P(frames=81, width=200, num_experts=64, norm="layer"), AGAIN),
    (P(frames=20, width=136, num_experts=65, top_k=65), AGAIN),
    (P(frames=39, width=72, num_experts=128, norm="layer", top_k=2, residual=True), AGAIN),
    (P(batch=2, frames=33, width=88, num_experts=256, norm="layer", pool="max", pool_size=2), AGAIN),
    (P(frames=49, width=1608, num_experts=3, norm="rms", float32_parameters=True), AGAIN),
    (P(batch=2, frames=20, width=1544, num_experts=7, norm="layer", pool="max", pool_size=3, top_k=2), AGAIN),
    (P(frames=18, width=1544, num_experts=8), AGAIN),
]
# Only some of the gradients, or of what they come from.
PARTS = [
    (P(frames=9, width=40, num_experts=8, norm="layer", residual=True, incoming=("y",)), FAST),
    (P(frames=9, width=40, num_experts=8, norm="layer", residual=True, incoming=("normed",)), FAST),
    (P(frames=9, width=40, num_experts=8, norm="layer", residual=True, incoming=("gates",)), FAST),
    (P(frames=9, width=40, num_experts=8, norm="layer", wanted=("x",)), FAST - {"steer_reduction_kernel"}),
    (P(frames=9, width=40, num_experts=8, norm="layer", wanted=("norm_weight", "norm_bias")), FAST),
    (P(frames=9, width=40, num_experts=20, wanted=("vectors",)), AGAIN),
    (P(frames=9, width=40, num_experts=20, norm="rms", wanted=("bias", "norm_weight")), AGAIN),
    (P(frames=9, width=40, num_experts=20, norm="layer", wanted=("scale", "weight")), AGAIN),
    (P(frames=40, width=40, num_experts=20, wanted=("weight",)), AGAIN),
    (P(frames=40, width=72, num_experts=64, norm="layer", incoming=("normed",), wanted=("vectors", "norm_bias")), AGAIN),
    (P(frames=40, width=72, num_experts=33, norm="layer", incoming=("gates",)), AGAIN),
    (P(frames=20, width=1544, num_experts=8, norm="layer", wanted=("vectors", "norm_weight")), AGAIN),
    (P(frames=9, width=33, num_experts=8, norm="rms", wanted=("scale", "bias", "norm_weight")), PLAIN),
    (P(frames=9, width=33, num_experts=8, wanted=("weight",)), PLAIN),
]


def _check(problem: Problem, dtype: torch.dtype, count: int = 4) -> None:
    draws = [draw(problem, dtype, seed=seed) for seed in range(count)]
    truth, usual = (stack(way) for way in zip(*(_compared(problem, *drawn) for drawn in draws), strict=True))
    assert_errors_within(_allowed(truth, usual), stack([fused(problem, *drawn, "cuda") for drawn in draws]), truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("problem, kernels", CASES + PARTS, ids=lambda value: str(value) if isinstance(value, Problem) else "")
def test_outputs_and_gradients(problem: Problem, kernels: set[str], dtype: torch.dtype, emulated: Device) -> None:
    emulated.set_order("random", 1)
    _check(problem, dtype)
    assert set(emulated.take_launched()) == kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    "problem",
    [
        P(frames=9, width=40, num_experts=8, norm="layer", residual=True),
        P(batch=2, frames=9, width=40, num_experts=20, top_k=2, renormalize=False, norm="rms", pool="max", pool_size=2),
        P(frames=9, width=33, num_experts=3, wanted=("vectors",)),
    ],
    ids=str,
)
def test_the_direct_way_gives_the_same_bits(problem: Problem, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """From tensors to tensors inside the compiled module, results and workspace from torch's allocator; and by way of Python."""
    inputs, incoming = draw(problem, dtype)
    with monkeypatch.context() as patched:
        for name in ("steer_forward", "steer_backward"):
            patched.delattr(get_module(), name)
        direct = fused(problem, inputs, incoming, "cuda")
    monkeypatch.setattr(eager, "steer_directly", lambda *arguments: None)
    usual = fused(problem, inputs, incoming, "cuda")
    for name, tensor in usual.items():
        assert direct[name].dtype == tensor.dtype and torch.equal(direct[name], tensor), name


def test_results_by_the_direct_way_lie_in_memory_that_torch_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Borrowed memory is passed over by `record_stream`, and handed out again while another stream still reads it."""
    monkeypatch.delattr(get_module(), "steer_forward")
    inputs, _ = draw(P(frames=9, width=40, num_experts=8, norm="layer"), torch.float32)
    for name, tensor in call(SF, P(norm="layer"), inputs, {"backend": "cuda"}).items():
        assert tensor.untyped_storage().resizable(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("width", [33, 40])
def test_steering_larger_than_the_stream(dtype: torch.dtype, width: int, emulated: Device) -> None:
    problem = P(frames=100, width=width, num_experts=8, norm="layer", residual=True)
    assert_accurate_with_large_steering("cuda", problem, dtype, torch.device("cpu"), times=3 if dtype.itemsize == 2 else 1)


@pytest.mark.parametrize("shared_kib", [227, 163, 99, 64, 48])
def test_whatever_fits_into_shared_memory(shared_kib: int, emulated: Device) -> None:
    """Tiles of fewer frames, one or two at a time: the same results. Of width 1280, sm_90 has room for 12 and, in float32, 6."""
    emulated.set_machine(2, shared_kib * KIB)
    for width, kernels in ((264, FAST), (1280, FAST), (1544, AGAIN)):
        problem = P(frames=29, width=width, num_experts=8, norm="layer", residual=True)
        _check(problem, torch.bfloat16, count=2)
        _check(problem, torch.float32, count=2)
        assert set(emulated.take_launched()) <= kernels | PLAIN


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    "problem, kernels",
    [
        (P(frames=150, width=40, num_experts=8, norm="layer", residual=True), FAST),
        (P(frames=150, width=264, num_experts=8, norm="layer", residual=True), FAST),
        (P(batch=2, frames=77, width=40, num_experts=20, norm="rms", pool="max", pool_size=3, top_k=2), AGAIN),
    ],
    ids=str,
)
@pytest.mark.parametrize("shared_kib", [163, 99])
def test_blocks_that_walk_over_many_tiles(
    problem: Problem, kernels: set[str], dtype: torch.dtype, shared_kib: int, emulated: Device
) -> None:
    """The next tile's copies come while this one is in use, to the room that the last one had."""
    emulated.set_machine(1, shared_kib * KIB)
    emulated.set_order("random", 3)
    _check(problem, dtype, count=1)
    assert set(emulated.take_launched()) == kernels


@pytest.mark.parametrize("wanted", [("x",), P.wanted], ids=len)
def test_blocks_that_hold_no_sums_fill_the_machine(wanted: tuple[str, ...], emulated: Device) -> None:
    """Their tiles are cut for two blocks a multiprocessor, which hide each other's copies."""
    emulated.set_machine(3, 163 * KIB)
    problem = P(frames=200, width=40, num_experts=20, norm="layer", residual=True, wanted=wanted)
    fused(problem, *draw(problem, torch.bfloat16), "cuda")
    grids = dict(emulated.take_grids())
    assert grids["steer_forward_kernel"] == grids["steer_backward_kernel"] == 2 * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("problem", [CASES[i][0] for i in (2, 6, 10, 11, 15, 19, 24)], ids=str)
def test_the_order_of_threads_changes_no_bit(problem: Problem, dtype: torch.dtype, emulated: Device) -> None:
    """A barrier that is missing, or a sum whose order is left to chance, would show."""
    inputs, incoming = draw(problem, dtype)
    runs = []
    for order, seed in (("ascending", 0), ("descending", 0), ("random", 1), ("random", 2)):
        emulated.set_order(order, seed)
        runs.append(fused(problem, inputs, incoming, "cuda"))
    for run in runs[1:]:
        assert all(torch.equal(run[name], first) for name, first in runs[0].items())


def test_float32_parameters_are_not_rounded_to_a_half_stream() -> None:
    """The gates, which are float32, are as exact as plain PyTorch's in float32 on the same stream."""
    for dtype in (torch.bfloat16, torch.float16):
        for width in (33, 384):
            problem = P(frames=3, width=width, num_experts=8, norm="layer", residual=True, float32_parameters=True)
            inputs, incoming = draw(problem, dtype)
            truth, usual = _compared(problem, _as_float32(inputs), _as_float32(incoming))
            gates = {"gates": fused(problem, inputs, incoming, "cuda")["gates"]}
            assert_errors_within(_allowed({"gates": truth["gates"]}, usual), gates, {"gates": truth["gates"]}, torch.float32)


@pytest.mark.parametrize("num_experts", [1, 2, 8, 40, 256])
def test_the_same_experts_as_the_reference(num_experts: int) -> None:
    """With ties, of both zeros too, in the fast kernels and the plain ones."""
    generator = torch.Generator().manual_seed(num_experts)
    logits = torch.randint(-2, 3, (5, num_experts), generator=generator).float()
    logits[2] = -0.0
    logits[2, ::2] = 0.0
    for width in (num_experts, -(-num_experts // 8) * 8):
        h = torch.zeros(5, width)
        h[:, :num_experts] = logits
        eye = torch.eye(num_experts, width)
        for top_k in {1, (num_experts + 1) // 2, num_experts}:
            _, gates = SF.steer(h, eye, None, torch.zeros_like(eye), 0.0, top_k=top_k, backend="cuda")
            assert torch.equal(gates != 0, reference.select_top_k(logits, top_k))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "problem",
    [
        P(batch=2, frames=18, width=40, num_experts=8, norm="layer", residual=True),
        P(batch=2, frames=7, width=40, num_experts=20, top_k=2, renormalize=False),
        P(batch=2, frames=7, width=40, num_experts=8, top_k=2, norm="rms", pool="max", pool_size=3),
    ],
    ids=str,
)
def test_a_bad_frame_stays_alone(problem: Problem, bad: float) -> None:
    window = problem.pool_size if problem.pool else 1
    for dtype in DTYPES:
        runs = []
        for value in (0.0, bad):
            inputs, incoming = draw(problem, dtype)
            with torch.no_grad():
                inputs["x"][1, 4, 5] = value
            runs.append(fused(problem, inputs, incoming, "cuda"))
        good, harmed = runs
        assert not harmed["y"][1, 4, 5].isfinite()
        frames = torch.ones(problem.batch, problem.frames, dtype=torch.bool)
        frames[1, 4] = False
        assert torch.equal(good["y"][frames], harmed["y"][frames]) and torch.equal(good["gates"][frames], harmed["gates"][frames])
        first = 4 // window * window
        frames[1, first : first + window] = False
        assert torch.equal(good["dx"][frames], harmed["dx"][frames])


def test_an_address_that_is_not_aligned_takes_the_plain_kernels(emulated: Device) -> None:
    problem = P(frames=9, width=40, num_experts=8, norm="layer")
    inputs, incoming = draw(problem, torch.bfloat16)
    moved = torch.empty(9 * 40 + 1, dtype=torch.bfloat16)[1:].view(1, 9, 40).copy_(inputs["x"].detach()).requires_grad_()
    assert moved.is_contiguous() and moved.data_ptr() % 16 != 0
    aligned, other = fused(problem, inputs, incoming, "cuda"), None
    assert "steer_forward_kernel" in emulated.take_launched()
    other = fused(problem, inputs | {"x": moved}, incoming, "cuda")
    assert "steer_forward_plain_kernel" in emulated.take_launched()
    for name, value in aligned.items():
        torch.testing.assert_close(other[name], value, rtol=0.05, atol=0.05)


def test_mixed_parameter_types(emulated: Device) -> None:
    """W in one type and V in another: the plain kernels read each as it is."""
    inputs, incoming = draw(P(frames=9, width=40, num_experts=8), torch.bfloat16)
    mixed = inputs | {
        "weight": inputs["weight"].detach().float().requires_grad_(),
        "bias": inputs["bias"].detach().double().requires_grad_(),
    }
    results = fused(P(frames=9, width=40, num_experts=8), mixed, incoming, "cuda")
    assert "steer_forward_plain_kernel" in emulated.take_launched()
    same = fused(P(frames=9, width=40, num_experts=8), inputs, incoming, "cuda")
    for name, value in same.items():
        torch.testing.assert_close(results[name].float(), value.float(), rtol=0.02, atol=0.02)


def test_more_experts_than_the_kernels_take() -> None:
    h, weight = torch.zeros(2, 8), torch.zeros(257, 8)
    for scale in (0.1, torch.tensor(0.1)):  # by the operator, and directly
        with pytest.raises(RuntimeError, match="backend 'cuda' cannot run this: it takes up to 256 experts, got 257"):
            SF.steer(h, weight, None, weight, scale, backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_the_fast_kernels_take_every_width_on_sm_80(dtype: torch.dtype, emulated: Device) -> None:
    """Up to 4096 columns and 256 experts, all that a pass can have: tiles fit into the 163 KiB a block may have."""
    emulated.set_machine(108)
    from steermoe_kernels.compiled import problem

    for width in (8, 384, 1024, 1280, 2048, 4096):
        for num_experts in (1, 8, 64, 256):
            for parameters in (torch.float32, dtype):
                x, weight = torch.empty(1, 1500, width, dtype=dtype), torch.empty(num_experts, width, dtype=parameters)
                options = Options(norm="layer", top_k=num_experts, num_experts=num_experts)
                call = problem(emulated.core, x, options, weight, None, weight, weight[0, 0], None, None)
                assert emulated.core.forward_path(call, [16] * 7, 0) == "fast"
                assert emulated.core.backward_path(call, [16] * 7, [16] * 7, 0) == "fast"
                assert emulated.core.forward_path(call, [16, 16, 24, *[16] * 4], 0) == "plain"


def test_get_backend_is_the_one_under_test(emulated: Device) -> None:
    assert get_backend("cuda")._core() is emulated.core
