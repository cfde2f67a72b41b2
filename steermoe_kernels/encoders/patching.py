"""`patch_steermoe`: an instance of the public implementation, made to run on the fused operator.

Every version of the public code (github.com/forfrt/SteerMoE) writes the same formula in its own loop. The loop is left alone. Only the
router answers differently: with an expression (`expressions.py`) that takes up the steps of the formula (`formula.py`) until one fused pass
can compute them all. What the methods of the module with the steering vectors leave behind is plain tensors again.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from ..backends import get_backend
from ..modules import FusedSteerMoE
from ..reference import SteerMoEAligner
from .class_swap import Swapped, swap
from .expressions import no_expressions_left
from .formula import router_logits

__all__ = ["patch_steermoe"]


def patch_steermoe(model: nn.Module, *, backend: str = "auto") -> nn.Module:
    """Make ``model``, or every part of it that is public SteerMoE code, run on the fused operator; in place, weights shared.

    A part is public SteerMoE code if it has ``steering_vectors`` and a ``router``, a ``shared_router`` or ``routers`` of class
    ``nn.Linear``. Outputs, returned gates and the gradients of parameters and inputs are those of the public code; parameters,
    ``state_dict`` and copies stay as they are. Patching again only changes ``backend``. Under torch.compile and the transforms of
    torch.func, and while the router has hooks, the public formula runs as written. What differs, where the formula is fused:

    - The steered stream does not depend on the gates that autograd knows: ``gates.grad``, hooks on gates and ``autograd.grad(loss, gates)``
      have the part that comes of using the gates themselves, not the part that comes along the stream.
    - The backward needs the steered stream: writing to it in place (``x.clamp_(...)``) makes the backward raise torch's error.
    - Writing to the stream between ``router(x)`` and the sum makes the sum raise RuntimeError: what the gates are made of is gone. In
      inference mode that is told by one number of each frame, so a write that leaves all of these as they are goes unnoticed, as does one
      while a CUDA graph is captured, and, in any mode, one through ``.data``.
    - Changing ``requires_grad`` of the stream or a parameter in between raises the same, and the fused backward wants parameters unchanged
      that the public one, of a frozen router, does not need.
    - Second derivatives raise RuntimeError, and so does an ``autograd.Function`` that writes in place to what it got of the formula.

    Raises TypeError for anything but a module, ValueError where there is no such part, and as `get_backend`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn module, got {type(model).__name__}")
    if backend != "auto":
        get_backend(backend)
    parts = [(module, routers) for module in model.modules() if (routers := _routers(module))]
    if not parts:
        raise ValueError(
            f"{type(model).__name__} holds no public SteerMoE code: no module with steering_vectors and an nn.Linear called router, "
            "shared_router, or in routers"
        )
    for module, routers in parts:
        for router in routers:
            if isinstance(router, PatchedRouter):
                router.__dict__["_backend"] = backend
            else:
                swap(router, PatchedRouter, _backend=backend)
        if not isinstance(module, PatchedSteering):
            swap(module, PatchedSteering)
    return model


def _routers(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, (FusedSteerMoE, SteerMoEAligner)) or not isinstance(getattr(module, "steering_vectors", None), Tensor):
        return []
    named = [getattr(module, name, None) for name in ("router", "shared_router")]
    several = getattr(module, "routers", None)
    named += list(several) if isinstance(several, (nn.ModuleList, list, tuple)) else []
    return [
        router
        for router in named
        if isinstance(router, nn.Linear)
        and (isinstance(router, PatchedRouter) or type(router).forward is nn.Linear.forward)
        and "forward" not in router.__dict__
    ]


# --- what is exchanged in the model -----------------------------------------------------------------------------------------------------


_PLAIN = (Tensor, nn.Parameter)


class PatchedRouter(Swapped):
    """A Linear that answers with `Logits` where the fused operator can take over."""

    _added: ClassVar[tuple[str, ...]] = ("_backend",)

    def forward(self, x: Tensor) -> Any:
        weight, bias = self.weight, self.bias
        if not self._may_wait(x, weight, bias):
            return super().forward(x)  # type: ignore[misc]
        return router_logits(x, weight, bias, self._backend)

    def _may_wait(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        return not (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
            or self._forward_hooks
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
            or _has_any_global_hook()
            or type(x) not in _PLAIN
            or type(weight) not in _PLAIN
            or (bias is not None and type(bias) not in _PLAIN)
            or x.device != weight.device
            or x.device.type == "meta"
            or x.dim() == 0
            or x.shape[-1] != weight.shape[1]
            or not self._dtypes_agree(x, weight)
        )

    def _dtypes_agree(self, x: Tensor, weight: Tensor) -> bool:
        """Whether the public formula would return the stream in ``x``'s dtype, as the fused operator does."""
        if torch.is_autocast_enabled(x.device.type):
            return x.dtype in (torch.float32, torch.get_autocast_dtype(x.device.type))
        return x.dtype == weight.dtype


class PatchedSteering(Swapped):
    """The module with the steering vectors: what its methods made and somebody keeps is tensors, not expressions, when they end."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls._plain.__mro__:
            if base in nn.Module.__mro__:
                break
            for name, method in vars(base).items():
                if isinstance(method, FunctionType) and not name.startswith("__") and name not in vars(cls):
                    setattr(cls, name, _returning_tensors(method))


def _returning_tensors(method: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.isgeneratorfunction(method):

        @functools.wraps(method)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return _yielding_tensors(method(*args, **kwargs))
    else:

        @functools.wraps(method)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return method(*args, **kwargs)
            with no_expressions_left():
                return method(*args, **kwargs)

    return wrapper


def _yielding_tensors(generator: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """``generator``, between whose steps other code runs."""
    resume, value = generator.send, None
    while True:
        try:
            with no_expressions_left():
                item = resume(value)
        except StopIteration as end:
            return end.value
        try:
            resume, value = generator.send, (yield item)
        except GeneratorExit:
            generator.close()
            raise
        except BaseException as error:
            resume, value = generator.throw, error
