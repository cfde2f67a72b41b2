"""The operator alone: the public formula, the best eager spelling, torch.compile of that, and `functional.steer`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from machine import DEVICE
from passes import CALLS, UNCOMPILED, VARIANTS, Case, comparisons, prepared, suitable, unsuitable
from timing import Work

CASES = [
    *(Case(model) for model in ("tiny", "base", "small", "medium", "large-v3")),
    Case("large-v3", num_experts=16),
    Case("large-v3", num_experts=64),
    Case("large-v3", top_k=2),
    Case("large-v3", frames=50),
    *(Case(model, dtype=torch.bfloat16) for model in ("tiny", "large-v3")),
]
if DEVICE.type == "cuda":
    CASES += [Case("large-v3", frames=24000, num_experts=experts, dtype=torch.bfloat16) for experts in (8, 64)]

QUICK = {
    (Case("tiny"), "forward"): VARIANTS,
    (Case("large-v3"), "forward"): UNCOMPILED,
    (Case("large-v3"), "forward+backward"): UNCOMPILED,
}


@pytest.mark.parametrize("case, direction, variant", comparisons(CASES, QUICK))
def test_steer(case: Case, direction: str, variant: str, compare: Callable[..., None]) -> None:
    if reason := unsuitable(case, variant):
        pytest.skip(reason)

    def make(variants: list[str]) -> Work:
        work, variants = prepared(case), suitable(case, variants)
        return Work({name: work.preparation(name, direction) for name in variants}, work.faults(variants), calls=CALLS)

    compare(f"steer {case} {direction}", variant, make, case.info(direction, variant))
