"""Outputs and every gradient of the fused operators, in every dtype: at most twice the error of the same formula in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_as_accurate, assert_errors_within, errors, join, stack
from problems import Problem, Tensors, device_for, draw, dtypes_of, exact, fused, interpreted, plain

from steermoe_kernels import available_backends
from steermoe_kernels import functional as SF

P = Problem

# Small enough for Triton's interpreter. Between them: every option, alone and in company, at odd sizes.
SMALL = [
    P(frames=1, width=1, num_experts=1),
    P(frames=7, width=1, num_experts=7, top_k=6, norm="rms"),
    P(frames=1, width=384, num_experts=2, top_k=1, norm="layer", residual=True),
    P(frames=7, width=1, num_experts=2, norm="layer", residual=True, eps=1.0),  # nothing but what the norm takes away
    P(frames=7, width=33, num_experts=1, norm="layer", norm_bias=False),
    P(frames=7, width=33, num_experts=2, top_k=1, renormalize=False),
    P(frames=7, width=33, num_experts=7, top_k=2, bias=False),
    P(frames=7, width=33, num_experts=7, top_k=7, norm="rms", residual=True, norm_weight=False, norm_bias=False),
    P(frames=7, width=33, num_experts=8, norm="layer", residual=True),
    P(frames=7, width=33, num_experts=8, top_k=1, norm="layer"),
    P(frames=7, width=33, num_experts=8, top_k=7, renormalize=False, norm="rms", residual=True),
    P(frames=7, width=33, num_experts=16, top_k=15, norm="layer", norm_weight=False, norm_bias=False),
    P(frames=7, width=33, num_experts=64, top_k=2, renormalize=False, norm="layer", norm_weight=False),
    P(frames=7, width=33, num_experts=128, top_k=127, norm="rms", norm_bias=False),
    P(frames=3, width=33, num_experts=256, top_k=2),
    P(batch=3, frames=7, num_experts=8, norm="layer", pool="max", pool_size=2, residual=True),
    P(batch=3, frames=7, num_experts=7, norm="layer", pool="mean", pool_size=2, top_k=2),
    P(batch=1, frames=7, num_experts=8, norm="rms", pool="max", pool_size=3, top_k=2, renormalize=False, residual=True),
    P(batch=1, frames=7, num_experts=2, norm="rms", pool="mean", pool_size=4, norm_weight=False),
    P(batch=3, frames=5, num_experts=8, norm="layer", pool="max", pool_size=9, norm_weight=False, norm_bias=False),
    P(batch=3, frames=5, num_experts=16, norm="layer", pool="mean", pool_size=9, bias=False, residual=True),
    P(batch=3, frames=4, num_experts=8, norm="rms", pool="max", pool_size=1, norm_bias=False),
    P(batch=2, frames=4, num_experts=8, norm="layer", pool="mean", pool_size=1),
    P(batch=3, frames=4, num_experts=8, norm="layer", residual=True, float32_parameters=True),
    P(batch=3, frames=5, num_experts=8, top_k=2, norm="rms", pool="max", pool_size=4, float32_parameters=True),
    P(batch=3, frames=4, num_experts=7, top_k=2, layout="permuted"),
    P(batch=3, frames=5, num_experts=8, norm="layer", residual=True, layout="permuted"),
    P(batch=3, frames=5, num_experts=8, norm="layer", pool="mean", pool_size=2, residual=True, layout="permuted"),
    P(batch=3, frames=5, num_experts=8, layout="expanded"),
    P(batch=3, frames=5, num_experts=8, top_k=2, norm="layer", residual=True, layout="expanded"),
    P(batch=3, frames=5, num_experts=8, norm="rms", pool="max", pool_size=2, layout="expanded"),
    P(num_experts=8, norm="layer", residual=True, incoming=("y",)),
    P(num_experts=8, norm="layer", residual=True, incoming=("normed",)),
    P(num_experts=8, norm="layer", residual=True, incoming=("gates",)),
    P(num_experts=8, top_k=2, renormalize=False, incoming=("gates",)),
    P(num_experts=8, incoming=("y",)),
    P(num_experts=8, norm="rms", pool="max", pool_size=3, incoming=("y",)),
    P(num_experts=8, norm="layer", pool="mean", pool_size=3, incoming=("normed",)),
    P(num_experts=8, norm="layer", residual=True, wanted=("x",)),
    P(num_experts=8, norm="layer", residual=True, wanted=("residual",)),
    P(num_experts=8, norm="layer", residual=True, wanted=("weight", "bias", "vectors", "scale")),
    P(num_experts=8, top_k=2, norm="layer", wanted=("norm_weight", "norm_bias")),
    P(num_experts=8, top_k=2, wanted=("vectors",)),
    P(num_experts=8, top_k=2, wanted=("scale",)),
    P(num_experts=8, top_k=2, renormalize=False, wanted=("weight",)),
    P(num_experts=8, norm="rms", wanted=("bias", "norm_weight")),
]

# Many experts in whole blocks of columns, and frames that fill no last block: the processor's matrix unit in bfloat16.
MATRIX_UNIT = [
    P(frames=193, width=64, num_experts=8),
    P(frames=223, width=128, num_experts=16, norm="layer"),
    P(frames=200, width=192, num_experts=17, top_k=3, renormalize=False),
    P(batch=3, frames=101, width=256, num_experts=64, norm="layer", residual=True),
    P(batch=2, frames=150, width=128, num_experts=33, norm="rms", pool="mean", pool_size=4, residual=True),
    P(batch=2, frames=150, width=64, num_experts=40, norm="layer", pool="max", pool_size=3, bias=False),
    P(frames=300, width=64, num_experts=32, norm="layer", incoming=("normed",)),
    P(frames=300, width=64, num_experts=32, incoming=("gates",)),
    P(frames=300, width=64, num_experts=32, wanted=("x",)),
    P(frames=300, width=64, num_experts=32, wanted=("vectors",)),
    P(frames=300, width=64, num_experts=32, wanted=("scale",)),
    P(frames=300, width=64, num_experts=32, wanted=("weight",)),
]

# Wide rows in whole blocks: dot products by turns with the mix, a last turn that is shorter, and experts too many to part a row.
BY_TURNS = [
    P(frames=50, width=832, num_experts=8),
    P(frames=13, width=768, num_experts=7, top_k=2),
    P(batch=2, frames=90, width=1088, num_experts=16, norm="layer", pool="mean", pool_size=4),
    P(frames=31, width=832, num_experts=17, norm="rms"),
]

# The sizes at which blocks, tails and partial sums show; for kernels that run at full speed.
LARGE = [
    P(frames=1499, width=384, num_experts=8),
    P(frames=1499, width=33, num_experts=16, top_k=2, norm="layer", residual=True),
    P(frames=1499, width=1, num_experts=2, norm="rms"),
    P(frames=24000, width=33, num_experts=4, norm="layer", residual=True),
    P(batch=3, frames=50, width=1280, num_experts=8, norm="layer", residual=True),
    P(batch=3, frames=50, width=1280, num_experts=8, top_k=2, norm="layer", pool="mean", pool_size=4, residual=True),
    P(batch=1, frames=1499, width=384, num_experts=8, norm="layer", pool="max", pool_size=4, residual=True, float32_parameters=True),
    P(frames=50, width=1280, num_experts=64, top_k=2, norm="layer", residual=True, float32_parameters=True),
    P(frames=50, width=1280, num_experts=16, top_k=1, renormalize=False, norm="rms", layout="permuted"),
    P(frames=50, width=384, num_experts=128, top_k=128, norm="layer", norm_bias=False),
    P(frames=50, width=384, num_experts=256, norm="layer", residual=True),
    P(frames=50, width=384, num_experts=256, top_k=255, renormalize=False),
    P(frames=50, width=1280, num_experts=128, top_k=2),
    P(frames=50, width=1280, num_experts=7, top_k=6, norm="rms", norm_weight=False),
    P(frames=1, width=1280, num_experts=1, norm="layer"),
    *MATRIX_UNIT,
    # Eight experts in whole blocks of columns: their backward in strips, of rows that are left over, and what has no stream's gradient.
    P(frames=2, width=64, num_experts=8),
    P(frames=77, width=128, num_experts=8, top_k=2, norm="rms", residual=True, float32_parameters=True),
    P(batch=2, frames=49, width=64, num_experts=8, norm="layer", pool="max", pool_size=4),
    P(frames=77, width=128, num_experts=8, norm="layer", incoming=("normed",)),
    P(frames=77, width=128, num_experts=8, incoming=("gates",)),
    P(frames=77, width=128, num_experts=8, wanted=("x", "vectors")),
    P(frames=77, width=128, num_experts=8, wanted=("weight", "vectors")),
    *BY_TURNS,
    # More tiles than a GPU has room for at once: each block takes several, and copies one while it computes another.
    P(frames=9001, width=40, num_experts=7, top_k=2, norm="layer", residual=True),
    P(batch=2, frames=6001, width=40, num_experts=20, norm="rms", pool="mean", pool_size=3),
]


def _runs() -> list:
    """Every problem in every dtype on every backend, the backends innermost: they share what they are compared with."""
    homes = {backend: device_for(backend) for backend in available_backends()}
    runs = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for problem in SMALL + LARGE:
            for backend, device in homes.items():
                if dtype in dtypes_of(backend, device) and (problem in SMALL or not interpreted(backend)):
                    runs.append(pytest.param(backend, dtype, problem, id=f"{backend}-{str(dtype)[6:]}-{problem}"))
    return runs


@pytest.mark.parametrize("backend, dtype, problem", _runs())
def test_outputs_and_gradients(backend: str, dtype: torch.dtype, problem: Problem, device: torch.device) -> None:
    draws, truth, allowed = _expected(problem, dtype, device, count=1 if interpreted(backend) else 4 if problem in SMALL else 2)
    results = [fused(problem, *drawn, backend) for drawn in draws]
    for name, result in results[0].items():
        expected = torch.promote_types(dtype, torch.float32) if name == "gates" else dtype
        assert result.dtype == (draws[0][0][name[1:]].dtype if name.startswith("d") else expected), name
    assert_errors_within(allowed, stack(results), truth, dtype)


@pytest.mark.parametrize("axis, sizes", [("width", range(2, 70)), ("frames", range(1, 40)), ("num_experts", range(1, 40))])
def test_every_size(backend: str, device: torch.device, axis: str, sizes: range) -> None:
    """Whatever is left over when rows, columns or experts are taken several at a time: all sizes of one axis, judged together."""
    for dtype in dtypes_of(backend, device):
        results, compared = [], []
        for size in sizes[: 5 if interpreted(backend) else None]:
            problem = replace(P(batch=2, frames=3, num_experts=5, norm="layer", residual=True, eps=0.1), **{axis: size})  # type: ignore[arg-type]
            drawn = draw(problem, dtype, device, seed=size)
            results.append(fused(problem, *drawn, backend))
            compared.append(_compared(problem, *drawn))
        truth, *others = (join(way) for way in zip(*compared, strict=True))
        assert_errors_within(_allowed(truth, *others), join(results), truth, dtype)


def test_float32_parameters_are_not_rounded_to_a_half_stream(backend: str, device: torch.device) -> None:
    """The gates, which are float32, are those of float32 parameters: as exact as plain PyTorch in float32 on the same stream."""
    for dtype in (dtype for dtype in dtypes_of(backend, device) if dtype.itemsize == 2):
        for width in (33, 384):
            problem = P(frames=3, width=width, num_experts=8, norm="layer", residual=True, float32_parameters=True)
            inputs, incoming = draw(problem, dtype, device)
            truth, usual, *_ = _compared(problem, _as_float32(inputs), _as_float32(incoming))
            gates = {"gates": fused(problem, inputs, incoming, backend)["gates"]}
            assert_errors_within(_allowed({"gates": truth["gates"]}, usual), gates, {"gates": truth["gates"]}, torch.float32)


def test_steering_larger_than_the_stream(backend: str, device: torch.device) -> None:
    """The backward undoes the step from the rounded ``y``, which must not show while the steering is a few times the stream. In float32
    the GPU kernels, which subtract sums over all frames instead of undoing each, are held to steering of the stream's size."""
    problem = P(frames=100 if interpreted(backend) else 700, width=33, num_experts=8, norm="layer", residual=True)
    for dtype in dtypes_of(backend, device):
        times = 3 if dtype.itemsize == 2 else 1 if device.type == "cuda" or interpreted(backend) else 5
        assert_accurate_with_large_steering(backend, problem, dtype, device, times)


