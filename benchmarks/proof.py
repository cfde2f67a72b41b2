"""Proved before timed: a variant may be at most twice as wrong as the eager spelling in the same dtype, both against float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["errors", "fault"]


def errors(results: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """The norm of each result's difference from ``exact``, over the norm of ``exact``."""
    return {name: ((results[name].double() - truth).norm() / truth.norm()).item() for name, truth in exact.items()}


def fault(found: Mapping[str, float], eager: Mapping[str, float], dtype: torch.dtype) -> str | None:
    """What is wrong with a variant whose errors are ``found``, None if nothing is.

    Where eager is exact by luck, one rounding of the stream at the store and two of the accumulator are allowed.
    """
    unavoidable = torch.finfo(dtype).eps / 2 + 2 * torch.finfo(torch.float32).eps
    wrong = [
        f"{name}: error {error:.3g}, eager's {eager[name]:.3g}"
        for name, error in found.items()
        if not error <= max(2 * eager[name], unavoidable)  # "not", so that NaN is a fault
    ]
    return "; ".join(wrong) or None
