"""What the fused operators are compared with: the public formula, and the best way to spell one layer's pass in eager PyTorch.

Letters as in `steermoe_kernels.reference`. All of them take and give the stream's dtype, as eager PyTorch does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["eager_steer", "eager_steer_norm", "public_steer", "public_steer_norm"]


def public_steer(h: Tensor, router_weight: Tensor, router_bias: Tensor, vectors: Tensor, scales: Tensor, layer: int) -> Tensor:
    """As the public implementation of SteerMoE computes it (its ``efficient_layer_wise_whisper.py``): the router of every layer is
    multiplied, its part for this layer cut out, the mix and its scaled copy are written out, then added.

    ``h`` (B, T, D); ``router_weight`` (L * E, D), ``router_bias`` (L * E,), ``vectors`` (L, E, D), ``scales`` (L,). Dense routing only.
    """
    num_experts = vectors.shape[1]
    logits = F.linear(h, router_weight, router_bias)[:, :, layer * num_experts : (layer + 1) * num_experts]
    mix = torch.einsum("bte,ed->btd", torch.softmax(logits, dim=-1), vectors[layer])
    return h + scales[layer] * mix


def public_steer_norm(
    x: Tensor,
    residual: Tensor,
    router_weight: Tensor,
    router_bias: Tensor,
    vectors: Tensor,
    scales: Tensor,
    layer: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    y = public_steer(x + residual, router_weight, router_bias, vectors, scales, layer)
    return y, F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias)


def eager_steer(h: Tensor, weight: Tensor, bias: Tensor, vectors: Tensor, scale: Tensor, top_k: int | None = None) -> Tensor:
    """Two GEMMs that add as they go, on the layer's own rows, cut beforehand: nothing of size N x D is written but ``y``.

    ``h`` (B, T, D), ``weight`` (E, D), ``bias`` (E,), ``vectors`` (E, D), ``scale`` ().
    """
    u = h.reshape(-1, h.shape[-1])
    logits = torch.addmm(bias, u, weight.t())
    if top_k is None or top_k == weight.shape[0]:
        gates = torch.softmax(logits, dim=-1)
    else:
        largest, indices = logits.topk(top_k, dim=-1)
        gates = torch.zeros_like(logits).scatter(-1, indices, torch.softmax(largest, dim=-1))
    return torch.addmm(u, gates, scale * vectors).view(h.shape)


def eager_steer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    vectors: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    top_k: int | None = None,
) -> tuple[Tensor, Tensor]:
    y = eager_steer(x + residual, weight, bias, vectors, scale, top_k)
    return y, F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias)
