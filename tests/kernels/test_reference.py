"""The definition itself: its gradients by finite differences, its pieces against torch's own and against numbers worked by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import errors
from problems import Problem, call, device_for, draw, dtypes_of
from torch import Tensor, nn

from steermoe_kernels import available_backends, reference
from steermoe_kernels import functional as SF

P = Problem

GRADCHECKED = [
    P(frames=3, width=8, num_experts=4),
    P(frames=3, width=8, num_experts=4, top_k=4),
    P(frames=3, width=8, num_experts=4, top_k=2),
    P(frames=3, width=8, num_experts=4, top_k=1),
    P(frames=3, width=8, num_experts=4, top_k=4, renormalize=False),
    P(frames=3, width=8, num_experts=4, top_k=2, renormalize=False),
    P(frames=3, width=8, num_experts=4, top_k=1, renormalize=False, bias=False),
    P(frames=3, width=5, num_experts=4, norm="layer", residual=True),
    P(frames=3, width=5, num_experts=4, norm="rms", residual=True),
    P(frames=3, width=8, num_experts=4, top_k=2, norm="layer", residual=True, norm_weight=False, norm_bias=False),
    P(batch=2, frames=3, width=4, num_experts=3, norm="layer", pool="max", pool_size=2),
    P(batch=2, frames=3, width=4, num_experts=3, norm="layer", pool="mean", pool_size=2, residual=True),
    P(batch=2, frames=3, width=4, num_experts=3, top_k=2, norm="rms", pool="max", pool_size=3, residual=True),
    P(batch=2, frames=3, width=6, num_experts=3, top_k=2, renormalize=False, norm="rms", pool="mean", pool_size=9),
]


def _gradcheck(module: object, problem: Problem, settings: dict[str, object], device: torch.device | str = "cpu") -> None:
    inputs, _ = draw(problem, torch.float64, device)
    settings = {"top_k": problem.top_k, "renormalize": problem.renormalize} | settings

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(call(module, problem, dict(zip(inputs, tensors, strict=True)), settings).values())

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


@pytest.mark.parametrize("problem", GRADCHECKED, ids=str)
def test_gradcheck_of_the_reference(problem: Problem) -> None:
    _gradcheck(reference, problem, {})


@pytest.mark.parametrize("backend", [name for name in available_backends() if torch.float64 in dtypes_of(name, device_for(name))])
@pytest.mark.parametrize("problem", GRADCHECKED, ids=str)
def test_gradcheck_of_the_operators(problem: Problem, backend: str) -> None:
    _gradcheck(SF, problem, {"backend": backend}, device_for(backend))


@pytest.mark.parametrize("module", [reference, SF], ids=["reference", "operator"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_of_the_projection(module: object, bias: bool) -> None:
    h, weight, c = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 4), (5, 4), (5,)))
    assert torch.autograd.gradcheck(module.project, (h, weight, c if bias else None))  # type: ignore[attr-defined,arg-type]


# --- the pieces -------------------------------------------------------------------------------------------------------------------------


def test_routing_by_hand() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.float64).log()  # odds of 1 : 3 : 2
    expected = {
        (None, True): [1 / 6, 3 / 6, 2 / 6],
        (2, True): [0.0, 3 / 5, 2 / 5],
        (2, False): [0.0, 3 / 6, 2 / 6],
        (1, True): [0.0, 1.0, 0.0],
        (1, False): [0.0, 3 / 6, 0.0],
        (3, True): [1 / 6, 3 / 6, 2 / 6],
        (3, False): [1 / 6, 3 / 6, 2 / 6],
    }
    for (top_k, renormalize), gates in expected.items():
        routed = reference.route(logits, top_k, renormalize)
        torch.testing.assert_close(routed, torch.tensor([gates], dtype=torch.float64), rtol=1e-14, atol=0.0)


def test_steering_by_hand() -> None:
    h = torch.tensor([[2.0, -1.0]])
    weight, bias = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), torch.tensor([0.0, 3.0, -1000.0])  # logits 2, 2, -1000
    vectors = torch.tensor([[1.0, 0.0], [3.0, 8.0], [50.0, 50.0]])
    y, gates = reference.steer(h, weight, bias, vectors, 0.5)
    assert gates.tolist() == [[0.5, 0.5, 0.0]]
    assert y.tolist() == [[2.0 + 0.5 * 2.0, -1.0 + 0.5 * 4.0]]
    y, gates = reference.steer(h, weight, bias, vectors, 0.5, residual=torch.tensor([[10.0, 0.0]]), top_k=1)
    assert gates.tolist() == [[1.0, 0.0, 0.0]]
    assert y.tolist() == [[12.5, -1.0]]


@pytest.mark.parametrize(
    "kind, expected", [("max", [[3.0, 5.0], [4.0, -1.0], [7.0, 0.0]]), ("mean", [[2.0, 4.5], [3.0, -1.5], [7.0, 0.0]])]
)
def test_pooling_by_hand(kind: str, expected: list) -> None:
    y = torch.tensor([[[1.0, 4.0], [3.0, 5.0], [4.0, -2.0], [2.0, -1.0], [7.0, 0.0]]])
    assert reference.pool_frames(y, kind, 2)[0].tolist() == expected
    assert torch.equal(reference.pool_frames(y, kind, 1), y)
    whole = y.amax(1, keepdim=True) if kind == "max" else y.mean(1, keepdim=True)
    for size in (5, 6, 100):
        torch.testing.assert_close(reference.pool_frames(y, kind, size), whole, rtol=1e-6, atol=0.0)


def test_the_gradient_of_a_maximum_goes_to_the_first_of_equal_frames() -> None:
    y = torch.tensor([[[1.0], [1.0], [0.0], [2.0], [2.0]]], requires_grad=True)
    reference.pool_frames(y, "max", 3).sum().backward()
    assert y.grad is not None
    assert y.grad.flatten().tolist() == [1.0, 0.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_norms_are_those_of_torch(weight: bool, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    p, *affine = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 5, 33), (33,), (33,)))
    gamma, beta = (tensor if there else None for tensor, there in zip(affine, (weight, bias), strict=True))
    torch.testing.assert_close(reference.normalize(p, gamma, beta, 1e-3), F.layer_norm(p, (33,), gamma, beta, 1e-3))
    rms = F.rms_norm(p, (33,), gamma, 1e-3)
    torch.testing.assert_close(reference.normalize(p, gamma, beta, 1e-3, rms=True), rms if beta is None else rms + beta)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    problem = P(batch=2, frames=5, num_experts=4, norm="layer", residual=True, pool="mean", pool_size=2)
    inputs, _ = draw(problem, dtype)
    wide = {name: tensor.float() for name, tensor in inputs.items()}
    results, truth = call(reference, problem, inputs, {}), call(reference, problem, wide, {})
    assert torch.equal(results["gates"], truth["gates"])
    assert torch.equal(results["y"], truth["y"].to(dtype))
    assert torch.equal(results["normed"], truth["normed"].to(dtype))


class PublicSteering(nn.Module):
    """The published formula: every layer's logits are computed, one layer's are used."""

    def __init__(self, width: int, num_experts: int, num_layers: int) -> None:
        super().__init__()
        self.num_experts, self.num_layers = num_experts, num_layers
        self.steering_vectors = nn.Parameter(0.01 * torch.randn(num_layers, num_experts, width))
        self.router = nn.Linear(width, num_layers * num_experts)
        self.layer_scales = nn.Parameter(torch.full((num_layers,), 0.1))

    def forward(self, h: Tensor, layer: int) -> Tensor:
        logits = self.router(h).view(*h.shape[:-1], self.num_layers, self.num_experts)
        gates = torch.softmax(logits[..., layer, :], dim=-1)
        steering = torch.einsum("bte,ef->btf", gates, self.steering_vectors[layer])
        return h + self.layer_scales[layer] * steering


def test_the_aligner_is_the_published_formula() -> None:
    torch.manual_seed(0)
    public = PublicSteering(width=24, num_experts=5, num_layers=3).double()
    ours = reference.SteerMoEAligner(24, 5, 3, dtype=torch.float64)
    ours.load_state_dict(public.state_dict())
    runs: list[dict[str, Any]] = []
    for steer in (ours, public):
        h = torch.randn(2, 7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = h
        for layer in (2, 0, 1):
            y = steer(y, layer)
        y.square().sum().backward()
        grads = dict(steer.named_parameters()) | {"h": h}
        runs.append({"y": y.detach()} | {"d" + name: tensor.grad for name, tensor in grads.items()})
    assert max(errors(*runs).values()) < 1e-14
