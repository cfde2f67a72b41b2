"""The custom operator ``steermoe::steer``: schema, fake, autograd; it picks a backend and hands it the work.

One operator a direction, so that torch.compile, CUDA graphs, checkpointing, DDP and FSDP see a single node. Inputs are checked before
anything is computed, in the fake as well, so that a traced call fails with the same words. `eager.py` is the way past torch's dispatcher,
`projection.py` the operator ``steermoe::project``.

Streams are (..., D) to the operator and (B, T, D) to backends. Were they reshaped by its caller, autograd would undo that for ``x`` and for
``residual``, whose gradient is the same tensor: two views of one piece of memory, into both of which it then adds what comes next.

What the backward keeps of a steering pass: ``y`` (which whatever reads the stream next keeps anyway), the gates, and two numbers a
normalised frame. The step is undone, ``u = y - s (g V)``, instead of storing ``u`` and ``g V``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .backends import Options, select_backend
from .checks import check_memory, check_stream, check_tensors
from .choice import Shape
from .compiled import backward_results, forward_results
from .watchers import is_observed, refuse_second_derivative

__all__ = ["by_input", "differentiate", "options_of", "steer"]

_lib = torch.library.Library("steermoe", "DEF")
_tags = (torch.Tag.pt2_compliant_tag,)

_OPTIONS = "str norm, float eps, str pool, int pool_size, int top_k, bool renormalize, str backend"
_lib.define(
    "steer(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, Tensor vectors, Tensor scale, Tensor? norm_weight, Tensor? norm_bias, "
    f"{_OPTIONS}) -> (Tensor y, Tensor normed, Tensor gates, Tensor probs, Tensor stats)",
    tags=_tags,
)
_lib.define(
    "steer_backward(Tensor? dy, Tensor? dnormed, Tensor? dgates, Tensor y, Tensor gates, Tensor probs, Tensor stats, Tensor weight, "
    f"Tensor vectors, Tensor scale, Tensor? norm_weight, {_OPTIONS}, bool[] needs) -> "
    "(Tensor du, Tensor dweight, Tensor dbias, Tensor dvectors, Tensor dscale, Tensor dnorm_weight, Tensor dnorm_bias)",
    tags=_tags,
)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


@lru_cache(maxsize=64)
def options_of(num_experts: int, *settings: Any) -> Options:
    """``norm`` to ``renormalize`` of the schema, with the number of experts."""
    return Options(*(*settings, num_experts))


def _shape(stream: Tensor, weight: Tensor) -> Shape:
    return Shape(weight.shape[0], math.prod(stream.shape[:-1]), stream.shape[-1])


def _frames(tensor: Tensor | None) -> Tensor | None:
    """(B, T, ...) for backends; absent ones, of size 0, as they are."""
    if tensor is None or tensor.dim() == 3 or tensor.numel() == 0:
        return tensor
    return tensor.reshape(1, math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _unframed(tensor: Tensor, lead: torch.Size) -> Tensor:
    """(..., n) again, for a stream whose shape begins with ``lead``. Not a view to autograd: nobody else has the tensor."""
    if tensor.dim() - 1 == len(lead) or tensor.numel() == 0:
        return tensor
    return torch.ops.aten._unsafe_view(tensor, (*lead, tensor.shape[-1]))


# --- forward ----------------------------------------------------------------------------------------------------------------------------


def _check_inputs(tensors: Sequence[Any], pool: str) -> None:
    check_tensors(*tensors)
    if pool:
        check_stream("x", tensors[0], rank=3)


def _results_like(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised results: the fake of ``steer``, and its answer where there is no frame to steer, so that nothing is in them."""
    *tensors, norm, eps, pool, pool_size, top_k, renormalize, _ = arguments
    _check_inputs(tensors, pool)
    x, _, weight, *_ = tensors
    return forward_results(x, Options(norm, eps, pool, pool_size, top_k, renormalize, weight.shape[0]))


torch.library.register_fake("steermoe::steer", _results_like, lib=_lib)


