"""Triton kernels for NVIDIA GPUs, forward and backward.

`forward.py`, `backward.py` and `reduction.py` are the kernels, `tiles.py` what they share, `blocks.py` the tile sizes, `launches.py` what a
pass launches, `static.py` compiles that without a GPU. Triton's interpreter (``TRITON_INTERPRET=1``) runs all of it on CPU tensors.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

from .. import PLAIN, Options

# "cuda" joins once a run on a GPU is committed: nothing that has not run there becomes the default there.
AUTO_DEVICES: frozenset[str] = frozenset()
PRIORITY = 10

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (`pip install triton`; there are wheels for Linux)"
    if _asks_for_interpreter():
        return None if interpreted() else "TRITON_INTERPRET=1 came after Triton was imported; set it before Python starts"
    if not torch.cuda.is_available():
        return "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
    return "the kernels are for NVIDIA GPUs, and this PyTorch is built for ROCm" if torch.version.hip else None


def rejects(device: torch.device, dtype: torch.dtype, options: Options = PLAIN) -> str | None:
    if dtype not in _DTYPES:
        return f"the stream must be float32, float16 or bfloat16, got {str(dtype).removeprefix('torch.')}"
    if _asks_for_interpreter():
        return None
    if device.type != "cuda":
        return f"the stream must be on a CUDA device, got {device}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the GPU must have compute capability 8.0 or later, {device} has {major}.{minor}"


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
    from .launches import prepare_forward

    results, launches = prepare_forward(x, residual, weight, bias, vectors, scale, norm_weight, norm_bias, options)
    with torch.cuda.device_of(x):
        for launch in launches:
            launch.run()
    return results


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
    from .launches import prepare_backward

    incoming, kept, parameters = (dy, dnormed, dgates), (y, gates, probs, stats), (weight, vectors, scale, norm_weight)
    results, launches = prepare_backward(*incoming, *kept, *parameters, options, needs, _multiprocessors(y.device))
    with torch.cuda.device_of(y):
        for launch in launches:
            launch.run()
    return results


@cache
def _multiprocessors(device: torch.device) -> int:
    # The interpreter has none; with a few, its tests add up several partials.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _asks_for_interpreter() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@cache
def interpreted() -> bool:
    """Whether kernels are interpreted. Triton decides that once, when it is imported."""
    import triton

    return not isinstance(triton.language.sum, triton.runtime.JITFunction)
