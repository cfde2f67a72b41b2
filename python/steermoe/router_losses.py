"""Losses that keep a router healthy: load balancing and z loss, on the router's logits over valid frames.

The fused kernels hand out gates, and gates do not tell what these losses need: a softmax is the same for logits shifted by any constant, so
the log-partition is gone, and top-k gates are zero off the selection (and constant for renormalised top-1). `record_router_logits`
therefore computes the logits again, ``z = u W^T + b``, on evenly spaced frames of every layer while the encoder runs. ``u`` is taken as it
is, without gradient: these losses move the router alone, never the steering vectors of the layers below.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from steermoe_kernels import FusedSteerMoE

__all__ = ["SampledLogits", "load_balancing_loss", "record_router_logits", "router_z_loss", "valid_logits"]

# Frames of a layer and pass whose logits are computed again: enough for means over a few experts, and little beside the encoder's own work.
SAMPLED_FRAMES = 2048


class SampledLogits(NamedTuple):
    """The logits (S, E) of every ``stride``-th frame of a pass, counted over all its clips."""

    logits: Tensor
    stride: int


def valid_logits(passes: Sequence[SampledLogits], frame_mask: Tensor | None) -> Tensor:
    """(valid frames of the samples, E) from a layer's passes over a batch.

    A single pass holds the padding that ``frame_mask`` (clips, frames) tells, True where a frame is audio; None: there is none. An encoder
    that cannot mask padding is given the clips of each length apart, in several passes, and these hold no padding.
    """
    if len(passes) > 1 or frame_mask is None:
        return torch.cat([sampled.logits for sampled in passes])
    return passes[0].logits[frame_mask.reshape(-1)[:: passes[0].stride]]


@contextmanager
def record_router_logits(aligner: FusedSteerMoE, frames: int = SAMPLED_FRAMES) -> Iterator[dict[int, list[SampledLogits]]]:
    """A dict, layer -> its passes inside the block, each by about ``frames`` of its frames, at least one.

    The frames are evenly spaced, and so the same in every run. Differentiable in the router's weights only.
    """
    record: dict[int, list[SampledLogits]] = {}

    def sample(layer: int, x: Tensor, residual: Tensor | None) -> None:
        width = x.shape[-1]
        stride = max(1, x.numel() // width // frames)
        u = x.detach().reshape(-1, width)[::stride].float()
        if residual is not None:
            u = u + residual.detach().reshape(-1, width)[::stride].float()
        weight, bias, *_ = aligner.layer(layer)
        with torch.autocast(u.device.type, enabled=False):
            record.setdefault(layer, []).append(SampledLogits(F.linear(u, weight.float(), bias.float()), stride))

    def before_forward(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample(args[1] if len(args) > 1 else kwargs.get("layer", 0), args[0] if args else kwargs["h"], None)

    fused = aligner.steer_norm

    def steer_norm(x: Tensor, layer: int, norm: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        sample(layer, x, kwargs.get("residual"))
        return fused(x, layer, norm, **kwargs)

    hook = aligner.register_forward_pre_hook(before_forward, with_kwargs=True)
    # The fused pass is a method, which no hook sees: it is shadowed on this instance while the block runs.
    object.__setattr__(aligner, "steer_norm", steer_norm)
    try:
        yield record
    finally:
        object.__delattr__(aligner, "steer_norm")
        hook.remove()


def load_balancing_loss(logits: Tensor, top_k: int | None = None) -> Tensor:
    """Switch Transformer's auxiliary loss of one layer: 1 where the experts share the frames evenly, up to E where one takes all.

    ``L = E sum_e f_e P_e``, with ``f_e`` the share of the frames' selections that fall on expert ``e`` and ``P_e`` the mean over frames of
    ``softmax(z)_e`` (Fedus, Zoph, Shazeer 2021, arXiv 2101.03961, equations 4 to 6; selections are the ``top_k`` largest, and for dense
    routing, None, the largest). ``logits`` (frames, E) of valid frames; a scalar in float32, differentiable through ``P``; 0 for no frames.
    """
    if not len(logits):
        return logits.sum()
    num_experts = logits.shape[-1]
    chosen = logits.detach().topk(top_k or 1, dim=-1).indices
    share = torch.bincount(chosen.reshape(-1), minlength=num_experts) / chosen.numel()
    return num_experts * (share * logits.softmax(dim=-1).mean(dim=0)).sum()


def router_z_loss(logits: Tensor) -> Tensor:
    """ST-MoE's z loss of one layer, which keeps logits small: ``L = mean over frames of (log sum_e exp z_e)^2``.

    Zoph et al. 2022, arXiv 2202.08906, equation 5. ``logits`` (frames, E) of valid frames; a scalar in float32; 0 for no frames.
    """
    if not len(logits):
        return logits.sum()
    return logits.logsumexp(dim=-1).square().mean()
