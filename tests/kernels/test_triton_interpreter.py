"""The shared accuracy matrix on the Triton kernels, through Triton's interpreter: on machines without a GPU, too.

Triton decides when it is imported whether it interprets, so the matrix runs in a process of its own, and with it the tests below: the
sizes at which these kernels take several steps over the width, several tiles a program, or other tiles.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from closeness import assert_as_accurate
from problems import Problem, draw, exact, fused, plain

P = Problem
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

WIDE = [
    (torch.float16, P(frames=2, width=1280, num_experts=8, norm="layer", residual=True, float32_parameters=True)),
    (torch.float16, P(frames=1, width=1280, num_experts=64, top_k=2, norm="layer", residual=True, float32_parameters=True)),
    (torch.float32, P(frames=2, width=1280, num_experts=16, top_k=2, renormalize=False, norm="rms")),
    (torch.float16, P(batch=2, frames=3, width=260, num_experts=64, norm="layer", pool="max", pool_size=2, residual=True)),
    (torch.float32, P(batch=2, frames=3, width=768, num_experts=16, norm="layer", pool="mean", pool_size=2)),
    (torch.float16, P(frames=1, width=4096, num_experts=8, norm="layer", residual=True)),
    (torch.float32, P(frames=2, width=2049, num_experts=1, norm="layer")),
    (torch.float32, P(frames=2, width=130, num_experts=256, top_k=3, norm="layer", residual=True)),
    (torch.float32, P(frames=2, width=130, num_experts=32, norm="rms", residual=True)),
    # Several tiles a program, the last one short.
    (torch.float32, P(frames=100, width=33, num_experts=8, norm="layer", residual=True)),
    (torch.float16, P(frames=150, width=33, num_experts=64, top_k=5, norm="layer", residual=True)),
    (torch.float32, P(batch=2, frames=50, width=17, num_experts=16, norm="rms", pool="mean", pool_size=4)),
]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"), reason="this process runs the matrix on Triton by itself")
def test_the_accuracy_matrix_in_the_interpreter() -> None:
    matrix = [str(Path(__file__).with_name("test_accuracy.py")), __file__]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-rf", "-p", "no:cacheprovider", "-k", "triton", *matrix]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=900)
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None and int(passed[1]) > 90 + len(WIDE), run.stdout[-3000:] + run.stderr[-1000:]
    assert run.returncode == 0, run.stdout[-5000:]


@pytest.mark.skipif(not INTERPRETED, reason="runs in the process that the test above starts")
@pytest.mark.parametrize("dtype, problem", WIDE, ids=str)
def test_several_steps_and_tiles(dtype: torch.dtype, problem: Problem) -> None:
    inputs, incoming = draw(problem, dtype)
    truth = exact(problem, inputs, incoming)
    assert_as_accurate(fused(problem, inputs, incoming, "triton"), plain(problem, inputs, incoming), truth, dtype)


@pytest.mark.skipif(not INTERPRETED, reason="runs in the process that the test above starts")
@pytest.mark.parametrize("pool", [None, "max"])
def test_no_frames(pool: str | None) -> None:
    problem = P(frames=0, num_experts=8, norm="layer", residual=True, pool=pool, pool_size=2 if pool else 1)
    inputs, incoming = draw(problem, torch.float32)
    results = fused(problem, inputs, incoming, "triton")
    assert results["y"].shape == (1, 0, 33) and results["normed"].shape == (1, 0, 33) and results["gates"].shape == (1, 0, 8)
    assert all(not results[name].any() for name in ("dweight", "dbias", "dvectors", "dscale", "dnorm_weight", "dnorm_bias"))
