"""What ``backend="auto"`` takes on a GPU: a table of what was measured, and nothing that was not.

A line goes in together with the results it stands on. Where no line fits, the backends' own ``AUTO_DEVICES`` and ``PRIORITY`` decide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["FASTEST", "Measured", "fastest"]


@dataclass(frozen=True)
class Measured:
    """The backend that was the fastest for streams of ``dtypes`` on GPUs of compute ``capability``, and where that is shown."""

    capability: tuple[int, int]
    dtypes: tuple[torch.dtype, ...]
    backend: str
    results: str  # a file in benchmarks/results


# No line yet: the CUDA kernels have been compiled and inspected, and run thread by thread on an emulated GPU, but not on a real one.
FASTEST: tuple[Measured, ...] = ()


def fastest(device: torch.device, dtype: torch.dtype) -> str | None:
    """Name of the backend measured to be the fastest for a stream of this device and dtype, or None.

    Asks a driver only where a line might fit.
    """
    lines = [line for line in FASTEST if dtype in line.dtypes]
    if device.type != "cuda" or not lines:
        return None
    capability = torch.cuda.get_device_capability(device)
    return next((line.backend for line in lines if line.capability == capability), None)
