"""The C++ kernels in csrc/cpu, by way of the compiled module ``steermoe_kernels._cpu``.

The instruction set is chosen at run time (AVX-512 with or without bfloat16 dot products and AMX, AVX2, portable); STEERMOE_SIMD
names another one. Threads are torch's: as many as `torch.get_num_threads`, from the OpenMP runtime torch has loaded.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..compiled import DirectWay, address, backward_results, direct_way, forward_results, problem
from . import PLAIN, Options

AUTO_DEVICES = frozenset({"cpu"})
PRIORITY = 10


@cache
def _core() -> ModuleType:
    return importlib.import_module("steermoe_kernels._cpu")


def unavailable() -> str | None:
    try:
        core = _core()
    except ImportError as error:
        return f"the compiled module is missing (installed with STEERMOE_CPU=0, or not built): {error}"
    if (level := os.environ.get("STEERMOE_SIMD", "")) and not core.has_level(level):
        here = " ".join(name for name in core.build_info()["simd levels"].split() if core.has_level(name))
        return f"STEERMOE_SIMD={level} names no instruction set that this build and this processor have: {here}"
    return None


def rejects(device: torch.device, dtype: torch.dtype, options: Options = PLAIN) -> str | None:
    return None if device.type == "cpu" else f"it takes tensors on the CPU, got {device}"


def direct(options: Options, automatic: bool) -> DirectWay | None:
    return None if unavailable() is not None else direct_way(_core(), options, automatic)


def _threading() -> tuple[int, str]:
    return torch.get_num_threads(), os.environ.get("STEERMOE_SIMD", "")


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
    y, normed, gates, probs, stats = forward_results(x, options)
    _core().forward(
        problem(_core(), x, options, weight, bias, vectors, scale, norm_weight, norm_bias),
        address(x),
        address(residual),
        address(y),
        address(normed),
        address(gates),
        address(probs),
        address(stats),
        *_threading(),
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
    results = backward_results(y, gates, weight, needs)
    _core().backward(
        problem(_core(), y, options, weight, None, vectors, scale, norm_weight, None),
        address(dy),
        address(dnormed),
        address(dgates),
        address(y),
        address(gates),
        address(probs),
        address(stats),
        [address(result) for result in results],
        *_threading(),
    )
    return tuple(results)
