"""The Triton kernels, compiled for sm_80 and sm_90 with no GPU: no register spills up to 64 experts, no local memory, shared
memory that fits.

What is compiled are the launches of the backend itself. By default every kernel at every width and number of experts for both
architectures, each in one of the passes; ``-m slow`` compiles the full cross product with the passes, and sizes no encoder has.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import platform
from collections.abc import Iterator

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
NO_SPILLS = 64  # experts; beyond, all of a frame's experts do not fit into registers with a step of W or V, and some of them spill
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}

# What an encoder runs, in the dtypes and with the routings there are; `pooled` is its last layer's, and launches every kernel.
ENCODER = {
    "residual-layer": {"residual": True, "norm": "layer"},
    "float16": {"stream": torch.float16, "residual": True, "norm": "layer", "top_k": 2},
    "float32": {"stream": torch.float32, "residual": True, "norm": "layer"},
    "bfloat16-parameters": {"parameters": torch.bfloat16, "residual": True, "norm": "rms"},
}
POOLED = {
    "residual-layer-max": {"residual": True, "norm": "layer", "pool": "max", "trained_norm": True},
    "float32-layer-mean": {"stream": torch.float32, "norm": "layer", "pool": "mean", "trained_norm": True},
}
OTHERS = {
    "steer": {},
    "top-k": {"top_k": 2, "renormalize": False},
    "frozen": {"norm": "layer", "frozen": True},
    "trained-norm": {"residual": True, "norm": "rms", "trained_norm": True},
}
GROUPS = (ENCODER, POOLED, OTHERS)
PASSES = ENCODER | POOLED | OTHERS
ODD = [(1, 1), (33, 7), (512, 32), (1280, 128), (1280, 256), (4096, 8)]


def _usual() -> set[tuple]:
    """One pass for each width, number of experts and architecture: one of every group at a width, all of them in turn."""
    chosen, turns = set(), [itertools.cycle(group) for group in GROUPS]
    for (i, width), (j, num_experts), (k, architecture) in itertools.product(*map(enumerate, (WIDTHS, EXPERTS, ARCHITECTURES))):
        chosen.add((width, num_experts, architecture, next(turns[(i + j + k) % 3])))
    return chosen


def _cases() -> list:
    usual = _usual()
    cases = itertools.product(WIDTHS, EXPERTS, ARCHITECTURES, PASSES)
    marked = [(case, [] if case in usual else [pytest.mark.slow]) for case in cases]
    marked += [((*odd, architecture, name), [pytest.mark.slow]) for odd in ODD for architecture in ARCHITECTURES for name in POOLED]
    return [pytest.param(*case, marks=marks, id="D{}-E{}-sm{}-{}".format(*case)) for case, marks in marked]


@pytest.fixture(scope="module", autouse=True)
def _fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache that starts empty, and in which passes find the kernels they share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize("width, num_experts, architecture, name", _cases())
def test_nothing_spills(width: int, num_experts: int, architecture: int, name: str) -> None:
    problem = Problem(width, num_experts, **PASSES[name])
    spills = []
    for launch in launches_of(problem, "forward") + launches_of(problem, "backward"):
        used = compile_launch(launch, architecture)
        assert used.registers <= 255
        assert used.shared <= SHARED_MEMORY[architecture], f"{used} needs more shared memory than sm_{architecture} has"
        spills += [used] if used.stack or used.local else []
    if num_experts <= NO_SPILLS:
        assert not spills


def test_the_usual_passes_compile_every_kernel_at_every_size() -> None:
    """At every width and number of experts: the kernels of every step; and each pass at least twice."""
    usual = _usual()
    for width, architecture in itertools.product(WIDTHS, ARCHITECTURES):
        compiled = set()
        for width_, num_experts, architecture_, name in usual:
            if (width_, architecture_) == (width, architecture):
                problem = Problem(width, num_experts, **PASSES[name])
                compiled |= {launch.kernel.__name__ for direction in ("forward", "backward") for launch in launches_of(problem, direction)}
        assert len(compiled) == 6, (width, architecture, compiled)
    names = [name for *_, name in usual]
    assert len(usual) == len(WIDTHS) * len(EXPERTS) * len(ARCHITECTURES) and min(names.count(name) for name in PASSES) >= 2, names


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