def assert_accurate_with_large_steering(backend: str, problem: Problem, dtype: torch.dtype, device: torch.device, times: float) -> None:
    """Steering vectors that change a frame by about ``times`` its size."""
    results, compared = [], []
    for seed in range(4):
        inputs, incoming = draw(problem, dtype, device, seed)
        with torch.no_grad():
            inputs["vectors"] *= times / inputs["scale"]
        results.append(fused(problem, inputs, incoming, backend))
        compared.append(_compared(problem, inputs, incoming))
    truth, *others = (stack(way) for way in zip(*compared, strict=True))
    assert_errors_within(_allowed(truth, *others), stack(results), truth, dtype)


@pytest.mark.parametrize("level", ["amx", "avx512bf16", "avx512", "avx2", "portable"])
def test_frames_far_from_zero(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    """Where a frame's mean is large against its deviation, the CPU's LayerNorm stays as exact as plain PyTorch's."""
    monkeypatch.setenv("STEERMOE_SIMD", level)
    if "cpu" not in available_backends():
        pytest.skip(f"no {level} here")
    generator = torch.Generator().manual_seed(0)
    means, noise = 10 * torch.randn(200, 1, generator=generator), 0.01 * torch.randn(1280, generator=generator)
    nothing = torch.zeros(1, 1280)
    for x in (means + noise, means.expand(200, 1280)):  # frames that are one number throughout have nothing left
        _, normed, _ = SF.steer_norm(x, nothing, None, nothing, 0.0, None, None, backend="cpu")
        truth, usual = (F.layer_norm(frames, (1280,)) for frames in (x.double(), x))
        assert_as_accurate({"normed": normed}, {"normed": usual}, {"normed": truth}, torch.float32)


def test_sums_over_very_many_frames() -> None:
    """The CPU's gradients of W and V round no more over 400,000 frames than over one: within 4e-8 of their norm, where rounding the true
    ones to float32 is about 2.5e-8 away, and one chain of additions from end to end about 5e-8."""
    problem = P(frames=400_000, width=8, num_experts=2, incoming=("y",), wanted=("weight", "vectors"))
    inputs, incoming = draw(problem, torch.float32)
    with torch.no_grad():  # means that let the sums grow to the end
        inputs["x"] += 1
        incoming["y"] += 1
    truth, results = exact(problem, inputs, incoming), fused(problem, inputs, incoming, "cpu")
    for name in ("dweight", "dvectors"):
        error = (results[name] - truth[name]).norm() / truth[name].norm()
        assert error < 4e-8, f"{name}: {error:.2g}"


@lru_cache(maxsize=1)
def _expected(
    problem: Problem, dtype: torch.dtype, device: torch.device, count: int
) -> tuple[list[tuple[Tensors, Tensors]], Tensors, dict[str, float]]:
    """Draws, their true results, and the error allowed of each result."""
    draws = [draw(problem, dtype, device, seed) for seed in range(count)]
    truth, *others = (stack(way) for way in zip(*(_compared(problem, *drawn) for drawn in draws), strict=True))
    return draws, truth, _allowed(truth, *others)


def _compared(problem: Problem, inputs: Tensors, incoming: Tensors) -> tuple[Tensors, ...]:
    """The truth and plain PyTorch's answer; in float64 both of the same numbers in float32, too."""
    pair = exact(problem, inputs, incoming), plain(problem, inputs, incoming)
    if inputs["x"].dtype != torch.float64:
        return pair
    inputs, incoming = _as_float32(inputs), _as_float32(incoming)
    return *pair, exact(problem, inputs, incoming), plain(problem, inputs, incoming)


def _allowed(truth: Tensors, usual: Tensors, *in_float32: Tensors) -> dict[str, float]:
    """Twice the error of plain PyTorch.

    In float64 the truth carries roundings of its own, so that twice plain PyTorch's error, often none, is no measure. What has to show
    is that nothing was done in float32: 20 of the 29 bits by which float64 is finer than what plain PyTorch makes of float32.
    """
    allowed = {name: 2 * error for name, error in errors(usual, truth).items()}
    if in_float32:
        coarse = errors(in_float32[1], in_float32[0])
        allowed = {name: max(bound, coarse[name] * 2**-20) for name, bound in allowed.items()}
    return allowed


def _as_float32(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().float().requires_grad_(tensor.requires_grad) for name, tensor in tensors.items()}
