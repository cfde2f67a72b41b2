"""Expressions: values of the public code's formula that are computed late, so that one fused pass can take the formula's place.

The code that `patching.py` patches writes, layer by layer,

    logits = router(x)                        (B, T, L E)  one Linear for all layers; or (B, T, E), one Linear a layer
    gates = softmax(logits[:, :, rows])       (B, T, E)
    delta = einsum("bte,ef->btf", gates, V)   (B, T, D)
    y = x + s * delta                         or x + delta

An expression remembers how it was made, through slice, softmax, product and scale. Where it is at last added to the very tensor that the
router was given, one fused pass computes the sum from the tensors of the public code itself, so that gradients reach its parameters, and
the gates get their values from the same pass. Anything else that touches an expression (another function, an attribute, another order of
things) computes it by the formula above, in PyTorch.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as SF
from ..reference import compute_dtype

__all__ = ["Expression", "Logits"]


class Mode:
    """Grad, inference and autocast mode, as they were when an expression was made."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.grad, self.inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.autocast, self.dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def holds(self) -> bool:
        return vars(self) == vars(Mode(self.device))

    @contextmanager
    def restored(self) -> Iterator[None]:
        with (
            torch.inference_mode(self.inference),
            torch.set_grad_enabled(self.grad),
            torch.autocast(self.device, dtype=self.dtype, enabled=self.autocast),
        ):
            yield


class Expression:
    """A value of the public formula that has not been computed. As an operand it behaves as the tensor it stands for.

    Once somebody asks for the value, whatever was derived from the expression is computed, too: from then on all is as in the public
    code, down to what shares memory with what.
    """

    def __init__(self, mode: Mode, parent: Expression | None, *inputs: Tensor) -> None:
        self._mode = mode
        self._inputs = [(tensor, _version(tensor)) for tensor in inputs]
        self._value: Tensor | None = None
        self._computing = False
        self._derived: list[weakref.ref[Expression]] = []
        if parent is not None:
            parent._derived.append(weakref.ref(self))

    def tensor(self) -> Tensor:
        """The value, computed once, by the public formula, as it would have been when the expression was made."""
        if self._value is None:
            self.check_unchanged()
            self._computing = True
            with nullcontext() if self._mode.holds() else self._mode.restored():
                self._resolve(self._compute())
        return self._value  # type: ignore[return-value]

    def become(self, value: Tensor) -> None:
        """Take a ``value`` that was computed elsewhere. What is derived from it stays open, as long as nobody writes to the value."""
        self._take(value)
        for derived in [derived() for derived in self._derived]:
            if derived is not None:
                derived._inputs.append((value, _version(value)))

    def _resolve(self, value: Tensor) -> None:
        self._take(value)
        for derived in [derived() for derived in self._derived]:
            if derived is not None and not derived._computing:
                derived.tensor()

    def _take(self, value: Tensor) -> None:
        self._value, self._inputs = value, []
        self._forget()

    def check_unchanged(self) -> None:
        if any(_version(tensor) != version for tensor, version in self._inputs):
            raise RuntimeError(
                "a tensor was changed in place after the router or the steering used it and before their result was needed; "
                "the patched model computes late, so it cannot follow that"
            )

    def open(self) -> bool:
        """Whether the next step of the formula may be added to this one, instead of being computed."""
        return self._value is None and self._mode.holds()

    def softmax(self, dim: int, dtype: torch.dtype | None = None) -> Any:
        return torch.softmax(self, dim, dtype=dtype)  # type: ignore[arg-type]

    def _compute(self) -> Tensor:
        raise NotImplementedError

    def _forget(self) -> None:
        """Let go of what led to the value: a list of gates must not keep every layer's stream."""

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        step = _STEPS.get(func)
        result = NotImplemented if step is None else step(args, kwargs)
        return func(*_real(args), **_real(kwargs)) if result is NotImplemented else result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)

    def __add__(self, other: Any) -> Any:
        return torch.add(self, other)  # type: ignore[call-overload]

    def __mul__(self, other: Any) -> Any:
        return torch.mul(self, other)  # type: ignore[arg-type]

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    __radd__, __rmul__ = __add__, __mul__

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.tensor().__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.tensor().__reduce_ex__(protocol)

    def __repr__(self) -> str:
        return repr(self.tensor())

    __hash__ = object.__hash__


def _delegate(name: str) -> Callable[..., Any]:
    def method(self: Expression, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.tensor(), name)(*_real(args), **_real(kwargs))

    return method


