"""Whether something has to see the operators dispatched, and an error for the derivatives that they do not have.

Tracers, compilers, dispatch modes, functorch's transforms, the profiler, tensors that are not what they seem: where there is one of them, a
call goes through torch's dispatcher, and else past it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

__all__ = ["WATCHERS", "is_observed", "refuse_forward_mode", "refuse_second_derivative"]

# Each says yes where something has to see operators dispatched; none of them is written in Python.
WATCHERS = (
    partial(vars(torch.compiler).get, "_is_compiling_flag"),
    torch._C._len_torch_dispatch_stack,
    torch._C._are_functorch_transforms_active,
    torch._C._is_tracing,
    torch.autograd._profiler_enabled,
    partial(torch._C._dispatch_tls_is_dispatch_key_included, torch._C.DispatchKey.PreDispatch),
)


def is_observed(arguments: tuple[Any, ...]) -> bool:
    """Whether somebody wants to see the operator of these arguments go by."""
    if is_dynamo_compiling() or any(watcher() for watcher in WATCHERS):
        return True
    for argument in arguments:  # noqa: SIM110 (a generator would take as long as the rest of this function)
        if isinstance(argument, Tensor) and not _is_plain(argument):
            return True
    return False


def _keys(tensor: Tensor) -> int:
    return torch._C._dispatch_keys(tensor).raw_repr()


# The dispatch keys of a dense tensor with numbers in it: the low bits stand for the device, one of them for none. Other keys are wrappers,
# views that negate, batches, zeros without storage, which the dispatcher takes care of.
_DENSE_KEYS = (_keys(torch.empty(0)) | 0xFFFF) & ~(_keys(torch.empty(0, device="meta")) & 0xFFFF)


def _is_plain(tensor: Tensor) -> bool:
    kind = type(tensor)
    return (kind is Tensor or kind is torch.nn.Parameter) and not _keys(tensor) & ~_DENSE_KEYS


def refuse_forward_mode(arguments: tuple[Any, ...]) -> None:
    """RuntimeError for a tensor with a tangent, which torch would drop without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for argument in arguments:
        if isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
            raise RuntimeError("SteerMoE's fused operators have no forward-mode derivative; use steermoe_kernels.reference for it")


def refuse_second_derivative(ctx: Any, *grads: Tensor) -> None:
    """The derivative of an operator that is a derivative: RuntimeError."""
    raise RuntimeError("SteerMoE's fused operators are differentiable once; use steermoe_kernels.reference for second derivatives")
