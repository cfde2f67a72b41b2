"""Expressions: tensors whose numbers are computed late, so that one fused pass can take the place of several operations.

An `Expression` has the shape, dtype and device of the tensor it stands for, and a `Step` in place of numbers. `formula.py` says which
operations on it make another expression, and where the fused pass takes over. There are two ways to anything else:

Python code that touches an expression is seen by ``__torch_function__``. The step is computed as the code says, in PyTorch, and the
expression turns into the plain tensor that came out: the same object, of class Tensor from then on.

C++ code that takes an expression without asking (``autograd.Function.apply``, the transforms of torch.func) finds a tensor with a history,
`_History`, through which gradients go on to what the step was made from, and ``__torch_dispatch__`` gives it the numbers.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["TAKEN_UP", "Expression", "Mode", "Step", "express", "no_expressions_left", "open_step"]

TAKEN_UP: dict[Any, Callable[[tuple, dict[str, Any]], Any]] = {}
"""What a torch function makes of its arguments, one of them an expression, without computing it; or NotImplemented."""


# --- what can change between a step and its result ----------------------------------------------------------------------------------------

# Before 2.8 torch does not tell. Where a checkpoint's end lies between two steps, its own error about what was saved comes then.
_saving_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)
_in_transform = torch._C._are_functorch_transforms_active
_forward_mode = torch._C._is_fwd_grad_enabled


class Mode:
    """What of torch's settings decides what an operation does and keeps. A step is computed as of when it was made."""

    __slots__ = ("autocast", "device", "grad", "in_function", "inference", "settings")

    def __init__(self, device: str) -> None:
        self.device = device
        self.settings = self._now()
        self.grad, self.inference, forward_mode, self.autocast, _, _ = self.settings
        # The forward of an autograd.Function, which turns these off: what it returns gets another history than what it was made from.
        self.in_function = not forward_mode and not self.inference

    def _now(self) -> tuple[Any, ...]:
        autocast = torch.get_autocast_dtype(self.device) if torch.is_autocast_enabled(self.device) else None
        # Hooks, as those of a checkpoint count what is saved between its ends.
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            _forward_mode(),
            autocast,
            _saving_hooks(True),
            _in_transform(),
        )

    def holds(self) -> bool:
        return self._now() == self.settings

    @contextmanager
    def restored(self, grad: bool | None = None) -> Iterator[None]:
        """The same settings again; with ``grad``, for what autograd asks, but for that one and inference mode."""
        _, inference, _, autocast, hooks, _ = self.settings
        with ExitStack() as stack:
            if grad is None and inference != torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(self.grad if grad is None else grad))
            stack.enter_context(torch.autocast(self.device, dtype=autocast, enabled=autocast is not None))
            # Those of a checkpoint that has ended since must not hear of more, which its recomputation will not save again.
            if hooks is None and _saving_hooks(True) is not None:
                stack.enter_context(saved_tensors_hooks(_as_it_is, _as_it_is))
            yield


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _state_of(tensor: Tensor) -> Any:
    """What tells whether ``tensor`` was written to since, or became a leaf: its version; of inference tensors, which have none, a few
    numbers."""
    return _sample(tensor).clone() if tensor.is_inference() else (tensor._version, tensor.requires_grad)


def _sample(tensor: Tensor) -> Tensor:
    """One number of each frame (..., D): of frame i channel i mod D, so that writing to some frames or to a range of channels is seen."""
    if tensor.dim() == 0 or tensor.numel() == 0:
        return tensor
    width = tensor.shape[-1]
    frames = tensor.numel() // width
    if frames <= width and tensor.is_contiguous():
        return tensor.as_strided((frames,), (width + 1,))
    channels = torch.arange(frames, device=tensor.device).remainder_(width).view(*tensor.shape[:-1], 1)
    return tensor.gather(-1, channels)


