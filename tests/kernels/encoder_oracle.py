"""The oracle for steered encoders: the plain encoder with a hook on each layer that applies the reference aligner."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from steermoe_kernels import FusedSteerMoE, reference

Results = dict[str, Tensor]


def shake(module: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter off its initial value, so that no norm is the identity and no bias is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
    return module


def draw_aligner(feature_dim: int, num_experts: int, num_layers: int, *, seed: int = 1, **options: Any) -> reference.SteerMoEAligner:
    """A reference aligner in float64 that steers visibly: every layer adds about as much as the stream holds."""
    generator = torch.Generator().manual_seed(seed)
    aligner = reference.SteerMoEAligner(feature_dim, num_experts, num_layers, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter, size in (
            (aligner.steering_vectors, 1.0),
            (aligner.router.weight, 0.15),
            (aligner.router.bias, 0.5),
            (aligner.layer_scales, 0.7),
        ):
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return aligner


def fused_aligner(aligner: reference.SteerMoEAligner, dtype: torch.dtype, **options: Any) -> FusedSteerMoE:
    """The fused aligner with the weights of ``aligner``."""
    fused = FusedSteerMoE(
        aligner.feature_dim,
        aligner.num_experts,
        aligner.num_layers,
        top_k=aligner.top_k,
        renormalize=aligner.renormalize,
        dtype=dtype,
        **options,
    )
    fused.load_state_dict(aligner.state_dict())
    return fused


class HookedSteering:
    """The oracle's hook: the reference aligner on a layer's output, and pooling after the last layer."""

    def __init__(self, aligner: reference.SteerMoEAligner, layer: int, pool: str | None, pool_size: int) -> None:
        self.aligner, self.layer, self.pool, self.pool_size = aligner, layer, pool, pool_size

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        y = self.aligner(h, self.layer)
        if self.pool is not None and self.layer == self.aligner.num_layers - 1:
            y = reference.pool_frames(y, self.pool, self.pool_size)
        return (y, *output[1:]) if isinstance(output, tuple) else y


def hooked(
    encoder: nn.Module,
    layers: Callable[[nn.Module], Iterable[nn.Module]],
    aligner: reference.SteerMoEAligner,
    dtype: torch.dtype,
    *,
    aligner_dtype: torch.dtype | None = None,
    pool: str | None = None,
    pool_size: int = 1,
) -> nn.Module:
    """A copy of the plain ``encoder`` in ``dtype``, steered by hooks; its aligner is ``steering``, as in a steered encoder."""
    encoder = copy.deepcopy(encoder).to(dtype)
    steering = copy.deepcopy(aligner).to(aligner_dtype or dtype)
    for index, layer in enumerate(layers(encoder)):
        layer.register_forward_hook(HookedSteering(steering, index, pool, pool_size))
    encoder.add_module("steering", steering)
    return encoder


def differentiate(encoder: nn.Module, x: Tensor, run: Callable[[nn.Module, Tensor], Results]) -> Results:
    """What ``run`` returns for the input ``x``, and the gradients at the input and at every parameter."""
    x = x.detach().requires_grad_()
    outputs = run(encoder, x)
    loss = x.new_zeros(())
    for name, output in sorted(outputs.items()):
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(len(name)), dtype=torch.float64)
        loss = loss + (output * direction.to(output)).sum()
    wanted = {"x": x} | {name: parameter for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    found = {name: gradient for name, gradient in zip(wanted, gradients, strict=True) if gradient is not None}
    return {name: output.detach() for name, output in outputs.items()} | {f"d {name}": gradient for name, gradient in found.items()}


def assert_same(ours: Results, oracles: Results, tolerance: float = 1e-10) -> None:
    """Equal but for float64's rounding; the same names, so that a gradient that got lost is a fault."""
    assert ours.keys() == oracles.keys(), ours.keys() ^ oracles.keys()
    for name, value in oracles.items():
        largest = max(1.0, value.abs().max().item())
        torch.testing.assert_close(
            ours[name], value, rtol=tolerance, atol=tolerance * largest, msg=lambda text, name=name: f"{name}: {text}"
        )
