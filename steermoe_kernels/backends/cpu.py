"""The C++ kernels in csrc/cpu, by way of the compiled module ``steermoe_kernels._cpu``.

The instruction set is chosen at run time (AVX-512 with or without bfloat16 dot products, AVX2, portable); STEERMOE_SIMD names another
one. Threads are torch's: as many as `torch.get_num_threads`, from the OpenMP runtime torch has loaded.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..reference import compute_dtype
from . import Options

AUTO_DEVICES = frozenset({"cpu"})
PRIORITY = 10

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
_NORMS = {"": 0, "layer": 1, "rms": 2}
_POOLS = {"": 0, "max": 1, "mean": 2}


@cache
def _core() -> ModuleType:
    return importlib.import_module("steermoe_kernels._cpu")


def unavailable() -> str | None:
    try:
        core = _core()
    except ImportError as error:
        return f"the compiled module is missing (installed with STEERMOE_CPU=0, or not built): {error}"
    if (level := os.environ.get("STEERMOE_SIMD", "")) and not core.has_level(level):
        return f"STEERMOE_SIMD={level} names no instruction set of this build that this processor has: {core.build_info()['simd levels']}"
    return None


def rejects(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if device.type == "cpu" else f"it takes tensors on the CPU, got {device}"


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def _operand(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.data_ptr(), _DTYPES[tensor.dtype])


def _problem(
    y: Tensor,
    pooled: int,
    options: Options,
    weight: Tensor,
    bias: Tensor | None,
    vectors: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
) -> Any:
    batch, time, width = y.shape
    return _core().Problem(
        sizes=(batch, time, pooled, width, options.num_experts, options.top_k, options.pool_size if options.pool else 1),
        renormalize=options.renormalize,
        norm=_NORMS[options.norm],
        pool=_POOLS[options.pool],
        eps=options.eps,
        stream=_DTYPES[y.dtype],
        weight=_operand(weight),
        bias=_operand(bias),
        vectors=_operand(vectors),
        scale=_operand(scale),
        norm_weight=_operand(norm_weight),
        norm_bias=_operand(norm_bias),
    )


def _threading() -> dict[str, Any]:
    return {"threads": torch.get_num_threads(), "level": os.environ.get("STEERMOE_SIMD", "")}


def steer_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    vectors: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, time, width = x.shape
    dtype = compute_dtype(x.dtype)
    pooled = -(-time // options.pool_size) if options.pool else time
    y = torch.empty_like(x)
    gates = x.new_empty((batch, time, options.num_experts), dtype=dtype)
    probs = torch.empty_like(gates) if options.keeps_probs else gates.new_empty(0)
    normed = x.new_empty((batch, pooled, width) if options.norm else 0)
    stats = gates.new_empty((2, batch, pooled) if options.norm else 0)
    _core().forward(
        _problem(x, pooled, options, weight, bias, vectors, scale, norm_weight, norm_bias),
        x=_address(x),
        residual=_address(residual),
        y=_address(y),
        normed=_address(normed),
        gates=_address(gates),
        probs=_address(probs),
        stats=_address(stats),
        **_threading(),
    )
    return y, normed, gates, probs, stats


def steer_backward(
    dy: Tensor | None,
    dnormed: Tensor | None,
    dgates: Tensor | None,
    y: Tensor,
    gates: Tensor,
    probs: Tensor,
    stats: Tensor,
    weight: Tensor,
    vectors: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    options: Options,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    num_experts, width = weight.shape
    shapes = (y.shape, (num_experts, width), (num_experts,), (num_experts, width), (), (width,), (width,))
    dtypes = (y.dtype, *(gates.dtype,) * 6)
    results = [y.new_empty(shape, dtype=dtype) if need else None for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)]
    _core().backward(
        _problem(y, stats.shape[-1], options, weight, None, vectors, scale, norm_weight, None),
        dy=_address(dy),
        dnormed=_address(dnormed),
        dgates=_address(dgates),
        y=_address(y),
        gates=_address(gates),
        probs=_address(probs),
        stats=_address(stats),
        results=[_address(result) for result in results],
        **_threading(),
    )
    return tuple(results)
