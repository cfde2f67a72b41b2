"""What only some processors run of the CPU's kernels, on any with AVX-512: the matrix unit (AMX) in software, and forward passes by turns.

The same sources, compiled with a model of the unit (matrix_unit/matrix_unit.h). What this cannot show is time.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_errors_within, stack
from problems import Problem, draw, fused
from test_accuracy import BY_TURNS, MATRIX_UNIT, _allowed, _compared
from test_determinism import SHARED_OUT, _on_threads

from steermoe_kernels import available_backends
from steermoe_kernels.backends import cpu

SOURCES, MODEL = Path(__file__).parents[2] / "csrc", Path(__file__).parent / "matrix_unit" / "matrix_unit.h"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))

if "cpu" not in available_backends() or not cpu._core().has_level("avx512bf16"):
    pytest.skip("the model of the matrix unit needs AVX-512 with bfloat16", allow_module_level=True)
if shutil.which(COMPILER[0]) is None:
    pytest.skip("there is no C++ compiler to build the kernels with", allow_module_level=True)
if importlib.util.find_spec("pybind11") is None:
    pytest.skip("pybind11, which the kernels are bound with, is not installed", allow_module_level=True)

FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512bf16")
P = Problem


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled module with one set of kernels, in the place of the portable ones."""
    import pybind11

    folder = tmp_path_factory.mktemp("modelled")
    flags = ["-std=c++17", "-O1", "-fPIC", "-fno-math-errno", "-fvisibility=hidden"]
    flags += [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    flags += [f'-DSTEER_{name}="modelled"' for name in ("COMPILER", "FLAGS", "LEVELS")]
    kernels = [*(f"-m{feature}" for feature in FEATURES), "-DSTEER_NAMESPACE=portable", "-include", str(MODEL)]
    sources = [*sorted(SOURCES.glob("*.cpp")), *sorted((SOURCES / "cpu").glob("*.cpp"))]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        more = kernels if source.stem == "kernels" else []
        subprocess.run([*COMPILER, *flags, *more, "-c", source, "-o", target], check=True, capture_output=True, text=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sorted(sources, key=lambda source: source.stem != "kernels")))  # what takes longest first
    library = folder / "_cpu.so"
    subprocess.run([*COMPILER, "-shared", *objects, "-o", library, "-ldl"], check=True)
    return library


@pytest.fixture(scope="module")
def core(library: Path) -> Any:
    loader = ExtensionFileLoader("modelled._cpu", str(library))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("modelled._cpu", loader))  # type: ignore[arg-type]
    loader.exec_module(module)
    return module


@pytest.fixture
def take_products(library: Path, core: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model is in place; how many products it has computed since the last call."""
    monkeypatch.setattr(cpu, "_core", lambda: core)
    take = ctypes.CDLL(str(library)).matrix_unit_take_products
    take.restype = ctypes.c_int64
    take()
    return take


def _check(problem: Problem, dtype: torch.dtype) -> None:
    draws = [draw(problem, dtype, seed=seed) for seed in range(2)]
    truth, *others = (stack(way) for way in zip(*(_compared(problem, *drawn) for drawn in draws), strict=True))
    assert_errors_within(_allowed(truth, *others), stack([fused(problem, *drawn, "cpu") for drawn in draws]), truth, dtype)


@pytest.mark.parametrize("problem", [*MATRIX_UNIT, P(frames=200, width=1280, num_experts=130, norm="layer", residual=True)], ids=str)
def test_outputs_and_gradients_by_the_matrix_unit(problem: Problem, take_products: Any) -> None:
    _check(problem, torch.bfloat16)
    assert take_products() > 0


@pytest.mark.parametrize(
    "problem, dtype",
    [
        (P(frames=191, width=64, num_experts=64), torch.bfloat16),
        (P(frames=192, width=80, num_experts=64), torch.bfloat16),
        (P(frames=192, width=64, num_experts=7), torch.bfloat16),
        (P(frames=192, width=64, num_experts=9, norm="layer", residual=True), torch.bfloat16),
        (P(frames=192, width=64, num_experts=64, float32_parameters=True), torch.bfloat16),
        (P(frames=192, width=64, num_experts=64), torch.float16),
    ],
    ids=str,
)
def test_what_the_matrix_unit_is_not_asked(problem: Problem, dtype: torch.dtype, take_products: Any) -> None:
    _check(problem, dtype)
    assert take_products() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("problem", [*BY_TURNS, P(frames=5, width=1280, num_experts=8), P(frames=1500, width=1280, num_experts=8)], ids=str)
def test_outputs_and_gradients_by_turns(problem: Problem, dtype: torch.dtype, take_products: Any) -> None:
    _check(problem, dtype)


@pytest.mark.parametrize("problem", [*BY_TURNS, P(frames=25, width=1280, num_experts=8, norm="layer")], ids=str)
def test_turns_change_no_bit(problem: Problem, core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that are put down between blocks of columns are taken up as they were: rows that take turns are those that do not."""
    inputs, incoming = draw(problem, torch.float32)
    whole = fused(problem, inputs, incoming, "cpu")
    monkeypatch.setattr(cpu, "_core", lambda: core)
    parted = fused(problem, inputs, incoming, "cpu")
    assert all(torch.equal(parted[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    "problem", [*SHARED_OUT, P(frames=301, width=832, num_experts=64), P(frames=301, width=832, num_experts=8)], ids=str
)
def test_threads_change_no_bit(problem: Problem, dtype: torch.dtype, take_products: Any) -> None:
    one = _on_threads(problem, dtype, 1)
    for threads in (2, 5):
        assert all(torch.equal(tensor, one[name]) for name, tensor in _on_threads(problem, dtype, threads).items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "problem, dtype",
    [
        (P(frames=200, width=128, num_experts=40, norm="layer", residual=True), torch.bfloat16),
        (P(frames=200, width=128, num_experts=40, top_k=2), torch.bfloat16),
        (P(frames=200, width=832, num_experts=8), torch.float32),
    ],
    ids=str,
)
def test_a_bad_frame_stays_alone(problem: Problem, dtype: torch.dtype, bad: float, take_products: Any) -> None:
    runs = []
    for value in (0.0, bad):
        inputs, incoming = draw(problem, dtype)
        with torch.no_grad():
            inputs["x"][0, 70, 5] = value
        runs.append(fused(problem, inputs, incoming, "cpu"))
    good, harmed = runs
    assert not harmed["y"][0, 70, 5].isfinite()
    others = torch.arange(problem.frames) != 70
    for name in {"y", "normed", "gates", "dx", "dresidual"} & good.keys():
        assert torch.equal(good[name][:, others], harmed[name][:, others]), name


def test_a_nan_of_nothing_but_ones_is_not_rounded_away(take_products: Any) -> None:
    """Cutting a number in two adds to its bits, and these have no room for more: they would come out as zero."""
    inputs, incoming = draw(P(frames=192, width=64, num_experts=16), torch.bfloat16)
    incoming["gates"] = incoming["gates"].float()
    incoming["gates"][0, 70] = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    dx = fused(P(num_experts=16), inputs, incoming, "cpu")["dx"]
    assert take_products() > 0
    assert dx[0, 70].isnan().all()
    assert dx[0, 69].isfinite().all()
