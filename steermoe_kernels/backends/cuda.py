"""The CUDA C++ kernels in csrc/cuda, by way of the compiled module ``steermoe_kernels._cuda``.

The module sees addresses, sizes and a stream: everything it needs, results and workspace alike, is allocated here by torch, on torch's
current stream, so that CUDA graphs can capture a pass.
"""

from __future__ import annotations

import importlib
import re
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import Options

AUTO_DEVICES: frozenset[str] = frozenset()  # `steermoe_kernels.choice` alone lets it in
PRIORITY = 20

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
_STREAMS = (torch.float32, torch.float16, torch.bfloat16)
_NORMS = {"": 0, "layer": 1, "rms": 2}
_POOLS = {"": 0, "max": 1, "mean": 2}
_MAX_EXPERTS = 256


@cache
def _core() -> ModuleType:
    return importlib.import_module("steermoe_kernels._cuda")


def unavailable() -> str | None:
    try:
        _core()
    except ImportError as error:
        return f"the compiled module is missing (installed without nvcc or with STEERMOE_CUDA=0): {error}"
    if torch.version.hip:
        return "the kernels are for NVIDIA GPUs, and this PyTorch is built for ROCm"
    if not torch.backends.cuda.is_built():
        return "the kernels are compiled, but this PyTorch is built without CUDA"
    return None if torch.cuda.is_available() else "the kernels are compiled, but there is no CUDA device"


def rejects(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in _STREAMS:
        return f"the stream must be float32, float16 or bfloat16, got {str(dtype).removeprefix('torch.')}"
    if device.type != "cuda":
        return f"the stream must be on a CUDA device, got {device}"
    major, minor = torch.cuda.get_device_capability(device)
    built = _core().build_info()["architectures"]
    return (
        None if _runs_on(built, major, minor) else f"{device} has compute capability {major}.{minor}, and the module is built for {built}"
    )


def _runs_on(architectures: str, major: int, minor: int) -> bool:
    """Whether code for any of ``architectures``, as CMake spells them ("80-real;90a-real"), runs on this capability.

    Machine code runs on the same major version from its minor version on, code for an architecture with a letter on that one only; what
    comes as PTX, too, (no "-real") the driver compiles for anything later.
    """
    for number, letter, kind in re.findall(r"(\d+)([af]?)(-real|-virtual)?", architectures):
        built = divmod(int(number), 10)
        if built == (major, minor) and kind != "-virtual":
            return True
        if not letter and ((built[0] == major and built[1] <= minor) if kind == "-real" else built <= (major, minor)):
            return True
    return False


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
    if options.num_experts > _MAX_EXPERTS:
        raise ValueError(
            f"backend 'cuda' takes up to {_MAX_EXPERTS} experts, got {options.num_experts}; backend 'reference' takes any number"
        )
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


def _place(tensor: Tensor) -> dict[str, int]:
    """The device of a launch, and torch's current stream there."""
    if tensor.device.type != "cuda":  # the tests' emulated device
        return {"device": 0, "stream": 0}
    index = tensor.device.index
    return {"device": index, "stream": torch.cuda.current_stream(index).cuda_stream}


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
    pooled = -(-time // options.pool_size) if options.pool else time
    problem = _problem(x, pooled, options, weight, bias, vectors, scale, norm_weight, norm_bias)
    y = torch.empty_like(x)
    gates = x.new_empty((batch, time, options.num_experts), dtype=torch.float32)
    probs = torch.empty_like(gates) if options.keeps_probs else gates.new_empty(0)
    normed = x.new_empty((batch, pooled, width) if options.norm else 0)
    stats = gates.new_empty((2, batch, pooled) if options.norm else 0)
    with torch.cuda.device_of(x):
        _core().forward(problem, [_address(t) for t in (x, residual, y, normed, gates, probs, stats)], **_place(x))
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
    needs = [*needs[:5], *(need and dnormed is not None for need in needs[5:])]
    shapes = (y.shape, (num_experts, width), (num_experts,), (num_experts, width), (), (width,), (width,))
    dtypes = (y.dtype, *(gates.dtype,) * 6)
    results = [y.new_empty(shape, dtype=dtype) if need else None for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)]
    problem = _problem(y, stats.shape[-1] if options.norm else y.shape[1], options, weight, None, vectors, scale, norm_weight, None)
    call = {
        "problem": problem,
        "addresses": [_address(t) for t in (dy, dnormed, dgates, y, gates, probs, stats)],
        "results": [_address(t) for t in results],
    }
    place = _place(y)
    with torch.cuda.device_of(y):
        workspace = y.new_empty(_core().workspace_bytes(**call, device=place["device"]), dtype=torch.uint8)
        _core().backward(**call, workspace=workspace.data_ptr(), **place)
    return tuple(results)