def _changed(tensor: Tensor, mark: Any) -> bool:
    if not isinstance(mark, Tensor):
        return bool((tensor._version, tensor.requires_grad) != mark)
    now = _sample(tensor)
    if mark.device.type in _READ_AT_ONCE:
        return not _same(mark, now)
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False  # nothing is computed now
    if _SCOPE.made is None:
        return not _same(mark, now)
    _SCOPE.samples.append((mark, now.clone()))  # to compare is to wait for the device: once, where the method ends, or many of them
    if len(_SCOPE.samples) >= _MANY:
        _SCOPE.compare_samples()
    return False


_READ_AT_ONCE = ("cpu",)
_MANY = 1000


def _same(before: Tensor, now: Tensor) -> bool:
    return torch.equal(before, now) or torch.equal(before.nan_to_num(), now.nan_to_num())


_CHANGED = (
    "a tensor was changed in place after the router or the steering used it and before their result was needed; "
    "the patched model computes late, so it cannot follow that"
)


# --- steps --------------------------------------------------------------------------------------------------------------------------------


class Step:
    """An operation put off: what it is made from (tensors, other steps, numbers), and how torch was set then."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...] | None = None  # those of a contiguous tensor
    result: Tensor | None = None
    """The value, once it is computed."""
    expression: weakref.ref[Expression] | None = None
    """What stands for the step, until it turns into the result."""
    differentiable: bool
    _state: Any = None
    """Of the result, while something derived from it is still open: nobody may have written to it since."""
    _detached: Tensor | None = None
    _computing = False

    def __init__(self, mode: Mode, device: torch.device, *inputs: Any) -> None:
        self.mode, self.device, self.inputs = mode, device, inputs
        self.marks: list[tuple[Tensor, Any]] = []
        self.derived: list[weakref.ref[Step]] = []
        differentiable = False
        for value in inputs:
            if isinstance(value, Step):
                value.derived.append(weakref.ref(self))
                differentiable |= value.differentiable
            elif isinstance(value, Tensor):
                self.marks.append((value, _state_of(value)))
                differentiable |= value.requires_grad
        self.differentiable = differentiable and mode.grad and not mode.inference

    def compute(self, *inputs: Any) -> Tensor:
        """The public code's operation on ``inputs``, all of them tensors and numbers."""
        raise NotImplementedError

    def value(self) -> Tensor:
        """The result, computed once, as it would have been when the step was made.

        Once somebody asks for it, whatever was derived from it is computed, too: from then on all is as in the public code, down to what
        shares memory with what.
        """
        if self.result is None:
            self.check_unchanged()
            self._computing = True
            try:
                with self.mode.restored():
                    self._take(self.compute(*(step.value() if isinstance(step, Step) else step for step in self.inputs)))
                    self._state = _state_of(self.result) if self.derived else None  # type: ignore[arg-type]
                    for derived in [derived() for derived in self.derived]:
                        if derived is not None and not derived._computing:
                            derived.value()
            finally:
                self._computing = False
            if not self.differentiable:
                self.forget()
        return self.result  # type: ignore[return-value]

    def become(self, value: Tensor) -> None:
        """Take a ``value`` that was computed elsewhere. What is derived from it stays open, as long as nobody writes to the value."""
        self._take(value)
        self._state = _state_of(self.result) if self.derived else None  # type: ignore[arg-type]
        if not self.differentiable:  # else C++ code may still ask for gradients
            self.forget()

    def forget(self) -> None:
        """Let go of what led to the value: it may be kept for long, or what is derived from it."""
        self.inputs, self.marks = (), []

    def _take(self, value: Tensor) -> None:
        expression = None if self.expression is None else self.expression()
        self.expression = None
        self.result = value
        if expression is not None:
            self.result = _turned_into(expression, value)
            if self.result is not expression:  # C++ code has a hold on it: it goes on as it is, and knows its value
                self.expression = weakref.ref(expression)

    def unchanged(self) -> bool:
        """Whether all that this was made from is as it was."""
        for tensor, mark in self.marks:
            if _changed(tensor, mark):
                return False
        for step in self.inputs:
            if isinstance(step, Step):
                if step.result is None:
                    if not step.unchanged():
                        return False
                elif step._state is not None and _changed(step.result, step._state):
                    return False
        return True

    def check_unchanged(self) -> None:
        if not self.unchanged():
            raise RuntimeError(_CHANGED)

    # For C++ code:

    def detached(self) -> Tensor:
        """The result without a history."""
        if self.result is not None:
            return self.result.detach()
        if self._detached is None:
            self.check_unchanged()
            with self.mode.restored(grad=False):
                self._detached = self.compute(*self._detached_inputs())
        return self._detached

    def gradients(self, gradient: Tensor, needed: tuple[bool, ...]) -> list[Tensor | None]:
        """At the tensors and steps among the inputs, in their order."""
        self.check_unchanged()
        with self.mode.restored(grad=True):
            inputs = self._detached_inputs()
            tensors = [value for value in inputs if isinstance(value, Tensor)]
            wanted = [tensor.requires_grad_() for tensor, need in zip(tensors, needed, strict=True) if need]
            found = iter(torch.autograd.grad(self.compute(*inputs), wanted, gradient))
        return [next(found) if need else None for need in needed]

    def _detached_inputs(self) -> list[Any]:
        values = [value.detached() if isinstance(value, Step) else value for value in self.inputs]
        return [value.detach() if isinstance(value, Tensor) else value for value in values]


