"""The fused operators as functions: `steer`, `steer_norm` and `project`. Equations and letters: `steermoe_kernels.reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import eager, projection
from .checks import check_norm, check_pool, check_renormalize, check_scale, check_stream, check_top_k, check_weight
from .reference import compute_dtype

__all__ = ["project", "steer", "steer_norm"]

# Asked now, because torch.compile of older versions cannot trace the question; torch refuses it for other types of device ("meta").
_AUTOCASTS = frozenset(kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia") if torch.amp.is_autocast_available(kind))


def steer(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vectors: Tensor,
    scale: Tensor | float,
    *,
    top_k: int | None = None,
    renormalize: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Steer every frame of ``h``: ``y = h + s (g V)``, ``g = route(h W^T + b)``.

    ``h`` (..., D) float32, float16, bfloat16 or float64, in any layout; ``weight`` (E, D), ``bias`` (E,) or None, ``vectors`` (E, D),
    ``scale`` a tensor of one element or a number: the slices of one layer, each in any of these dtypes. ``top_k`` None is dense routing;
    otherwise the gates are zero off the ``top_k`` largest logits and on them sum to one (``renormalize``) or keep the full softmax's
    values. Where a frame holds a NaN, so does its ``y``; which of its gates do is not defined.

    Returns ``y`` (..., D), contiguous, in ``h``'s dtype, and the gates (..., E) in float32 (float64 for a float64 stream); both are
    differentiable, once, in reverse mode. Raises ValueError and TypeError for arguments that do not fit, RuntimeError for a backend that
    cannot run.
    """
    settings = ("", 0.0, False, None, 1, top_k, renormalize, backend)
    results = eager.steer_directly(h, None, weight, bias, vectors, scale, None, None, settings)
    y, _, gates = results or _run(h, None, weight, bias, vectors, scale, None, None, *settings)
    return y, gates


def steer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vectors: Tensor,
    scale: Tensor | float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    rms: bool = False,
    pool: str | None = None,
    pool_size: int = 1,
    top_k: int | None = None,
    renormalize: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the residual, steer, pool over time and normalise, in one pass over the stream.

    ``x`` and ``residual`` (..., D); (B, T, D) with ``pool`` "max" or "mean", whose last window may be short. ``norm_weight`` and
    ``norm_bias`` (D,) or None, of the LayerNorm (RMSNorm with ``rms``) that reads the stream next. The rest as in `steer`. If ``x`` and
    ``residual`` differ in dtype, the stream takes the one that torch promotes both to.

    Returns ``y`` (..., D), the steered stream; ``normed`` (..., D), or (B, ceil(T / pool_size), D) with ``pool``; the gates (..., E).
    Raises as `steer`.
    """
    settings = ("layer", eps, rms, pool, pool_size, top_k, renormalize, backend)
    results = eager.steer_directly(x, residual, weight, bias, vectors, scale, norm_weight, norm_bias, settings)
    return results or _run(x, residual, weight, bias, vectors, scale, norm_weight, norm_bias, *settings)  # type: ignore[return-value]


def project(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``q = h P^T + c``: frames (..., D) to the language model's width (..., output_dim).

    ``weight`` (output_dim, D), ``bias`` (output_dim,) or None, in any of the stream's dtypes. Under autocast the product runs in
    autocast's dtype, like torch's own. Raises ValueError and TypeError for arguments that do not fit.
    """
    check_stream("h", h)
    device = h.device.type
    if device in _AUTOCASTS and torch.is_autocast_enabled(device) and h.dtype != torch.float64:
        h = h.to(torch.get_autocast_dtype(device))
    return projection.project(h, weight, bias)


def _run(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    vectors: Tensor,
    scale: Tensor | float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm: str,
    eps: float,
    rms: bool,
    pool: str | None,
    pool_size: int,
    top_k: int | None,
    renormalize: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    pool_size = check_pool(pool, pool_size)
    eps = check_norm(eps, rms)
    check_renormalize(renormalize)
    check_stream("x" if norm else "h", x, rank=3 if pool else None)
    scale = check_scale(scale, compute_dtype(x.dtype))
    if residual is not None:
        check_stream("residual", residual)
        if residual.shape != x.shape:
            raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
        if residual.dtype != x.dtype:  # under autocast a layer's output is half while the stream stays float32
            dtype = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(dtype), residual.to(dtype)
    check_weight(weight, x)
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=compute_dtype(x.dtype), device=x.device)
    elif scale.numel() == 1:
        scale = scale.reshape(())
    return eager.steer(
        x,
        residual,
        weight,
        bias,
        vectors,
        scale,
        norm_weight,
        norm_bias,
        "rms" if rms else norm,
        eps,
        pool or "",
        pool_size,
        check_top_k(top_k, weight.shape[0]),
        renormalize,
        backend,
    )
