"""What each variant keeps for its backward: bytes in ``extra_info``. The time beside it is the forward's that keeps them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from kept import kept_for_backward
from passes import UNCOMPILED, VARIANTS, Case, Pass, prepared, suitable, unsuitable
from timing import Work
from torch import Tensor

CASES = [
    Case("large-v3"),
    Case("large-v3", norm=True),
    Case("large-v3", norm=True, dtype=torch.bfloat16),
    Case("large-v3", norm=True, top_k=2),
    Case("tiny", norm=True),
]
QUICK = CASES[:2]


def params() -> list:
    return [
        pytest.param(
            case, variant, id=f"{_operator(case)}-{case}-{variant}", marks=[pytest.mark.quick] * (case in QUICK and variant in UNCOMPILED)
        )
        for case in CASES
        for variant in VARIANTS
    ]


def _operator(case: Case) -> str:
    return "steer_norm" if case.norm else "steer"


@pytest.mark.parametrize("case, variant", params())
def test_kept_for_backward(case: Case, variant: str, compare: Callable[..., None]) -> None:
    if reason := unsuitable(case, variant):
        pytest.skip(reason)

    def make(variants: list[str]) -> Work:
        work, notes = prepared(case), {}
        variants = suitable(case, variants)
        for name in variants:
            kept, with_output = kept_for_backward(partial(_stream, work, name), work.parameters(name))
            notes[name] = {"kept_bytes": kept, "kept_bytes_with_output": with_output}
        preparations = {name: partial(_recording, work, name) for name in variants}
        return Work(preparations, work.faults(variants), notes)

    info = case.info("forward", variant)
    del info["bytes_to_move"]
    compare(f"kept {_operator(case)} {case}", variant, make, info)


def _stream(work: Pass, variant: str) -> Tensor:
    """The steered stream ``y``, computed with its graph. LayerNorm's output is kept by nobody here; the next layer would see to that."""
    outputs = work.function(variant)(*work.streams[0])
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def _recording(work: Pass, variant: str) -> list[Callable[[], Tensor]]:
    return [partial(_stream, work, variant)]
