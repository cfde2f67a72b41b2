"""The machine that is measured: which device, how it calls itself in a results file, how fast it copies."""

from __future__ import annotations

import importlib.metadata
import statistics
import time
from functools import cache
from typing import Any

import torch

from steermoe_kernels.backends import backend_states

__all__ = ["DEVICE", "copy_bandwidth", "describe"]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

_PACKAGES = ("torch", "triton", "transformers", "numpy", "pytest-benchmark")
_CPU_FIELDS = ("brand_raw", "arch", "count", "l2_cache_size", "l3_cache_size")


def describe(found: dict[str, Any]) -> dict[str, Any]:
    """What a results file says of the machine. ``found``: pytest-benchmark's own account, of which the host's name is left out."""
    cpu = {field: found.get("cpu", {}).get(field) for field in _CPU_FIELDS}
    return {
        "system": found.get("system"),
        "python_version": found.get("python_version"),
        "cpu": cpu | {"simd": simd_level(), "torch_simd": torch.backends.cpu.get_cpu_capability()},
        "gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None,
        "device": DEVICE.type,
        "threads": torch.get_num_threads(),
        "copy_gb_per_s": round(copy_bandwidth() / 1e9, 2),
        "versions": {"steermoe_kernels": _own_version()} | {name: _version(name) for name in _PACKAGES},
        "backends": {name: reason or "available" for name, reason in backend_states().items()},
    }


def simd_level() -> str | None:
    """The instruction set the compiled CPU kernels chose, None where they are not built."""
    try:
        from steermoe_kernels import _cpu
    except ImportError:
        return None
    return _cpu.simd_level()


def _own_version() -> str:
    import steermoe_kernels

    return steermoe_kernels.__version__


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a plain copy too large for the caches: the limit of a kernel bound by memory."""
    size = 2**30 if DEVICE.type == "cuda" else 2**28
    source = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    target = torch.zeros_like(source)
    durations = []
    for _ in range(7):
        _wait()
        start = time.perf_counter()
        target.copy_(source)
        _wait()
        durations.append(time.perf_counter() - start)
    return 2 * size / statistics.median(durations[2:])


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