# --- expressions --------------------------------------------------------------------------------------------------------------------------


class Expression(Tensor):
    """A tensor whose numbers are still to be computed."""

    step: Step

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        taken_up = TAKEN_UP.get(func)
        if taken_up is not None:
            result = taken_up(args, kwargs)
            if result is not NotImplemented:
                return result
        elif func in _KNOWN_BEFORE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        plain, named = _replaced(args, _plain), _replaced(kwargs, _plain)
        if (args and isinstance(args[0], Expression) and _writes(func)) or isinstance(kwargs.get("out"), Expression):
            raise RuntimeError(_WRITTEN.format(func.__name__))  # it could not turn into the value, so who holds it would not see this
        return func(*plain, **named)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
            written = (given.get(argument.name) for argument in func._schema.arguments if argument.is_write)
            if any(isinstance(value, Expression) for value in written):
                raise RuntimeError(_WRITTEN.format(func))
        return func(*_replaced(args, _numbers), **_replaced(kwargs, _numbers))


_WRITTEN = (
    "{} writes to a result of a patched router that an autograd.Function, or other C++ code, was handed before it was computed; "
    "clone it first"
)
_OPERATORS = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_WRITING = {"__setitem__", *(f"__i{operator}__" for operator in _OPERATORS)}


def _writes(func: Callable[..., Any]) -> bool:
    name = func.__name__
    return name in _WRITING or (name.endswith("_") and not name.endswith("__"))


# Questions that an expression answers without being computed.
_KNOWN_BEFORE = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda")),
    *(Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point, Tensor.__len__),
}


class _History(torch.autograd.Function):
    """Takes gradients on for those who have an expression from C++. The fused pass goes past it."""

    @staticmethod
    def forward(ctx: Any, step: Step, *inputs: Tensor) -> Tensor:
        ctx.step = step
        return _bare(step)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return (None, *ctx.step.gradients(gradient, ctx.needs_input_grad[1:]))


# What ``apply`` does for torch.func before this is never needed: no expressions are made under its transforms. It takes as long again.
_with_history = super(torch.autograd.Function, _History).apply


def express(step: Step, *sources: Any) -> Expression:
    """The expression of ``step``; ``sources`` are its inputs, with their expressions in place of steps."""
    expression = _with_history(step, *[s for s in sources if isinstance(s, Tensor)]) if step.differentiable else _bare(step)
    step.expression = weakref.ref(expression)
    if _SCOPE.made is not None:
        _SCOPE.made.append(weakref.ref(step))
        if len(_SCOPE.made) >= _MANY:
            _SCOPE.made = [made for made in _SCOPE.made if made() is not None]
    return expression


