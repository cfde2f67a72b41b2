"""The steps of the public code's formula, and where one fused pass takes their place.

What is said in `expressions.py` of any step is here said of those of

    logits = router(x)                        (B, T, L E)  one Linear for all layers; or (B, T, E), one Linear a layer
    gates = softmax(logits[:, :, rows])       (B, T, E)
    delta = einsum("bte,ef->btf", gates, V)   (B, T, D)
    y = x + s * delta                         or x + delta

Where the sum is of the very tensor that the router was given, one fused pass computes it from the tensors of the public code itself, so
that gradients reach its parameters, and the gates get their values from the same pass.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as SF
from ..reference import compute_dtype
from .expressions import TAKEN_UP, Expression, Mode, Step, express, open_step

__all__ = ["router_logits"]


class Logits(Step):
    """``x W^T + b``."""

    backend: str
    x: Tensor

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> None:
        super().__init__(Mode(x.device.type), x.device, x, weight, bias)
        self.x, self.backend = x, backend
        self.dtype, self.shape = self.mode.autocast or x.dtype, (*x.shape[:-1], weight.shape[0])

    def compute(self, *inputs: Any) -> Tensor:
        return F.linear(*inputs)

    def router(self) -> tuple[Tensor, Tensor | None]:
        """The ``W (E, D)`` and ``b (E,)`` that these logits come from."""
        return self.inputs[1:]  # type: ignore[return-value]


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Expression:
    """What the patched router answers with."""
    return express(Logits(x, weight, bias, backend), x, weight, bias)


class _OfLogits(Logits):
    """Logits made from ``logits``."""

    def __init__(self, logits: Logits, columns: int, *others: Any) -> None:
        Step.__init__(self, logits.mode, logits.device, logits, *others)
        self.logits, self.x, self.backend = logits, logits.x, logits.backend
        self.dtype, self.shape = logits.dtype, (*logits.shape[:-1], columns)


class SomeLogits(_OfLogits):
    """The columns ``rows`` of logits, those of one layer."""

    def __init__(self, logits: Logits, rows: slice) -> None:
        super().__init__(logits, rows.stop - rows.start)
        self.rows = rows
        self.strides = logits.strides or _contiguous(logits.shape)

    def compute(self, *inputs: Any) -> Tensor:
        return inputs[0][..., self.rows]  # the same memory, as a slice has it

    def router(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.logits.router()
        return weight[self.rows], None if bias is None else bias[self.rows]


class MixedLogits(_OfLogits):
    """Logits times a matrix: one public version has one router for all layers, and a matrix ``M (E, E)`` for each."""

    def __init__(self, logits: Logits, matrix: Tensor) -> None:
        super().__init__(logits, matrix.shape[1], matrix)

    def compute(self, *inputs: Any) -> Tensor:
        return inputs[0] @ inputs[1]

    def router(self) -> tuple[Tensor, Tensor | None]:
        """``(x W^T + b) M = x (M^T W)^T + b M``."""
        weight, bias = self.logits.router()
        with torch.autocast(self.x.device.type, enabled=False):
            dtype = compute_dtype(self.x.dtype)
            matrix = self.inputs[1].to(dtype)
            return matrix.mT @ weight.to(dtype), None if bias is None else bias.to(dtype) @ matrix


class Gates(Step):
    """The softmax of `Logits`."""

    def __init__(self, logits: Logits) -> None:
        super().__init__(logits.mode, logits.device, logits)
        self.logits, self.shape, self.dtype = logits, logits.shape, logits.dtype
        if self.mode.autocast is not None:  # which may have a say in what softmax returns
            with torch.no_grad():
                self.dtype = F.softmax(torch.empty(0, 1, dtype=logits.dtype, device=logits.device), dim=-1).dtype

    def compute(self, *inputs: Any) -> Tensor:
        return F.softmax(inputs[0], dim=-1)

    def forget(self) -> None:
        super().forget()
        del self.logits


class Delta(Step):
    """``g V``."""

    def __init__(self, gates: Gates, vectors: Tensor) -> None:
        super().__init__(gates.mode, gates.device, gates, vectors)
        self.gates, self.vectors = gates, vectors
        self.dtype, self.shape = self.mode.autocast or gates.dtype, (*gates.shape[:-1], vectors.shape[1])

    def compute(self, *inputs: Any) -> Tensor:
        return inputs[0] @ inputs[1]


class Scaled(Step):
    """``s (g V)``."""

    def __init__(self, delta: Delta, scale: Tensor | float) -> None:
        super().__init__(delta.mode, delta.device, delta, scale)
        self.delta, self.scale, self.shape, self.dtype = delta, scale, delta.shape, delta.dtype

    def compute(self, *inputs: Any) -> Tensor:
        return inputs[1] * inputs[0]


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * max(size, 1))
    return tuple(strides)


# Each of these gets the arguments of a torch function, one of them an expression, and returns NotImplemented for whatever is not in the
# formula.


def _getitem(args: tuple, kwargs: dict[str, Any]) -> Any:
    whole, index = args
    logits = open_step(whole, Logits)
    rows = None if logits is None else _last_dimension(logits.shape, index)
    return NotImplemented if rows is None else express(SomeLogits(logits, rows), whole)


_ALL = (slice(None),) * 64
_BOUNDS = (int, type(None))


def _last_dimension(shape: tuple[int, ...], index: Any) -> slice | None:
    """The slice of the last dimension in ``[:, :, a:b]`` or ``[..., a:b]``; None if this is another index."""
    if not isinstance(index, tuple) or len(index) < 2 or type(index[-1]) is not slice:
        return None
    leading, rows = index[:-1], index[-1]
    whole = len(index) == len(shape) and set(map(type, leading)) == {slice} and leading == _ALL[: len(leading)]
    if not whole and not (len(leading) == 1 and leading[0] is Ellipsis):
        return None
    if rows.step not in (None, 1) or type(rows.start) not in _BOUNDS or type(rows.stop) not in _BOUNDS:
        return None
    start, stop, _ = rows.indices(shape[-1])
    return slice(start, stop) if stop > start else None


def _softmax(args: tuple, kwargs: dict[str, Any]) -> Any:
    options = dict(zip(("input", "dim"), args, strict=False)) | kwargs
    expression = options.pop("input", None)
    logits = open_step(expression, Logits)
    if logits is None or len(args) > 2:
        return NotImplemented
    dim = options.pop("dim", None)
    options.pop("_stacklevel", None)
    if dim not in (-1, len(logits.shape) - 1) or any(value is not None for value in options.values()):
        return NotImplemented
    return express(Gates(logits), expression)


def _einsum(args: tuple, kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 3 or not isinstance(args[0], str) or not isinstance(args[1], Expression):
        return NotImplemented
    return _matmul(args[1:], {}) if len(args[1].step.shape) == 3 and _sums_over_experts(args[0]) else NotImplemented


@lru_cache(maxsize=64)
def _sums_over_experts(equation: str) -> bool:
    frames = re.fullmatch(r"([a-zA-Z])([a-zA-Z])([a-zA-Z]),\3([a-zA-Z])->\1\2\4", equation.replace(" ", ""))
    return frames is not None and len(set(frames.groups())) == 4


def _matmul(args: tuple, kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 2:
        return NotImplemented
    left, right = args
    step: Any = open_step(left, (Logits, Gates))
    if step is None or type(right) not in (Tensor, nn.Parameter) or right.dim() != 2 or right.shape[0] != step.shape[-1]:
        return NotImplemented
    if isinstance(step, Gates):
        return express(Delta(step, right), left, right) if _alike(right, step.logits) else NotImplemented
    return express(MixedLogits(step, right), left, right) if _alike(right, step) and not isinstance(step, MixedLogits) else NotImplemented


def _mul(args: tuple, kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 2:
        return NotImplemented
    expression, scale = args if isinstance(args[0], Expression) else args[::-1]
    delta: Any = open_step(expression, Delta)
    if delta is None:
        return NotImplemented
    if type(scale) in (Tensor, nn.Parameter):
        known = scale.dim() == 0 and scale.is_floating_point() and scale.device == delta.device
    else:
        known = type(scale) in (int, float) and math.isfinite(scale)
    return express(Scaled(delta, scale), expression, scale) if known else NotImplemented


def _add(args: tuple, kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 2:
        return NotImplemented
    expression, x = args if isinstance(args[0], Expression) else args[::-1]
    step: Any = open_step(expression, (Delta, Scaled))
    if step is None:
        return NotImplemented
    delta, scale = (step.delta, step.scale) if isinstance(step, Scaled) else (step, 1.0)
    gates = delta.gates
    if delta.result is not None or gates.result is not None:
        return NotImplemented
    logits = gates.logits
    if logits.result is not None or x is not logits.x or delta.shape != x.shape:
        return NotImplemented
    step.check_unchanged()
    weight, bias = logits.router()
    y, values = SF.steer(x, weight, bias, delta.vectors, scale, backend=logits.backend)
    gates.become(values.to(gates.dtype))
    return y


def _alike(tensor: Tensor, logits: Logits) -> bool:
    """Whether the public formula would accept ``tensor`` here, so that the fused pass never hides an error of it."""
    accepted = tensor.dtype == logits.x.dtype or logits.mode.autocast is not None
    return tensor.device == logits.device and tensor.is_floating_point() and accepted


TAKEN_UP.update(
    {
        Tensor.__getitem__: _getitem,
        torch.einsum: _einsum,
        **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), _softmax),
        **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _matmul),
        **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _mul),
        **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _add),
    }
)
