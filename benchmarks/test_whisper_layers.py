"""A stack of Whisper encoder layers: unsteered, steered by the public formula and by the best eager one, steered by `steer_encoder`.

transformers' encoder with random weights, frozen; the training step is forward and backward to the aligner's parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from kept import kept_for_backward
from machine import DEVICE
from stacks import FRAMES, Encoders, Stack
from timing import Work

from steermoe_kernels.backends import select_backend
from steermoe_kernels.choice import Shape

pytest.importorskip("transformers", reason="the Whisper layers are transformers'")

VARIANTS = {
    "forward": ("unsteered", "unsteered_compiled", "public", "eager", "ours"),
    "training step": ("public", "eager", "ours"),
}
QUICK = Stack("tiny", 1)
if DEVICE.type == "cuda":
    CASES = [QUICK, *(Stack("large-v3", 32, batch, torch.bfloat16) for batch in (1, 16))]
else:  # two layers of the large one tell as much, and thirty-two take minutes
    CASES = [QUICK, Stack("tiny", 4), Stack("large-v3", 2)]


def params() -> list:
    found = []
    for case in CASES:
        for direction, variants in VARIANTS.items():
            for variant in variants:
                quick = case == QUICK and direction == "forward" and variant != "unsteered_compiled"
                name = f"{case}-{direction.replace(' ', '_')}-{variant}"
                found.append(pytest.param(case, direction, variant, id=name, marks=[pytest.mark.quick] * quick))
    return found


@pytest.mark.parametrize("case, direction, variant", params())
def test_whisper_layers(case: Stack, direction: str, variant: str, compare: Callable[..., None]) -> None:
    info = {
        "variant": variant,
        "direction": direction,
        "dtype": str(case.dtype).removeprefix("torch."),
        "model": case.model,
        "N": case.batch * FRAMES,
        "D": case.width,
        "E": 8,
        "L": case.num_layers,
        "device": DEVICE.type,
    }
    if variant == "ours":
        shape = Shape(8, case.batch * FRAMES, case.width)
        info["backend"] = select_backend("auto", DEVICE, case.dtype, shape).__name__.rpartition(".")[2]
    compare(f"whisper {case} {direction}", variant, partial(_make, case, direction), info)


def _make(case: Stack, direction: str, variants: list[str]) -> Work:
    stack = Encoders(case)
    faults = stack.faults([name for name in variants if not name.startswith("unsteered")], direction)
    notes = {}
    if direction == "training step":
        for name in variants:
            kept, with_output = kept_for_backward(partial(stack.run, name), stack.encoders[name].parameters())
            notes[name] = {"kept_bytes": kept, "kept_bytes_with_output": with_output}
    preparations = {name: stack.preparation(name, direction) for name in variants}
    return Work(preparations, faults, notes, queued=False)
