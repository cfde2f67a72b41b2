"""Plain PyTorch, everywhere: the forward of `steermoe_kernels.reference` and the invertible backward.

Also the model for a new backend: the same functions, the same letters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from . import PLAIN, Options

AUTO_DEVICES: frozenset[str] = frozenset()  # the choice where nothing better is, see `automatic_backend`
PRIORITY = 0


def unavailable() -> str | None:
    return None


def rejects(device: torch.device, dtype: torch.dtype, options: Options = PLAIN) -> str | None:
    return None


def steer_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    vectors: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = reference.compute_dtype(x.dtype)
    # Autocast reaches into custom operators; the accumulation dtype is ours to keep.
    with torch.autocast(x.device.type, enabled=False):
        W, V, s = weight.to(dtype), vectors.to(dtype), scale.to(dtype)
        u = x.to(dtype) if residual is None else x.to(dtype) + residual.to(dtype)
        z = F.linear(u, W, None if bias is None else bias.to(dtype))
        g = reference.route(z, options.top_k, options.renormalize)
        probs = torch.softmax(z, -1) if options.keeps_probs else z.new_empty(0)
        y = (u + s * (g @ V)).to(x.dtype)
        if not options.norm:
            return y, x.new_empty(0), g, probs, z.new_empty(0)
        # Pooled and normalised as it is stored: the backward sees nothing else, and its xhat and maxima are then the same.
        y_ = y.to(dtype)
        p = reference.pool_frames(y_, options.pool, options.pool_size) if options.pool else y_
        mean = torch.zeros_like(p[..., 0]) if options.norm == "rms" else p.mean(-1)
        rstd = torch.rsqrt((p - mean[..., None]).square().mean(-1) + options.eps)
        n = (p - mean[..., None]) * rstd[..., None]
        if norm_weight is not None:
            n = n * norm_weight.to(dtype)
        if norm_bias is not None:
            n = n + norm_bias.to(dtype)
        return y, n.to(x.dtype), g, probs, torch.stack((mean, rstd))


def steer_backward(
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
    options: Options,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    dtype = gates.dtype
    need_u, need_weight, need_bias, need_vectors, need_scale, need_gamma, need_beta = needs
    dgamma = dbeta = du = dW = db = dV = ds = None
    with torch.autocast(y.device.type, enabled=False):
        W, V, s, g = weight.to(dtype), vectors.to(dtype), scale.to(dtype), gates
        y_ = y.to(dtype)

        d = torch.zeros_like(y_) if dy is None else dy.to(dtype)
        if dnormed is not None:
            dn = dnormed.to(dtype)
            p = reference.pool_frames(y_, options.pool, options.pool_size) if options.pool else y_
            mean, rstd = stats[0][..., None], stats[1][..., None]
            xhat = (p - mean) * rstd
            dgamma = (dn * xhat).sum((0, 1)) if need_gamma else None
            dbeta = dn.sum((0, 1)) if need_beta else None
            t = dn if norm_weight is None else dn * norm_weight.to(dtype)
            centre = 0.0 if options.norm == "rms" else t.mean(-1, keepdim=True)
            dp = rstd * (t - centre - xhat * (t * xhat).mean(-1, keepdim=True))
            d = d + (_unpool(dp, y_, options) if options.pool else dp)

        u = y_ - s * (g @ V)
        a = d @ V.mT
        ds = (g * a).sum() if need_scale else None
        dg = s * a if dgates is None else s * a + dgates.to(dtype)
        if options.keeps_probs:
            dg = torch.where(g != 0, dg, 0.0)
            dz = probs * (dg - (probs * dg).sum(-1, keepdim=True))
        else:
            dz = g * (dg - (g * dg).sum(-1, keepdim=True))
        du = (d + dz @ W).to(y.dtype) if need_u else None
        dW = dz.flatten(0, 1).mT @ u.flatten(0, 1) if need_weight else None
        db = dz.sum((0, 1)) if need_bias else None
        dV = s * (g.flatten(0, 1).mT @ d.flatten(0, 1)) if need_vectors else None
    return du, dW, db, dV, ds, dgamma, dbeta


def _unpool(dp: Tensor, y: Tensor, options: Options) -> Tensor:
    """Hand each pooled gradient (B, P, D) back to its window: the first of the largest frames, or an equal share to each."""
    frames, size = y.shape[1], options.pool_size
    if options.pool == "max":
        size = min(size, frames)
        indices = F.max_pool1d(y.mT, size, ceil_mode=True, return_indices=True)[1].mT
        return torch.zeros_like(y).scatter_(1, indices, dp)
    window = torch.arange(frames, device=y.device) // size
    counts = torch.bincount(window)
    return (dp / counts[:, None])[:, window]
