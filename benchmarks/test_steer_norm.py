"""Add the residual, steer, LayerNorm: what stands between two layers of a steered encoder, and `functional.steer_norm` in one pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from machine import DEVICE
from passes import CALLS, UNCOMPILED, Case, comparisons, prepared, suitable, unsuitable
from timing import Work

CASES = [
    *(Case(model, norm=True) for model in ("tiny", "small", "large-v3")),
    Case("large-v3", norm=True, num_experts=64),
    Case("large-v3", norm=True, top_k=2),
    Case("large-v3", norm=True, frames=50),
    Case("large-v3", norm=True, dtype=torch.bfloat16),
]
if DEVICE.type == "cuda":
    CASES += [Case("large-v3", norm=True, frames=24000, num_experts=experts, dtype=torch.bfloat16) for experts in (8, 64)]

QUICK = {(Case("large-v3", norm=True), "forward+backward"): UNCOMPILED}


@pytest.mark.parametrize("case, direction, variant", comparisons(CASES, QUICK))
def test_steer_norm(case: Case, direction: str, variant: str, compare: Callable[..., None]) -> None:
    if reason := unsuitable(case, variant):
        pytest.skip(reason)

    def make(variants: list[str]) -> Work:
        work, variants = prepared(case), suitable(case, variants)
        return Work({name: work.preparation(name, direction) for name in variants}, work.faults(variants), calls=CALLS)

    compare(f"steer_norm {case} {direction}", variant, make, case.info(direction, variant))