# Operators are looked up on the class, so those that no step of the formula needs are handed to the value one by one.
_ARITHMETIC = ("sub", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
for _name in (
    *(f"__{side}{name}__" for name in _ARITHMETIC for side in ("", "r", "i")),
    *("__iadd__", "__imul__", "__imatmul__", "__rmatmul__", "__neg__", "__pos__", "__abs__", "__invert__"),
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"),
    *("__len__", "__iter__", "__reversed__", "__contains__", "__getitem__", "__setitem__", "__array__", "__format__"),
    *("__bool__", "__int__", "__float__", "__complex__", "__index__"),
):
    if hasattr(Tensor, _name):
        setattr(Expression, _name, _delegate(_name))


class Logits(Expression):
    """``x W^T + b``, or some of its columns."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str, parent: Logits | None = None, rows: slice | None = None
    ) -> None:
        inputs = [tensor for tensor in (x, weight, bias) if tensor is not None]
        super().__init__(Mode(x.device.type) if parent is None else parent._mode, parent, *inputs)
        self._x, self._weight, self._bias, self._backend = x, weight, bias, backend
        self._whole, self._rows = parent, rows

    def __getitem__(self, index: Any) -> Any:
        rows = self._last_dimension(index) if self.open() else None
        if rows is None:
            return self.tensor()[_real(index)]
        self.check_unchanged()
        bias = None if self._bias is None else self._bias[rows]
        return Logits(self._x, self._weight[rows], bias, self._backend, self, rows)

    def _last_dimension(self, index: Any) -> slice | None:
        """The slice of the last dimension in ``[:, :, a:b]`` or ``[..., a:b]``; None if this is another index."""
        if not isinstance(index, tuple) or not index:
            return None
        *leading, rows = index
        whole = all(isinstance(part, slice) and part == slice(None) for part in leading) and len(index) == self._x.dim()
        if not (whole or (len(leading) == 1 and leading[0] is Ellipsis)) or not isinstance(rows, slice):
            return None
        if not all(bound is None or type(bound) is int for bound in (rows.start, rows.stop, rows.step)) or rows.step not in (None, 1):
            return None
        start, stop, _ = rows.indices(self._weight.shape[0])
        return slice(start, stop) if stop > start else None

    def _compute(self) -> Tensor:
        if self._whole is None:
            return F.linear(self._x, self._weight, self._bias)
        return self._whole.tensor()[..., self._rows]  # the same memory, as a slice has it

    def _forget(self) -> None:
        del self._x, self._weight, self._bias, self._whole

    def router(self) -> tuple[Tensor, Tensor | None]:
        """The ``W (E, D)`` and ``b (E,)`` that these logits come from."""
        return self._weight, self._bias

    def gates_dtype(self) -> torch.dtype:
        """What the public formula's softmax returns, which autocast may have a say in."""
        if not self._mode.autocast:
            return self._x.dtype
        with torch.no_grad():
            return F.softmax(F.linear(self._x[:0], self._weight, self._bias), dim=-1).dtype


class MixedLogits(Logits):
    """Logits times a matrix: one public version has one router for all layers, and a matrix ``M (E, E)`` for each."""

    def __init__(self, logits: Logits, matrix: Tensor) -> None:
        super().__init__(logits._x, logits._weight, logits._bias, logits._backend, logits)
        self._logits, self._matrix = logits, matrix
        self._inputs.append((matrix, _version(matrix)))

    def __getitem__(self, index: Any) -> Any:
        return self.tensor()[_real(index)]

    def _compute(self) -> Tensor:
        return self._logits.tensor() @ self._matrix

    def _forget(self) -> None:
        super()._forget()
        del self._logits, self._matrix

    def router(self) -> tuple[Tensor, Tensor | None]:
        """``(x W^T + b) M = x (M^T W)^T + b M``."""
        with torch.autocast(self._x.device.type, enabled=False):
            dtype = compute_dtype(self._x.dtype)
            matrix = self._matrix.to(dtype)
            return matrix.mT @ self._weight.to(dtype), None if self._bias is None else self._bias.to(dtype) @ matrix


class Gates(Expression):
    """The softmax of `Logits`."""

    def __init__(self, logits: Logits) -> None:
        super().__init__(logits._mode, logits)
        self._logits = logits

    def _compute(self) -> Tensor:
        return F.softmax(self._logits.tensor(), dim=-1)

    def _forget(self) -> None:
        del self._logits


class Delta(Expression):
    """``g V``, or ``s (g V)``."""

    def __init__(self, gates: Gates, vectors: Tensor, scale: Tensor | float | None = None) -> None:
        super().__init__(gates._mode, gates, vectors, *([scale] if isinstance(scale, Tensor) else []))
        self._gates, self._vectors, self._scale = gates, vectors, scale

    def _compute(self) -> Tensor:
        delta = self._gates.tensor() @ self._vectors
        return delta if self._scale is None else self._scale * delta

    def _forget(self) -> None:
        del self._gates, self._vectors, self._scale


# --- the steps of the formula -----------------------------------------------------------------------------------------------------------
# Each gets the arguments of a torch function, one of them an expression, and returns NotImplemented for whatever is not in the formula.


def _softmax(args: tuple, kwargs: dict[str, Any]) -> Any:
    options = dict(zip(("input", "dim"), args, strict=False)) | kwargs
    logits = options.pop("input", None)
    if not isinstance(logits, Logits) or not logits.open() or len(args) > 2:
        return NotImplemented
    dim = options.pop("dim", None)
    options.pop("_stacklevel", None)
    if dim not in (-1, logits._x.dim() - 1) or any(value is not None for value in options.values()):
        return NotImplemented
    return Gates(logits)


def _einsum(args: tuple, kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 3 or not isinstance(args[0], str):
        return NotImplemented
    frames = re.fullmatch(r"([a-zA-Z])([a-zA-Z])([a-zA-Z]),\3([a-zA-Z])->\1\2\4", args[0].replace(" ", ""))
    if frames is None or len(set(frames.groups())) != 4:
        return NotImplemented
    logits = _logits_of(args[1])
    return NotImplemented if logits is None or logits._x.dim() != 3 else _matmul(args[1:], {})


def _matmul(args: tuple, kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 2:
        return NotImplemented
    left, right = args
    logits = _logits_of(left)
    if logits is None or type(right) not in (Tensor, nn.Parameter) or right.dim() != 2 or not _alike(right, logits):
        return NotImplemented
    logits.check_unchanged()
    if isinstance(left, Gates):
        return Delta(left, right)
    return MixedLogits(left, right) if type(left) is Logits and right.shape[0] == left._weight.shape[0] else NotImplemented


def _mul(args: tuple, kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 2:
        return NotImplemented
    delta, scale = args if isinstance(args[0], Delta) else args[::-1]
    if not isinstance(delta, Delta) or not delta.open() or delta._scale is not None or _logits_of(delta._gates) is None:
        return NotImplemented
    if type(scale) in (Tensor, nn.Parameter):
        known = scale.dim() == 0 and scale.is_floating_point() and scale.device == delta._vectors.device
    else:
        known = type(scale) in (int, float)
    delta.check_unchanged()
    return Delta(delta._gates, delta._vectors, scale) if known else NotImplemented


def _add(args: tuple, kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 2:
        return NotImplemented
    delta, x = args if isinstance(args[0], Delta) else args[::-1]
    if not isinstance(delta, Delta) or not delta.open():
        return NotImplemented
    gates, vectors, scale = delta._gates, delta._vectors, delta._scale
    logits = _logits_of(gates)
    if logits is None or x is not logits._x:
        return NotImplemented
    weight, bias = logits.router()
    if vectors.shape != (weight.shape[0], x.shape[-1]):
        return NotImplemented
    logits.check_unchanged()
    delta.check_unchanged()
    y, values = SF.steer(x, weight, bias, vectors, 1.0 if scale is None else scale, backend=logits._backend)
    gates.become(values.to(logits.gates_dtype()))
    return y


def _logits_of(expression: Any) -> Logits | None:
    """The open logits that ``expression`` is, or the softmax of which it is, if it is open."""
    if isinstance(expression, Gates) and expression.open():
        expression = expression._logits
    return expression if isinstance(expression, Logits) and expression.open() else None


def _alike(tensor: Tensor, logits: Logits) -> bool:
    """Whether the public formula would accept ``tensor`` here, so that the fused pass never hides an error of it."""
    return tensor.device == logits._x.device and tensor.is_floating_point() and (tensor.dtype == logits._x.dtype or logits._mode.autocast)


_STEPS: dict[Any, Callable[[tuple, dict[str, Any]], Any]] = {
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), _softmax),
    **dict.fromkeys((torch.einsum,), _einsum),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _mul),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _add),
}


def _version(tensor: Tensor) -> int | None:
    """How often ``tensor`` has been written to; None for inference tensors, which do not count."""
    return None if tensor.is_inference() else tensor._version


def _real(value: Any) -> Any:
    if isinstance(value, Expression):
        return value.tensor()
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_real(item) for item in value)
    if isinstance(value, dict):
        return {key: _real(item) for key, item in value.items()}
    return value
