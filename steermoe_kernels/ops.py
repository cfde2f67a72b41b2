"""The custom operators: schema, fake, autograd; they pick a backend and hand it the work.

One operator a direction, ``steermoe::steer`` and ``steermoe::project``, so that torch.compile, CUDA graphs, checkpointing, DDP and FSDP
see a single node. Inputs are checked before anything is computed, in the fake as well, so that a traced call fails with the same words.

What the backward keeps of a steering pass: ``y`` (which whatever reads the stream next keeps anyway), the gates, and two numbers a
normalised frame. The step is undone, ``u = y - s (g V)``, instead of storing ``u`` and ``g V``.
"""

from __future__ import annotations

import os
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from . import choice
from .backends import Options, automatic_backend, get_backend, select_backend
from .checks import check_norm, check_pool, check_projection, check_tensors, check_top_k
from .choice import Shape
from .compiled import eager
from .reference import compute_dtype

__all__ = ["project", "steer", "steer_directly"]

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
_lib.define("project(Tensor h, Tensor weight, Tensor? bias) -> Tensor", tags=_tags)
_lib.define("project_backward(Tensor dq, Tensor h, Tensor weight, bool[] needs) -> (Tensor, Tensor, Tensor)", tags=_tags)


# --- steer ------------------------------------------------------------------------------------------------------------------------------


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


@lru_cache(maxsize=64)
def _options(num_experts: int, *settings: Any) -> Options:
    return Options(*(*settings, num_experts))


def _shape(stream: Tensor, weight: Tensor) -> Shape:
    batch, time, width = stream.shape
    return Shape(weight.shape[0], batch * time, width)


