"""Eager calls of ``steermoe::steer``, past torch's dispatcher where nobody looks.

A Python operator's way through the dispatcher and back takes longer than a short clip's frames do. It is taken only where
something observes the call (`watchers.py`). There are two shorter ones: `steer_directly`, from the caller's tensors to results inside a
backend's compiled module, with csrc/eager.cpp to remember which; and, where that declines, `steer`, to the backend by way of Python.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from . import choice, ops
from .backends import automatic_backend, get_backend
from .checks import check_norm, check_pool, check_top_k
from .compiled import eager
from .watchers import WATCHERS, is_observed, refuse_forward_mode

__all__ = ["forget_ways", "steer", "steer_directly"]


class _Steer(torch.autograd.Function):
    """Results that have been computed, with the way back to what they were computed from: the operator's, without its dispatcher.

    The way: a direct forward and backward, both None where the results were not computed directly; then the operator's settings.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:  # no `setup_context`, for which torch looks at signatures
        _, _, weight, _, vectors, scale, norm_weight, _, way, (y, normed, gates, probs, stats) = inputs
        ctx.save_for_backward(y, gates, probs, stats, weight, vectors, scale, norm_weight)
        ctx.set_materialize_grads(False)
        ctx.way = way
        return y, normed, gates

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        saved = ctx.saved_tensors  # once: checkpointing refuses to give them twice
        results = None if is_dynamo_compiling() else _differentiate_directly(ctx, saved, *grads)
        return results or (*_differentiate(ctx, saved, *grads), None, None)  # type: ignore[arg-type]


# Without what `Function.apply` does for functorch's transforms: where they are active, nobody comes here.
_remember = super(torch.autograd.Function, _Steer).apply


def steer(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``y``, ``normed`` and gates of ``steermoe::steer``, whose arguments these are; by the operator where somebody looks."""
    refuse_forward_mode(arguments)
    if is_observed(arguments):
        return torch.ops.steermoe.steer.default(*arguments)[:3]
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return ops.steer(*arguments)[:3]
    with torch.no_grad():
        results = ops.steer(*arguments)
    return _remember(*arguments[:8], (None, None, *arguments[8:]), results)


def steer_directly(*arguments: Any) -> tuple[Tensor, Tensor | None, Tensor] | None:
    """``y`` (..., D), ``normed`` and gates (..., E) by the backend's own direct way, if it has one and accepts the arguments.

    None asks for the long way, with its checks. Arguments: the tensors of `functional.steer_norm`, and one tuple of norm, eps, rms, pool,
    pool_size, top_k, renormalize and backend, all of them as the caller gave them.
    """
    if is_dynamo_compiling() or forward_ad._current_level >= 0:
        return None
    if torch.is_inference_mode_enabled() and torch.is_grad_enabled():  # the first has the last word
        with torch.no_grad():
            return _steer_directly(*arguments)
    return _steer_directly(*arguments)


def _differentiate(
    ctx: Any, saved: tuple[Tensor | None, ...], dy: Tensor | None, dnormed: Tensor | None, dgates: Tensor | None
) -> tuple[Tensor | None, ...]:
    """As the operator does, to which absent tensors are of size 0, where a direct way has None."""
    _, _, *settings = ctx.way
    needs, (y, gates, probs, stats, *parameters) = ctx.needs_input_grad, saved
    nothing = gates.new_empty(0)  # type: ignore[union-attr]
    kept = (y, gates, nothing if probs is None else probs, nothing if stats is None else stats, *parameters)
    return ops.by_input(needs, ops.differentiate(needs, settings, kept, dy, dnormed, dgates))


def _preferred(x: Tensor, weight: Tensor) -> str | None:
    """The backend that the environment or a measurement names for a stream on a GPU."""
    if (named := os.environ.get("STEERMOE_BACKEND") or "auto") != "auto":
        return named
    try:
        shape = choice.Shape(weight.shape[0], x.shape[:-1].numel(), x.shape[-1])
    except (AttributeError, IndexError):  # no matrix, no stream: the checks have the words
        return None
    return choice.fastest(x.device, x.dtype, shape)


def _direct_way(
    device: torch.device,
    dtype: torch.dtype,
    num_experts: int,
    preferred: str | None,
    norm: str,
    eps: float,
    rms: bool,
    pool: str | None,
    pool_size: int,
    top_k: int | None,
    renormalize: bool,
    backend: str,
) -> tuple[Any, ...] | None:
    """The backend's direct forward and backward, and the operator's settings.

    None where there is no such way, or a setting is not what it should be.
    """
    kinds = (type(eps), type(rms), type(pool_size), type(renormalize), type(backend))
    if kinds != (float, bool, int, bool, str) or type(top_k) not in (int, type(None)):
        return None
    try:
        check_pool(pool, pool_size)
        check_norm(eps, rms)
        settings = ("rms" if rms and norm else norm, eps, pool or "", pool_size, check_top_k(top_k, num_experts), renormalize)
        options = ops.options_of(num_experts, *settings)
        module = automatic_backend(device, dtype, preferred, options) if backend == "auto" else get_backend(backend)
    except (ValueError, TypeError, RuntimeError):
        return None
    if (make := getattr(module, "direct", None)) is None or module.rejects(device, dtype, options) is not None:
        return None
    direct = make(options, backend == "auto")
    return None if direct is None else (direct.forward, direct.backward, *settings, backend)


_steer_directly, _differentiate_directly, forget_ways = eager(WATCHERS, _preferred, _direct_way, _remember)
