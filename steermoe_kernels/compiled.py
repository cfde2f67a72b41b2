"""A steering pass as the compiled backends take it: addresses, sizes, and numbers for names (csrc/steer.h)."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import Options
from .reference import compute_dtype

__all__ = ["DTYPES", "DirectWay", "address", "backward_results", "direct_way", "eager", "forward_results", "problem"]

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
_NORMS = {"": 0, "layer": 1, "rms": 2}
_POOLS = {"": 0, "max": 1, "mean": 2}


def address(tensor: Tensor | None) -> int:
    """Where a tensor's numbers are; 0 for one that is absent or empty."""
    return 0 if tensor is None else tensor.data_ptr()


def problem(
    module: ModuleType,
    stream: Tensor,
    options: Options,
    weight: Tensor,
    bias: Tensor | None,
    vectors: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
) -> Any:
    """The compiled ``module``'s ``Problem`` for a stream (B, T, D) and the parameters of its pass."""
    batch, time, width = stream.shape
    pool_size = options.pool_size if options.pool else 1
    return module.Problem(  # by position, which is faster than by name
        (batch, time, -(-time // pool_size), width, options.num_experts, options.top_k, pool_size),
        options.renormalize,
        _NORMS[options.norm],
        _POOLS[options.pool],
        options.eps,
        DTYPES[stream.dtype],
        _operand(weight),
        _operand(bias),
        _operand(vectors),
        _operand(scale),
        _operand(norm_weight),
        _operand(norm_bias),
    )


def _operand(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.data_ptr(), DTYPES[tensor.dtype])


def forward_results(x: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for ``(y, normed, gates, probs, stats)`` of a stream (..., D), as `steermoe_kernels.backends` describes them."""
    *lead, width = x.shape
    gates = x.new_empty((*lead, options.num_experts), dtype=compute_dtype(x.dtype))
    probs = torch.empty_like(gates) if options.keeps_probs else gates.new_empty(0)
    if options.pool:
        lead[1] = -(-lead[1] // options.pool_size)
    normed = x.new_empty((*lead, width) if options.norm else 0)
    clips = lead if len(lead) == 2 else (1, math.prod(lead))
    stats = gates.new_empty((2, *clips) if options.norm else 0)
    return x.new_empty(x.shape), normed, gates, probs, stats


def backward_results(y: Tensor, gates: Tensor, weight: Tensor, needs: list[bool]) -> list[Tensor | None]:
    """Room for the gradients that are needed, None for the others."""
    num_experts, width = weight.shape
    shapes = ((num_experts, width), (num_experts,), (num_experts, width), (), (width,), (width,))
    return [
        y.new_empty(y.shape) if needs[0] else None,
        *(gates.new_empty(shape) if need else None for shape, need in zip(shapes, needs[1:], strict=True)),
    ]


class DirectWay(NamedTuple):
    """Tensors to tensors in one call of a compiled module (csrc/direct.h), as `steermoe_kernels.backends` describes it."""

    forward: Callable[..., tuple[Tensor | None, ...] | None]
    backward: Callable[..., tuple[Tensor | None, ...] | None]


def direct_way(module: ModuleType, options: Options, automatic: bool) -> DirectWay | None:
    """The compiled ``module``'s, None where this torch does not show its tensors to compiled code, or STEERMOE_DIRECT is 0."""
    if os.environ.get("STEERMOE_DIRECT") == "0" or not module.connect_tensors(Tensor, torch.nn.Parameter):
        return None
    # By name: an option that the compiled code does not know is an error, not one that eager calls alone pass over.
    settings = vars(options) | {"norm": _NORMS[options.norm], "pool": _POOLS[options.pool]}
    return DirectWay(*module.direct_way(**settings, automatic=automatic))


def eager(
    watchers: tuple[Callable[[], Any], ...],
    prefer: Callable[[Tensor, Tensor], str | None],
    find: Callable[..., tuple[Any, ...] | None],
    remember: Callable[..., tuple[Tensor | None, ...]],
) -> tuple[Callable[..., Any], ...]:
    """The functions ``steer``, ``differentiate`` and ``forget`` of csrc/eager.cpp, for all backends. Where it cannot run, they do nothing.

    ``watchers``: whether somebody wants to see operators go by. ``prefer(x, weight)``: name of the backend preferred for a stream that is
    not on the CPU, or None. ``find(device, dtype, num_experts, preferred, *settings)``: the backend's way, a tuple that begins with its
    forward and backward, or None; it is asked once for the same arguments. ``remember(*tensors, way, results)``: ``y``, ``normed`` and
    gates of these results, for which autograd now knows the way back to the eight tensors.
    """
    try:
        module = importlib.import_module("steermoe_kernels._cpu")
    except ImportError:
        module = None
    if module is None or not module.connect_tensors(Tensor, torch.nn.Parameter):
        return (lambda *arguments: None,) * 3
    hooks = partial(torch._C._autograd._top_saved_tensors_default_hooks, True)  # which torch 2.6 and 2.7 do not have
    return module.eager(watchers, torch.is_grad_enabled, hooks, prefer, find, remember)
