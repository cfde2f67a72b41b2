"""The custom operator ``steermoe::project``: q = n P^T + c, the projection to the language model's width.

A GEMM with its bias is what vendors' libraries do best, so every backend leaves it to them; ours is the backward that computes no gradient
nobody needs and takes a float32 P under a half-precision stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check_projection
from .reference import compute_dtype
from .watchers import refuse_forward_mode, refuse_second_derivative

__all__ = ["project"]

_lib = torch.library.Library("steermoe", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_lib.define("project(Tensor h, Tensor weight, Tensor? bias) -> Tensor", tags=_tags)
_lib.define("project_backward(Tensor dq, Tensor h, Tensor weight, bool[] needs) -> (Tensor, Tensor, Tensor)", tags=_tags)


def project(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``steermoe::project``."""
    check_projection(h, weight, bias)
    refuse_forward_mode((h, weight, bias))
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


def _keep_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    h, weight, _ = inputs
    ctx.save_for_backward(h if ctx.needs_input_grad[1] else h.new_empty(0), weight)


def _differentiate(ctx: Any, dq: Tensor) -> tuple[Tensor | None, ...]:
    h, weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grads = torch.ops.steermoe.project_backward(dq, h, weight, needs)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


torch.library.register_autograd("steermoe::project", _differentiate, setup_context=_keep_for_backward, lib=_lib)


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


torch.library.register_autograd("steermoe::project_backward", refuse_second_derivative, lib=_lib)
