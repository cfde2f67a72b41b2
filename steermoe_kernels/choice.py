"""What ``backend="auto"`` takes on a GPU: a table of what was measured, and nothing that was not. So far it is empty.

A line goes in together with the results it stands on. Where no line fits, the backends' own ``AUTO_DEVICES`` and ``PRIORITY`` decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

__all__ = ["FASTEST", "Measured", "Shape", "fastest"]


class Shape(NamedTuple):
    """The sizes of a pass: ``frames`` is batch times time, ``width`` a frame's columns."""

    experts: int
    frames: int
    width: int


@dataclass(frozen=True)
class Measured:
    """The backend that was the fastest on GPUs of compute ``capability`` for one class of shapes, and where that is shown.

    The class: streams of ``dtypes``, with sizes from ``smallest`` to ``largest``. A frame's cost changes little between neighbouring
    sizes, so that a few classes cover what is used.
    """

    capability: tuple[int, int]
    dtypes: tuple[torch.dtype, ...]
    smallest: Shape
    largest: Shape
    backend: str
    results: str  # a file in benchmarks/results: for the reader, and for the test that it is there

    def fits(self, dtype: torch.dtype, shape: Shape) -> bool:
        within = (low <= size <= high for low, size, high in zip(self.smallest, shape, self.largest, strict=True))
        return dtype in self.dtypes and all(within)


# No line yet: the CUDA kernels have been compiled and inspected, and run thread by thread on an emulated GPU, but not on a real one.
FASTEST: tuple[Measured, ...] = ()


def fastest(device: torch.device, dtype: torch.dtype, shape: Shape) -> str | None:
    """Name of the backend measured to be the fastest for such a stream on this device, or None; of several lines the first counts.

    Asks a driver only where a line might fit.
    """
    if device.type != "cuda":
        return None
    lines = (line for line in FASTEST if line.fits(dtype, shape))
    return next((line.backend for line in lines if line.capability == _capability(device)), None)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
