"""Bitwise the same from run to run: outputs and every gradient, at sizes where the reductions are split."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import Problem, draw, dtypes_of, fused, interpreted

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