def _bare(step: Step) -> Expression:
    expression = Tensor._make_wrapper_subclass(Expression, step.shape, step.strides, dtype=step.dtype, device=step.device)  # type: ignore[attr-defined]
    torch._C._set_throw_on_mutable_data_ptr(expression)  # for code that reads memory without a word: there is none
    expression.step = step
    return expression


def open_step(expression: Any, kinds: Any) -> Any:
    """Its step, if it is of one of the ``kinds`` and the next may be added to it, instead of computing it; else None."""
    if not isinstance(expression, Expression):
        return None
    step = getattr(expression, "step", None)  # another thread may have made it a plain tensor by now
    return step if isinstance(step, kinds) and step.result is None and step.mode.holds() and not _rewritten(expression) else None


def _rewritten(expression: Expression) -> bool:
    """Whether it got another history: it was made in the forward of an ``autograd.Function`` and is a result of that now."""
    step = getattr(expression, "step", None)
    if step is None or not step.mode.in_function or step.differentiable:
        return False
    with torch._C.DisableTorchFunctionSubclass():
        return expression.requires_grad


def _plain(expression: Expression) -> Tensor:
    """The tensor that it stands for; where possible, the very object."""
    if not _rewritten(expression):
        step = getattr(expression, "step", None)
        return expression if step is None else step.value()
    with torch.inference_mode(False), torch.enable_grad(), torch._C.DisableTorchFunctionSubclass():
        return _turned_into(expression, expression.clone())


def _numbers(expression: Expression) -> Tensor:
    return expression.step.detached()


def _turned_into(expression: Expression, value: Tensor) -> Tensor:
    """``expression``, which is ``value`` now; or else, where C++ code has a hold on either, ``value``."""
    try:
        with torch._C.DisableTorchFunctionSubclass():
            torch.utils.swap_tensors(expression, value)
    except RuntimeError:
        return value
    return expression


def _replaced(value: Any, replace: Callable[[Expression], Tensor]) -> Any:
    if isinstance(value, Expression):
        return replace(value)
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_replaced(item, replace) for item in value)
    if isinstance(value, dict):
        return {key: _replaced(item, replace) for key, item in value.items()}
    return value


# --- where expressions end ----------------------------------------------------------------------------------------------------------------


class _Scope(threading.local):
    """Of this thread: what the method that is running made; None while no method of a patched model is."""

    made: list[weakref.ref[Step]] | None = None

    def __init__(self) -> None:
        self.samples: list[tuple[Tensor, Tensor]] = []

    def compare_samples(self) -> None:
        """RuntimeError if those before and those at the end differ."""
        pairs, self.samples = self.samples, []
        if pairs:
            before, now = (torch.cat([sample.reshape(-1).double() for sample in samples]) for samples in zip(*pairs, strict=True))
            if not _same(before, now):
                raise RuntimeError(_CHANGED)


_SCOPE = _Scope()


@contextmanager
def no_expressions_left() -> Iterator[None]:
    """Expressions made inside that somebody still has at the end, wherever he keeps them, turn into plain tensors.

    One that can no longer be computed, as what it was made from was written to, stays one, and says so when it is used.
    """
    outside, _SCOPE.made = _SCOPE.made, []
    try:
        yield
        for step in [made() for made in _SCOPE.made]:
            expression = None if step is None or step.expression is None else step.expression()
            if expression is None:
                continue
            if step.result is not None:  # type: ignore[union-attr]  # C++ code had a hold on it then
                step.expression = None  # type: ignore[union-attr]
                _turned_into(expression, step.result.view_as(step.result))  # type: ignore[union-attr]  # who has the result keeps it
            elif step.unchanged():  # type: ignore[union-attr]
                _plain(expression)
        if outside is None:
            _SCOPE.compare_samples()
    finally:
        _SCOPE.made = outside
        if outside is None:
            _SCOPE.samples = []
