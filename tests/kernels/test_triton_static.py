"""The Triton kernels, compiled for sm_80 and sm_90 with no GPU: no register spills, no local memory, shared memory that fits.

What is compiled are the launches of the backend itself. By default a few passes that cover every width and number of experts; ``-m slow``
compiles the full cross product, in which wide rows and many experts still spill (see `SPILLING`).
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import platform

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)
if platform.system() != "Linux":
    pytest.skip("Triton's assembler comes with its Linux wheels", allow_module_level=True)

from steermoe_kernels.backends.triton.static import Problem, compile_launch, launches_of

WIDTHS, EXPERTS, ARCHITECTURES = (384, 768, 1024, 1280), (8, 16, 64), (80, 90)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}

# steer alone; the encoder's pass, and its last layer's; the stream in float32, parameters in bfloat16, a selection; a frozen aligner.
PASSES = {
    "steer": {},
    "residual-layer": {"residual": True, "norm": "layer"},
    "residual-layer-max": {"residual": True, "norm": "layer", "pool": "max"},
    "float32": {"stream": torch.float32, "residual": True, "norm": "layer"},
    "bfloat16-parameters": {"parameters": torch.bfloat16, "residual": True, "norm": "rms"},
    "top-k": {"top_k": 2, "renormalize": False},
    "frozen": {"norm": "layer", "frozen": True},
}


USUAL = {
    (384, 8, 80, "residual-layer"),
    (384, 64, 90, "steer"),
    (768, 16, 90, "residual-layer"),
    (1024, 8, 80, "steer"),
    (1280, 8, 90, "steer"),
}
# Passes whose tiles do not fit: some 8 to 600 bytes a thread go to the stack. Strict, so that an entry goes when its spill does.
SPILLING = {
    (768, 16, 90, "residual-layer", "forward"),
    (768, 16, 90, "residual-layer", "backward"),
}


def _cases() -> list:
    cases = []
    for case in itertools.product(WIDTHS, EXPERTS, ARCHITECTURES, PASSES, ("forward", "backward")):
        width, num_experts, architecture, name, direction = case
        marks = [] if case[:4] in USUAL else [pytest.mark.slow]
        if case in SPILLING:
            marks.append(pytest.mark.xfail(raises=AssertionError, strict=True, reason="registers spill"))
        cases.append(pytest.param(*case, marks=marks, id=f"D{width}-E{num_experts}-sm{architecture}-{name}-{direction}"))
    return cases


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("width, num_experts, architecture, name, direction", _cases())
def test_nothing_spills(width: int, num_experts: int, architecture: int, name: str, direction: str) -> None:
    launches = launches_of(Problem(width, num_experts, **PASSES[name]), direction)
    assert launches
    for launch in launches:
        used = compile_launch(launch, architecture)
        assert used.stack == used.local == 0, f"{used} spills"
        assert used.registers <= 255
        assert used.shared <= SHARED_MEMORY[architecture], f"{used} needs more shared memory than sm_{architecture} has"


def test_the_number_of_frames_changes_no_kernel() -> None:
    """One compilation serves every length: nothing compiled in may depend on it."""
    from steermoe_kernels.backends import Options
    from steermoe_kernels.backends.triton.launches import prepare_forward

    def constants(frames: int) -> list:
        meta = {"device": "meta"}
        x = torch.empty(1, frames, 384, dtype=torch.bfloat16, **meta)
        parameters = [torch.empty(shape, **meta) for shape in ((8, 384), (8,), (8, 384), (), (384,), (384,))]
        options = Options("layer", 1e-5, "", 1, 8, True, 8)
        return [launch.constants for launch in prepare_forward(x, None, *parameters, options)[1]]

    assert constants(7) == constants(1499)
