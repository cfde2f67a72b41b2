"""The definition: SteerMoE's layer-wise steering in plain PyTorch, written to be read.

Every backend is held against this file. It imports only torch, works in float64 (``gradcheck``) and on any device.

Letters, as in the paper (arXiv 2510.13558) and throughout the kernels: ``N`` frames, ``D`` width, ``E`` experts, ``L`` layers;
for one layer ``W (E, D)`` and ``b (E,)`` are its rows of the router, ``V (E, D)`` its steering vectors, ``s ()`` its scale.

    u = x + r            r: the residual stream, optional
    z = u W^T + b
    g = route(z)
    y = u + s (g V)
    p = pool(y)          optional, over time
    n = norm(p)          optional
    q = n P^T + c        optional

Half-precision tensors are computed in float32 and rounded once, at the end.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "SteerMoEAligner",
    "compute_dtype",
    "normalize",
    "pool_frames",
    "project",
    "route",
    "select_top_k",
    "steer",
    "steer_norm",
]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; every other stream is accumulated in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def select_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Boolean mask (..., E) of each frame's ``top_k`` largest logits; NaN counts as the largest, of equal ones the lowest index wins."""
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order[..., :top_k], True)


def route(logits: Tensor, top_k: int | None = None, renormalize: bool = True) -> Tensor:
    """Gates (..., E) from logits (..., E).

    Dense (``top_k`` None or E): the softmax over all experts. Otherwise zero off the ``top_k`` largest, and on them the softmax over
    those alone (``renormalize``) or the full softmax's values (``renormalize=False``).
    """
    num_experts = logits.shape[-1]
    if top_k is None or top_k == num_experts:
        return torch.softmax(logits, dim=-1)
    selected = select_top_k(logits.detach(), top_k)
    if renormalize:
        return torch.softmax(logits.masked_fill(~selected, -torch.inf), dim=-1)
    return torch.where(selected, torch.softmax(logits, dim=-1), 0.0)


def pool_frames(y: Tensor, kind: str, size: int) -> Tensor:
    """Max or mean over windows of ``size`` frames, stride ``size``: (B, T, D) -> (B, ceil(T / size), D).

    A short last window pools the frames it has. The gradient of a maximum goes to the first of equal frames. ValueError for another kind.
    """
    if kind not in ("max", "mean"):
        raise ValueError(f"kind must be 'max' or 'mean', got {kind!r}")
    if y.shape[0] * y.shape[1] == 0:
        return y.new_zeros(y.shape[0], -(-y.shape[1] // size), y.shape[2]) + y.sum()
    size = min(size, y.shape[1])
    if kind == "max":
        return F.max_pool1d(y.mT, size, ceil_mode=True).mT
    return F.avg_pool1d(y.mT, size, ceil_mode=True).mT


def normalize(p: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5, rms: bool = False) -> Tensor:
    """LayerNorm, or RMSNorm with ``rms``, over the last dimension: (..., D) -> (..., D), ``weight`` and ``bias`` (D,) or None.

    ``n = weight (p - mean) / sqrt(var + eps) + bias``, the population's variance; RMSNorm without the mean.
    """
    centered = p if rms else p - p.mean(-1, keepdim=True)
    n = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        n = n * weight
    if bias is not None:
        n = n + bias
    return n


def _upcast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor]:
    return [t if t is None else t.to(dtype) for t in tensors]  # type: ignore[misc]


def steer(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vectors: Tensor,
    scale: Tensor | float,
    *,
    residual: Tensor | None = None,
    top_k: int | None = None,
    renormalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """Steer every frame: ``y = u + s (g V)`` with ``g = route(u W^T + b)``, ``u = h + residual``.

    ``h`` (..., D), ``weight`` (E, D), ``bias`` (E,), ``vectors`` (E, D), ``scale`` (). Returns ``y`` (..., D) in ``h``'s dtype and the
    gates (..., E) in float32 (float64 for a float64 stream).
    """
    dtype = compute_dtype(h.dtype)
    u, r, W, b, V = _upcast(dtype, h, residual, weight, bias, vectors)
    s = torch.as_tensor(scale, dtype=dtype, device=h.device)
    if r is not None:
        u = u + r
    gates = route(F.linear(u, W, b), top_k, renormalize)
    y = u + s * (gates @ V)
    return y.to(h.dtype), gates


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the residual, steer, pool over time, normalise.

    ``n = norm(pool(u + s (g V)))`` with ``u = x + residual``. ``x`` (..., D), or (B, T, D) with ``pool`` "max" or "mean"; ``norm_weight``
    and ``norm_bias`` (D,) or None. Returns ``y`` (..., D) and ``normed`` (..., D) or (B, ceil(T / pool_size), D), both in ``x``'s dtype,
    and the gates (..., E) in float32 (float64 for a float64 stream).
    """
    dtype = compute_dtype(x.dtype)
    u, r, gamma, beta = _upcast(dtype, x, residual, norm_weight, norm_bias)
    y, gates = steer(u, weight, bias, vectors, scale, residual=r, top_k=top_k, renormalize=renormalize)
    p = y if pool is None else pool_frames(y, pool, pool_size)
    normed = normalize(p, gamma, beta, eps, rms)
    return y.to(x.dtype), normed.to(x.dtype), gates


def project(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``q = n P^T + c``: (..., D) -> (..., output_dim), ``weight`` (output_dim, D), ``bias`` (output_dim,)."""
    n, P, c = _upcast(compute_dtype(h.dtype), h, weight, bias)
    return F.linear(n, P, c).to(h.dtype)


class SteerMoEAligner(nn.Module):
    """The plain aligner: the same parameters and ``state_dict`` as `FusedSteerMoE`, differentiated by PyTorch.

    Parameters: ``steering_vectors`` (L, E, D) drawn from 0.01 N(0, 1); ``router``, a Linear(D, L * E); ``layer_scales`` (L,), each
    ``steering_scale``; ``prompt_proj``, a Linear(D, output_dim), or None.
    """

    def __init__(
        self,
        feature_dim: int,
        num_experts: int = 8,
        num_layers: int = 1,
        *,
        top_k: int | None = None,
        renormalize: bool = True,
        steering_scale: float = 0.1,
        output_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.feature_dim, self.num_experts, self.num_layers = feature_dim, num_experts, num_layers
        self.top_k, self.renormalize = top_k, renormalize
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.steering_vectors = nn.Parameter(0.01 * torch.randn(num_layers, num_experts, feature_dim, **like))
        self.router = nn.Linear(feature_dim, num_layers * num_experts, **like)
        self.layer_scales = nn.Parameter(torch.full((num_layers,), steering_scale, **like))
        self.prompt_proj = None if output_dim is None else nn.Linear(feature_dim, output_dim, **like)

    def forward(self, h: Tensor, layer: int = 0, *, return_gates: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Steer ``h`` (..., D) with the experts of ``layer``."""
        rows = slice(layer * self.num_experts, (layer + 1) * self.num_experts)
        y, gates = steer(
            h,
            self.router.weight[rows],
            self.router.bias[rows],
            self.steering_vectors[layer],
            self.layer_scales[layer],
            top_k=self.top_k,
            renormalize=self.renormalize,
        )
        return (y, gates) if return_gates else y

    def project(self, h: Tensor) -> Tensor:
        """Project pooled, normalised frames (..., D) to the language model's width (..., output_dim)."""
        if self.prompt_proj is None:
            raise ValueError("this aligner has no projection: give output_dim when making it")
        return project(h, self.prompt_proj.weight, self.prompt_proj.bias)
