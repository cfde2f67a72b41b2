"""Bitwise the same from run to run: outputs and every gradient, at sizes where the reductions are split."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from problems import Problem, draw, dtypes_of, fused, interpreted

from steermoe_kernels import available_backends
from steermoe_kernels.backends import cpu

needs_cpu = pytest.mark.skipif(cpu.unavailable() is not None, reason="the compiled module is not here")

PROBLEMS = [
    Problem(batch=2, frames=5, num_experts=8),
    Problem(batch=2, frames=5, num_experts=8, top_k=2, norm="layer", residual=True),
    Problem(batch=3, frames=7, num_experts=8, norm="rms", pool="max", pool_size=3),
    Problem(frames=1499, width=96, num_experts=8, norm="layer", residual=True),
    Problem(frames=1499, width=33, num_experts=16, top_k=2, renormalize=False),
    Problem(batch=2, frames=301, width=384, num_experts=64, top_k=2, norm="layer", pool="mean", pool_size=4),
]


@pytest.mark.unpoisoned  # torch's own deterministic mode would make the test easier than life
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_run_to_run(backend: str, device: torch.device, problem: Problem) -> None:
    if interpreted(backend) and problem.frames > 7:
        pytest.skip("too large for Triton's interpreter")
    for dtype in dtypes_of(backend, device):
        inputs, incoming = draw(problem, dtype, device)
        first = fused(problem, inputs, incoming, backend)
        for _ in range(2):
            again = fused(problem, inputs, incoming, backend)
            for name, tensor in first.items():
                assert torch.equal(tensor, again[name]), f"{name}, {dtype}"


@pytest.mark.unpoisoned
def test_no_gradient_depends_on_the_company_it_keeps(backend: str, device: torch.device) -> None:
    """Asking for fewer gradients changes none of the others."""
    problem = Problem(batch=2, frames=5, num_experts=8, top_k=2, norm="layer", residual=True)
    every = fused(problem, *draw(problem, torch.float32, device), backend)
    for name in problem.wanted:
        alone = replace(problem, wanted=(name,))
        results = fused(alone, *draw(alone, torch.float32, device), backend)
        assert torch.equal(results["d" + name], every["d" + name]), name


SHARED_OUT = [
    Problem(frames=1499, width=96, num_experts=8, norm="layer", residual=True),
    Problem(frames=301, width=1280, num_experts=128),  # too large for a copy of its parameters a thread
    Problem(batch=2, frames=301, width=64, num_experts=32, norm="layer", pool="mean", pool_size=4, residual=True),
    Problem(frames=501, width=128, num_experts=8, norm="layer", pool="mean", pool_size=3),  # shards begin anywhere within a tile of rows
    Problem(frames=501, width=128, num_experts=9, top_k=7, norm="layer", pool="mean", pool_size=3),
]


def _on_threads(problem: Problem, dtype: torch.dtype, threads: int) -> dict[str, torch.Tensor]:
    before = torch.get_num_threads()
    drawn = draw(problem, dtype, torch.device("cpu"))  # first: PyTorch's products change their bits with the threads
    torch.set_num_threads(threads)
    try:
        return fused(problem, *drawn, "cpu")
    finally:
        torch.set_num_threads(before)


@needs_cpu
@pytest.mark.parametrize("level", ["amx", "avx512bf16", "avx512", "avx2", "portable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("problem", SHARED_OUT, ids=str)
def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch, problem: Problem, dtype: torch.dtype, level: str) -> None:
    monkeypatch.setenv("STEERMOE_SIMD", level)
    if "cpu" not in available_backends():
        pytest.skip(f"no {level} here")
    one = _on_threads(problem, dtype, 1)
    for threads in (2, 3, 5):
        for name, tensor in _on_threads(problem, dtype, threads).items():
            assert torch.equal(tensor, one[name]), f"{name}, {threads} threads"


@needs_cpu
@pytest.mark.parametrize("granted", [1, 2])
def test_the_runtime_may_grant_fewer_threads(granted: int) -> None:
    """What is meant for those that do not come is done by the others."""
    program = (
        "import test_determinism as tests, torch\n"
        "for problem in tests.SHARED_OUT:\n"
        "    one, five = tests._on_threads(problem, tests.torch.float32, 1), tests._on_threads(problem, tests.torch.float32, 5)\n"
        "    assert all(torch.equal(five[name], one[name]) for name in one)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_THREAD_LIMIT": str(granted), "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=120)
