"""The rule every numerical test uses: at most twice the error of the same formula in plain PyTorch, both against float64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Results = Mapping[str, Tensor]


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of ``exact`` (over 1 where ``exact`` is zero)."""
    size = exact.double().norm().item()
    return (value.double() - exact.double()).norm().item() / (size or 1.0)


def stack(draws: Iterable[Results]) -> dict[str, Tensor]:
    """The results of several draws as one, so that a gradient of one number, too, has a norm and not only luck."""
    draws = list(draws)
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


def join(draws: Iterable[Results]) -> dict[str, Tensor]:
    """As `stack`, for draws of different shapes."""
    draws = list(draws)
    return {name: torch.cat([draw[name].flatten() for draw in draws]) for name in draws[0]}


def errors(results: Results, exact: Results) -> dict[str, float]:
    return {name: relative_error(results[name], truth) for name, truth in exact.items()}


def assert_as_accurate(fused: Results, plain: Results, exact: Results, dtype: torch.dtype) -> None:
    """``err(fused) <= 2 err(plain)`` for every named result, or within the roundings nobody can avoid (see `assert_errors_within`)."""
    assert_errors_within({name: 2 * error for name, error in errors(plain, exact).items()}, fused, exact, dtype)


def assert_errors_within(allowed: Mapping[str, float], fused: Results, exact: Results, dtype: torch.dtype) -> None:
    """Shapes as in ``exact``; errors of at most ``allowed``, or of one rounding of the stream's ``dtype`` and a few of the accumulator's.

    The roundings matter where plain PyTorch is exact by luck: a sum of few terms, a gate that is one.
    """
    unavoidable = torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    faults = []
    for name, truth in exact.items():
        assert fused[name].shape == truth.shape, f"{name} has shape {tuple(fused[name].shape)}, not {tuple(truth.shape)}"
        error, bound = relative_error(fused[name], truth), max(allowed[name], unavoidable)
        if not error <= bound:  # "not", so that NaN is a fault
            faults.append(f"{name}: error {error:.3g}, allowed {bound:.3g}")
    assert not faults, "; ".join(faults)