@torch.library.impl(_lib, "steer", "CompositeExplicitAutograd")
def steer(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    vectors: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``steermoe::steer`` without its dispatcher and without autograd."""
    tensors = (x, residual, weight, bias, vectors, scale, norm_weight, norm_bias)
    options = options_of(weight.shape[0], *settings[:-1])
    _check_inputs(tensors, options.pool)
    module = select_backend(settings[-1], x.device, x.dtype, _shape(x, weight), options)
    if x.numel() == 0:
        return _results_like(*tensors, *settings)
    check_memory(
        x=x, residual=residual, weight=weight, bias=bias, vectors=vectors, scale=scale, norm_weight=norm_weight, norm_bias=norm_bias
    )
    streams = (_frames(x), _frames(residual), *tensors[2:])
    *results, stats = (t.contiguous() for t in module.steer_forward(*_contiguous(*streams), options))
    return *(_unframed(t, x.shape[:-1]) for t in results), stats  # type: ignore[return-value]


# --- backward ---------------------------------------------------------------------------------------------------------------------------


def _keep_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor | None, ...]) -> None:
    _, _, weight, _, vectors, scale, norm_weight, _, *settings = inputs
    y, _, gates, probs, stats = output
    ctx.save_for_backward(y, gates, probs, stats, weight, vectors, scale, norm_weight)
    ctx.settings = settings
    ctx.mark_non_differentiable(probs, stats)
    ctx.set_materialize_grads(False)


def differentiate(
    needs_input_grad: Sequence[bool],
    settings: Sequence[Any],
    saved: Sequence[Tensor | None],
    dy: Tensor | None,
    dnormed: Tensor | None,
    dgates: Tensor | None,
) -> list[Tensor | None]:
    """The seven gradients of ``steer_backward``, None for those not needed, from what the forward saved; by the operator where it is seen.

    ``needs_input_grad`` is autograd's, for the eight tensors of ``steer``; ``settings`` are the schema's.
    """
    if dnormed is not None and dnormed.numel() == 0:
        dnormed = None
    if dy is None and dnormed is None and dgates is None:
        return [None] * 7
    needs = [needs_input_grad[0] or needs_input_grad[1], *needs_input_grad[2:8]]
    y, gates, probs, stats, weight, vectors, scale, norm_weight = saved
    arguments = (dy, dnormed, dgates, y, gates, probs, stats, weight, vectors, scale, norm_weight, *settings, needs)
    if torch.is_grad_enabled() or is_observed(arguments):  # with gradients of gradients, to refuse them
        grads = torch.ops.steermoe.steer_backward(*arguments)
    else:
        grads = _needed_gradients(*arguments)  # type: ignore[arg-type]
    if dnormed is None and (needs[5] or needs[6]):  # backends may leave out what is zero, but None would mean that nothing depends on it
        grads = [gates.new_zeros(y.shape[-1]) if need and grad is None else grad for grad, need in zip(grads, needs, strict=True)]  # type: ignore[union-attr]
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def by_input(needs_input_grad: Sequence[bool], grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients at the eight tensors of ``steer``: that of the stream is the residual's, too."""
    du, *dparameters = grads
    return (du if needs_input_grad[0] else None, du if needs_input_grad[1] else None, *dparameters)


def _differentiate(ctx: Any, dy: Tensor | None, dnormed: Tensor | None, dgates: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grads = differentiate(ctx.needs_input_grad, ctx.settings, ctx.saved_tensors, dy, dnormed, dgates)
    return (*by_input(ctx.needs_input_grad, grads), *(None for _ in ctx.settings))


torch.library.register_autograd("steermoe::steer", _differentiate, setup_context=_keep_for_backward, lib=_lib)


def _gradients_like(y: Tensor, gates: Tensor, weight: Tensor, needs: list[bool]) -> list[Tensor]:
    """The seven gradients, uninitialised; of size 0 where nobody needs them. Autograd rounds each to its parameter's own dtype."""
    du, *others = backward_results(y, gates, weight, needs)
    return [y.new_empty(0) if du is None else du, *(gates.new_empty(0) if grad is None else grad for grad in others)]


def _needed_gradients(
    dy: Tensor | None,
    dnormed: Tensor | None,
    dgates: Tensor | None,
    y: Tensor,
    gates: Tensor,
    probs: Tensor,
    stats: Tensor,
    weight: Tensor,
    vectors: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    *settings: Any,
) -> Sequence[Tensor | None]:
    """The seven gradients; those nobody needs may be None."""
    *of_pass, backend, needs = settings
    if y.numel() == 0:
        return [grad.zero_() for grad in _gradients_like(y, gates, weight, needs)]
    options = options_of(weight.shape[0], *of_pass)
    check_memory(
        dy=dy, dnormed=dnormed, dgates=dgates, y=y, gates=gates, weight=weight, vectors=vectors, scale=scale, norm_weight=norm_weight
    )
    module = select_backend(backend, y.device, y.dtype, _shape(y, weight), options)
    streams = map(_frames, (dy, dnormed, dgates, y, gates, probs))
    du, *others = module.steer_backward(  # what was saved is contiguous, too, unless hooks have packed and unpacked it
        *_contiguous(*streams, stats, weight, vectors, scale, norm_weight), options, needs
    )
    return [None if du is None else _unframed(du.contiguous(), y.shape[:-1]), *others]


@torch.library.impl(_lib, "steer_backward", "CompositeExplicitAutograd")
def _steer_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """`_needed_gradients` as the fake promises them: contiguous, and of size 0 where nobody needs them."""
    y, gates, weight, needs = arguments[3], arguments[4], arguments[7], arguments[-1]
    grads = [grad if need else None for grad, need in zip(_needed_gradients(*arguments), needs, strict=True)]
    left_out = _gradients_like(y, gates, weight, [need and grad is None for grad, need in zip(grads, needs, strict=True)])
    return tuple(zero.zero_() if grad is None else grad.contiguous() for grad, zero in zip(grads, left_out, strict=True))


@torch.library.register_fake("steermoe::steer_backward", lib=_lib)
def _(dy, dnormed, dgates, y, gates, probs, stats, weight, vectors, scale, norm_weight, *settings):  # type: ignore[no-untyped-def]
    return tuple(_gradients_like(y, gates, weight, settings[-1]))


torch.library.register_autograd("steermoe::steer_backward", refuse_second_derivative, lib=_lib)
