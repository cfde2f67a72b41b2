"""The CUDA C++ kernels in csrc/cuda, by way of the compiled module ``steermoe_kernels._cuda``.

The module sees addresses, sizes and a stream: everything it needs, results and workspace alike, is allocated here by torch, on torch's
current stream, so that CUDA graphs can capture a pass.
"""

from __future__ import annotations

import importlib
import re
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..compiled import DirectWay, address, backward_results, direct_way, forward_results, problem
from . import PLAIN, Options

AUTO_DEVICES: frozenset[str] = frozenset()  # `steermoe_kernels.choice` alone lets it in
PRIORITY = 20

_STREAMS = (torch.float32, torch.float16, torch.bfloat16)
_MAX_EXPERTS = 256


@cache
def _core() -> ModuleType:
    return importlib.import_module("steermoe_kernels._cuda")


def unavailable() -> str | None:
    try:
        _core()
    except ImportError as error:
        return f"the compiled module is missing (installed without nvcc, or with STEERMOE_CUDA=0 or STEERMOE_CPU=0): {error}"
    if torch.version.hip:
        return "the kernels are for NVIDIA GPUs, and this PyTorch is built for ROCm"
    if not torch.backends.cuda.is_built():
        return "the kernels are compiled, but this PyTorch is built without CUDA"
    return None if torch.cuda.is_available() else "the kernels are compiled, but there is no CUDA device"


def rejects(device: torch.device, dtype: torch.dtype, options: Options = PLAIN) -> str | None:
    if dtype not in _STREAMS:
        return f"the stream must be float32, float16 or bfloat16, got {str(dtype).removeprefix('torch.')}"
    if options.num_experts > _MAX_EXPERTS:
        return f"it takes up to {_MAX_EXPERTS} experts, got {options.num_experts}"
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


def direct(options: Options, automatic: bool) -> DirectWay | None:
    return None if unavailable() is not None else direct_way(_core(), options, automatic)


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
    call = problem(_core(), x, options, weight, bias, vectors, scale, norm_weight, norm_bias)
    results = y, normed, gates, probs, stats = forward_results(x, options)
    with torch.cuda.device_of(x):
        _core().forward(call, [address(t) for t in (x, residual, *results)], **_place(x))
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
    results = backward_results(y, gates, weight, [*needs[:5], *(need and dnormed is not None for need in needs[5:])])
    call = {
        "problem": problem(_core(), y, options, weight, None, vectors, scale, norm_weight, None),
        "addresses": [address(t) for t in (dy, dnormed, dgates, y, gates, probs, stats)],
        "results": [address(t) for t in results],
    }
    place = _place(y)
    with torch.cuda.device_of(y):
        workspace = y.new_empty(_core().workspace_bytes(**call, device=place["device"]), dtype=torch.uint8)
        _core().backward(**call, workspace=workspace.data_ptr(), **place)
    return tuple(results)
