"""What torch's dispatcher does for an operator, and eager calls, which mostly skip it, must not lose; and what it cannot do."""

from __future__ import annotations

import pytest
import torch
from problems import interpreted
from torch import Tensor
from torch.autograd import forward_ad

from steermoe_kernels import functional as SF

WIDTH, EXPERTS = 8, 3


@pytest.fixture
def slices(device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((EXPERTS, WIDTH), (EXPERTS,), (EXPERTS, WIDTH), ())
    return [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]


def _stream(device: torch.device, *lead: int) -> Tensor:
    return torch.randn(*lead, 4, 5, WIDTH, generator=torch.Generator().manual_seed(1)).to(device)


def test_negated_views(backend: str, device: torch.device, slices: list[Tensor]) -> None:
    """Views that negate on reading: of the stream, of a parameter, and of the incoming gradient."""
    x, dy = _stream(device), _stream(device).flip(0)
    for negated in (False, True):

        def twice(t: Tensor, negated: bool = negated) -> Tensor:
            return torch._neg_view(-t) if negated else t

        stream = twice(x).detach().requires_grad_()
        y = SF.steer(stream, *(twice(t) if t.dim() == 2 else t for t in slices), backend=backend)[0]
        grads = [y, *torch.autograd.grad(y, [stream, *slices], twice(dy))]
        expected = grads if not negated else expected  # noqa: F821
        assert all(map(torch.equal, grads, expected))


def test_zeros_without_storage(backend: str, device: torch.device, slices: list[Tensor]) -> None:
    x = torch._efficientzerotensor((4, 5, WIDTH), device=device)
    assert torch.equal(SF.steer(x, *slices, backend=backend)[0], SF.steer(torch.zeros_like(x), *slices, backend=backend)[0])


def test_batched_incoming_gradients(backend: str, device: torch.device, slices: list[Tensor]) -> None:
    x, dys = _stream(device).requires_grad_(), _stream(device, 3)
    y = SF.steer(x, *slices, backend=backend)[0]
    (together,) = torch.autograd.grad(y, [x], dys, is_grads_batched=True, retain_graph=True)
    for dx, dy in zip(together, dys, strict=True):
        assert torch.equal(dx, torch.autograd.grad(y, [x], dy, retain_graph=True)[0])


def test_vmap(backend: str, device: torch.device, slices: list[Tensor]) -> None:
    clips = _stream(device, 3)
    frozen = [t.detach() for t in slices]
    mapped = torch.func.vmap(lambda h: SF.steer(h, *frozen, backend=backend)[0])(clips)
    for y, clip in zip(mapped, clips, strict=True):
        torch.testing.assert_close(y, SF.steer(clip, *frozen, backend=backend)[0])


def test_forward_mode_is_refused(backend: str, device: torch.device, slices: list[Tensor]) -> None:
    """torch would drop the tangent without a word."""
    x, tangent = _stream(device), _stream(device)
    projection = torch.randn(2, WIDTH, device=device)
    for function in (lambda h: SF.steer(h, *slices, backend=backend)[0], lambda h: SF.project(h, projection, None)):
        with pytest.raises(RuntimeError, match="no forward-mode derivative; use steermoe_kernels"):
            torch.func.jvp(function, (x,), (tangent,))
        for grad in (True, False):
            with torch.set_grad_enabled(grad), forward_ad.dual_level():
                function(x)  # nothing here has a tangent
                with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                    function(forward_ad.make_dual(x, tangent))


def test_gradients_are_rounded_to_their_own_parameter_only(backend: str, device: torch.device) -> None:
    """A bias, a scale or a norm's weights in float32 beside others in half precision: sums over many frames that half cannot hold."""
    frames = 200 if interpreted(backend) else 70_000
    h = torch.ones(1, frames, WIDTH, device=device)
    weight, vectors, gamma = (torch.ones(*shape, WIDTH, dtype=torch.float16, device=device) for shape in ((2,), (2,), ()))
    bias, scale, beta = torch.zeros(2, device=device), torch.ones((), device=device), torch.zeros(WIDTH, device=device)
    wanted = [bias.requires_grad_(), scale.requires_grad_(), beta.requires_grad_()]
    _, normed, gates = SF.steer_norm(h, weight, bias, vectors, scale, gamma, beta, backend=backend)
    dbias, dscale, dbeta = torch.autograd.grad([normed, gates], wanted, [torch.ones_like(normed), torch.zeros_like(gates)])
    assert dbias.dtype == dscale.dtype == dbeta.dtype == torch.float32
    assert torch.equal(dbeta, torch.full_like(dbeta, frames))
    y, _ = SF.steer(h, weight, bias, vectors, scale, backend=backend)
    (dscale,) = torch.autograd.grad(y, [scale], torch.ones_like(y))
    assert dscale.item() == frames * WIDTH


@pytest.mark.parametrize("through", [0, 2], ids=["y", "gates"])
def test_a_norm_that_no_incoming_gradient_comes_through(through: int, backend: str, device: torch.device, slices: list[Tensor]) -> None:
    """Its parameters' gradients are zeros, which optimizers tell from None: they were in the graph."""
    gamma, beta = (torch.ones(WIDTH, device=device, requires_grad=True) for _ in range(2))
    SF.steer_norm(_stream(device), *slices, gamma, beta, backend=backend)[through].square().sum().backward()
    for parameter in (gamma, beta):
        assert parameter.grad is not None and not parameter.grad.any()


def test_a_number_for_the_scale_is_not_rounded_to_the_weights(backend: str, device: torch.device) -> None:
    x, weight, vectors = _stream(device), torch.zeros(2, WIDTH, device=device), torch.ones(2, WIDTH, device=device)
    y, _ = SF.steer(x, weight.bfloat16(), None, vectors.bfloat16(), 0.1, backend=backend)
    torch.testing.assert_close(y, x + 0.1, rtol=1e-6, atol=1e-6)
    y, _ = SF.steer(x, weight.half(), None, vectors.half(), 1e6, backend=backend)
    torch.testing.assert_close(y, x + 1e6)


@pytest.mark.parametrize("pool_size", [6, 2**31 - 1])
def test_a_pool_longer_than_the_clip(pool_size: int, backend: str, device: torch.device, slices: list[Tensor]) -> None:
    x = _stream(device).requires_grad_()
    for pool in ("max", "mean"):
        results = []
        for size in (5, pool_size):
            y, normed, _ = SF.steer_norm(x, *slices, None, None, pool=pool, pool_size=size, backend=backend)
            results.append((y, normed, *torch.autograd.grad((normed * y[:, :1]).sum(), [x, *slices])))
        assert all(map(torch.equal, *results))