def _output_like(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    vectors: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm: str,
    eps: float,
    pool: str,
    pool_size: int,
    top_k: int,
    renormalize: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised outputs: the fake of ``steer``, and its answer where there is no frame to steer, so that nothing is in them."""
    check_tensors(x, residual, weight, bias, vectors, scale, norm_weight, norm_bias)
    batch, frames, width = x.shape
    num_experts = weight.shape[0]
    dtype = compute_dtype(x.dtype)
    gates = x.new_empty((batch, frames, num_experts), dtype=dtype)
    keeps_probs = Options(top_k=top_k, num_experts=num_experts, renormalize=renormalize).keeps_probs
    probs = torch.empty_like(gates) if keeps_probs else x.new_empty(0, dtype=dtype)
    if not norm:
        return x.new_empty(x.shape), x.new_empty(0), gates, probs, x.new_empty(0, dtype=dtype)
    pooled = -(-frames // pool_size) if pool else frames
    normed = x.new_empty((batch, pooled, width))
    return x.new_empty(x.shape), normed, gates, probs, x.new_empty((2, batch, pooled), dtype=dtype)


torch.library.register_fake("steermoe::steer", _output_like, lib=_lib)


@torch.library.impl(_lib, "steer", "CompositeExplicitAutograd")
def _steer(
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
    tensors = (x, residual, weight, bias, vectors, scale, norm_weight, norm_bias)
    check_tensors(*tensors)
    options = _options(weight.shape[0], *settings[:-1])
    module = select_backend(settings[-1], x.device, x.dtype, _shape(x, weight), options)
    if x.numel() == 0:
        return _output_like(*tensors, *settings)
    return tuple(t.contiguous() for t in module.steer_forward(*_contiguous(*tensors), options))  # type: ignore[return-value]


def _keep_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor | None, ...]) -> None:
    _, _, weight, _, vectors, scale, norm_weight, _, *settings = inputs
    y, _, gates, probs, stats = output
    ctx.save_for_backward(y, gates, probs, stats, weight, vectors, scale, norm_weight)
    ctx.way = (None, None, *settings)
    ctx.mark_non_differentiable(probs, stats)
    ctx.set_materialize_grads(False)


def _differentiate_saved(ctx: Any, saved: tuple, dy: Tensor | None, dnormed: Tensor | None, dgates: Tensor | None, *_: None) -> tuple:
    y, gates, probs, stats, weight, vectors, scale, norm_weight = saved
    need_x, need_residual, *need_parameters = ctx.needs_input_grad[:8]
    if dnormed is not None and dnormed.numel() == 0:
        dnormed = None
    needs = [need_x or need_residual, *need_parameters]
    directly, _, norm, eps, pool, pool_size, top_k, renormalize, backend = ctx.way
    settings = (norm, eps, pool, pool_size, top_k, renormalize, backend)
    nothing = (None,) * (8 + len(settings))
    if dy is None and dnormed is None and dgates is None:
        return nothing
    tensors = (dy, dnormed, dgates, y, gates, probs, stats, weight, vectors, scale, norm_weight)
    arguments = (*(_by_frames(tensors) if directly else tensors), *settings, needs)
    if torch.is_grad_enabled() or _is_observed(arguments):  # with gradients of gradients, to refuse them
        grads = torch.ops.steermoe.steer_backward(*arguments)
    else:
        grads = _needed_gradients(*arguments)
    if directly and grads[0] is not None:
        grads = (grads[0].view(y.shape), *grads[1:])
    if dnormed is None and (needs[5] or needs[6]):  # backends may leave out what is zero, but None would mean that nothing depends on it
        grads = [gates.new_zeros(y.shape[-1]) if need and grad is None else grad for grad, need in zip(grads, needs, strict=True)]
    du, *dparameters = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return (du if need_x else None, du if need_residual else None, *dparameters, *nothing[8:])


def _differentiate(ctx: Any, *grads: Any) -> tuple:
    return _differentiate_saved(ctx, ctx.saved_tensors, *grads)


torch.library.register_autograd("steermoe::steer", _differentiate, setup_context=_keep_for_backward, lib=_lib)


class _Steer(torch.autograd.Function):
    """Results that have been computed, with the way back to what they were computed from: the operator's, without its dispatcher."""

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
        results = None if is_dynamo_compiling() else _differentiate_eagerly(ctx, saved, *grads)
        return results or (*_differentiate_saved(ctx, saved, *grads)[:8], None, None)  # type: ignore[arg-type]


# Without what `Function.apply` does for functorch's transforms: where they are active, nobody comes here.
_remember = super(torch.autograd.Function, _Steer).apply


def steer(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``y``, ``normed`` and gates of ``steermoe::steer``, whose arguments these are, by a shorter way where nobody looks.

    A Python operator's way through the dispatcher and back takes longer than a short clip's frames do. It is gone only where it serves
    somebody: tracers, compilers, dispatch modes, functorch's transforms, tensors that are not what they seem, the profiler.
    """
    _refuse_forward_mode(arguments)
    if _is_observed(arguments):
        return torch.ops.steermoe.steer.default(*arguments)[:3]
    if not torch.is_grad_enabled():
        return _steer(*arguments)[:3]
    with torch.no_grad():
        results = _steer(*arguments)
    return _remember(*arguments[:8], (None, None, *arguments[8:]), results)


def steer_directly(*arguments: Any) -> tuple[Tensor, Tensor | None, Tensor] | None:
    """``y`` (..., D), ``normed`` and gates (..., E) by the backend's own direct way, where it has one and everything is as it likes it.

    None asks for the long way, with its checks. Arguments: the tensors of `functional.steer_norm`, and one tuple of norm, eps, rms, pool,
    pool_size, top_k, renormalize and backend, all of them as the caller gave them.
    """
    if is_dynamo_compiling() or forward_ad._current_level >= 0:
        return None
    return _steer_eagerly(*arguments)


def _preferred(x: Tensor, weight: Tensor) -> str | None:
    """The backend that the environment or a measurement names for a stream on a GPU."""
    if (named := os.environ.get("STEERMOE_BACKEND") or "auto") != "auto":
        return named
    try:
        shape = Shape(weight.shape[0], x.shape[:-1].numel(), x.shape[-1])
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
        options = _options(num_experts, *settings)
        module = automatic_backend(device, dtype, preferred, options) if backend == "auto" else get_backend(backend)
    except (ValueError, TypeError, RuntimeError):
        return None
    if (make := getattr(module, "direct", None)) is None or module.rejects(device, dtype, options) is not None:
        return None
    direct = make(options, backend == "auto")
    return None if direct is None else (direct.forward, direct.backward, *settings, backend)


def _by_frames(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """What the backward takes, (..., D) as a direct way has it, with frames as the operator has them: (B, T, D), absent ones of size 0."""
    dy, dnormed, dgates, y, gates, probs, stats, *parameters = tensors

    def frames(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or tensor.dim() == 3 else tensor.reshape(1, -1, tensor.shape[-1])

    nothing = gates.new_empty(0)  # type: ignore[union-attr]
    streams = (frames(dy), frames(dnormed), frames(dgates), frames(y), frames(gates))
    return (*streams, nothing if probs is None else frames(probs), nothing if stats is None else stats, *parameters)


# Each says yes where somebody wants to see operators go by; none of them is written in Python.
_WATCHERS = (
    partial(vars(torch.compiler).get, "_is_compiling_flag"),
    torch._C._len_torch_dispatch_stack,
    torch._C._are_functorch_transforms_active,
    torch._C._is_tracing,
    torch.autograd._profiler_enabled,
    partial(torch._C._dispatch_tls_is_dispatch_key_included, torch._C.DispatchKey.PreDispatch),
)
_steer_eagerly, _differentiate_eagerly, _forget_ways = eager(_WATCHERS, _preferred, _direct_way, _remember)


def _is_watched() -> bool:
    """Whether somebody wants to see operators go by."""
    return is_dynamo_compiling() or any(watcher() for watcher in _WATCHERS)


def _is_observed(arguments: tuple[Any, ...]) -> bool:
    if _is_watched():
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


def _refuse_forward_mode(arguments: tuple[Any, ...]) -> None:
    """RuntimeError for a tensor with a tangent, which torch would drop without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for argument in arguments:
        if isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
            raise RuntimeError("SteerMoE's fused operators have no forward-mode derivative; use steermoe_kernels.reference for it")


def _gradients_like(y: Tensor, gates: Tensor, weight: Tensor, needs: list[bool]) -> list[tuple[torch.Size | tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the seven gradients; size 0 for those nobody needs. Autograd rounds each to its parameter's own dtype."""
    num_experts, width = weight.shape
    shapes = (y.shape, weight.shape, (num_experts,), weight.shape, (), (width,), (width,))
    dtypes = (y.dtype, *(gates.dtype,) * 6)
    return [(shape if need else (0,), dtype) for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)]


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
) -> list[Tensor | None]:
    """The seven gradients; those nobody needs may be None."""
    *options, backend, needs = settings
    if y.numel() == 0:
        return [y.new_zeros(shape, dtype=dtype) for shape, dtype in _gradients_like(y, gates, weight, needs)]
    pass_options = _options(weight.shape[0], *options)
    module = select_backend(backend, y.device, y.dtype, _shape(y, weight), pass_options)
    return module.steer_backward(  # what was saved is contiguous, too, unless hooks have packed and unpacked it
        *_contiguous(dy, dnormed, dgates, y, gates, probs, stats, weight, vectors, scale, norm_weight),
        pass_options,
        needs,
    )


@torch.library.impl(_lib, "steer_backward", "CompositeExplicitAutograd")
def _steer_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """`_needed_gradients` as the fake promises them: contiguous, and of size 0 where nobody needs them."""
    y, gates, weight, needs = arguments[3], arguments[4], arguments[7], arguments[-1]
    return tuple(
        grad.to(dtype).contiguous() if need and grad is not None else y.new_zeros(shape, dtype=dtype)
        for grad, need, (shape, dtype) in zip(_needed_gradients(*arguments), needs, _gradients_like(y, gates, weight, needs), strict=True)
    )


@torch.library.register_fake("steermoe::steer_backward", lib=_lib)
def _(dy, dnormed, dgates, y, gates, probs, stats, weight, vectors, scale, norm_weight, *settings):  # type: ignore[no-untyped-def]
    likes = _gradients_like(y, gates, weight, settings[-1])
    return tuple(y.new_empty(shape, dtype=dtype) for shape, dtype in likes)


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("SteerMoE's fused operators are differentiable once; use steermoe_kernels.reference for second derivatives")


for _name in ("steer_backward", "project_backward"):
    torch.library.register_autograd(f"steermoe::{_name}", _refuse_second_derivative, lib=_lib)


# --- project ----------------------------------------------------------------------------------------------------------------------------
# q = n P^T + c. A GEMM with its bias is what vendors' libraries do best, so every backend leaves it to them; ours is the backward that
# computes no gradient nobody needs and takes a float32 P under a half-precision stream.


def project(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``steermoe::project``."""
    check_projection(h, weight, bias)
    _refuse_forward_mode((h, weight, bias))
    return torch.ops.steermoe.project.default(h, weight, bias)


@torch.library.impl(_lib, "project", "CompositeExplicitAutograd")
def _project(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_projection(h, weight, bias)
    with torch.autocast(h.device.type, enabled=False):
        return torch.nn.functional.linear(h, weight.to(h.dtype), None if bias is None else bias.to(h.dtype)).contiguous()


@torch.library.register_fake("steermoe::project", lib=_lib)
def _(h, weight, bias):  # type: ignore[no-untyped-def]
    check_projection(h, weight, bias)
    return h.new_empty((*h.shape[:-1], weight.shape[0]))


def _keep_for_project_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    h, weight, _ = inputs
    ctx.save_for_backward(h if ctx.needs_input_grad[1] else h.new_empty(0), weight)


def _differentiate_project(ctx: Any, dq: Tensor) -> tuple[Tensor | None, ...]:
    h, weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grads = torch.ops.steermoe.project_backward(dq, h, weight, needs)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


torch.library.register_autograd("steermoe::project", _differentiate_project, setup_context=_keep_for_project_backward, lib=_lib)


@torch.library.impl(_lib, "project_backward", "CompositeExplicitAutograd")
def _project_backward(dq: Tensor, h: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    rows = dq.reshape(-1, dq.shape[-1])
    none = dq.new_empty(0)
    with torch.autocast(dq.device.type, enabled=False):
        dh = (dq @ weight.to(dq.dtype)).contiguous() if needs[0] else none
        dweight = (rows.mT @ h.reshape(-1, h.shape[-1])).to(weight.dtype) if needs[1] else none
        dbias = rows.sum(0, dtype=compute_dtype(dq.dtype)) if needs[2] else none
    return dh, dweight, dbias


@torch.library.register_fake("steermoe::project_backward", lib=_lib)
def _(dq, h, weight, needs):  # type: ignore[no-untyped-def]
    shapes = ((*dq.shape[:-1], weight.shape[1]), weight.shape, weight.shape[:1])
    dtypes = (dq.dtype, weight.dtype, compute_dtype(dq.dtype))
    return tuple(dq.new_empty(s if need else (0,), dtype=t) for s, t, need in zip(shapes, dtypes, needs, strict=True))
