"""`patch_steermoe` on code that strays from the formula: an expression must do in it whatever a tensor would."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from public_versions import EXPERTS, WIDTH, Results, assert_same, draw
from torch import Tensor, nn

from steermoe_kernels import patch_steermoe

# A version of the loop's body is a function of the stream, the router and the vectors. Whatever it does, the patched router must give
# what a plain Linear gives: outputs, gradients, and errors.


def touched_logits(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    logits = router(x)
    assert logits.shape == (2, 7, EXPERTS) and logits.dtype == x.dtype and logits.dim() == 3 and len(logits) == 2
    return x + s * torch.einsum("bte,ef->btf", F.softmax(logits, dim=-1), V)


def touched_gates(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    gates = F.softmax(router(x), dim=-1)
    assert bool((gates.sum(-1) - 1 < 1e-6).all())
    return x + s * torch.einsum("bte,ef->btf", gates, V), gates


def gates_written_to(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    gates = F.softmax(router(x), dim=-1)
    delta = torch.einsum("bte,ef->btf", gates, V)
    with torch.no_grad():
        gates.mul_(2)
    return x + s * delta.detach(), gates.detach()


def logits_written_to_through_a_slice(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    logits = router(x)
    part = logits[:, :, 1:3]
    logits *= 2
    return x + F.softmax(part, dim=-1) @ V[1:3]


def logits_sliced_then_written_to(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    logits = router(x)
    part = logits[..., :3]
    gates = F.softmax(part, dim=-1)
    part += 1.0
    logits[..., 0] = 0.0
    return x + gates @ V[:3], logits, part


def temperature(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    return x + s * torch.einsum("bte,ef->btf", F.softmax(router(x) / 0.7, dim=-1), V)


def dropped_gates(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    torch.manual_seed(0)
    return x + s * torch.einsum("bte,ef->btf", F.dropout(F.softmax(router(x), dim=-1), 0.5), V)


def another_stream(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    return 2 * x + s * torch.einsum("bte,ef->btf", F.softmax(router(x), dim=-1), V)


def equal_but_not_the_same(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    return x.clone() + s * torch.einsum("bte,ef->btf", F.softmax(router(x), dim=-1), V)


def another_dimension(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    return x + s * torch.einsum("bte,ef->btf", F.softmax(router(x), dim=1), V)


def every_spelling(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    first = x + torch.softmax(router(x), -1) @ V * s
    second = torch.add(torch.mul(torch.matmul(router(first).softmax(dim=2), V), s), first)
    third = 0.3 * torch.einsum("xyz, zw -> xyw", nn.Softmax(dim=-1)(router(second)[:, :, :]), V) + second
    return third, torch.einsum("bte,ef->btf", F.softmax(router(third), dim=-1), V) + third


def twice(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    delta = s * torch.einsum("bte,ef->btf", F.softmax(router(x), dim=-1), V)
    return x + delta, x + delta, x - delta, delta


def scaled_twice(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    return x + s * (s * torch.einsum("bte,ef->btf", F.softmax(router(x), dim=-1), V))


def a_scale_a_channel(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    return x + V[0] * torch.einsum("bte,ef->btf", F.softmax(router(x), dim=-1), V)


def with_alpha(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    return torch.add(x, torch.einsum("bte,ef->btf", F.softmax(router(x), dim=-1), V), alpha=3)


def in_place(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    y = x * 1.0
    y += s * torch.einsum("bte,ef->btf", F.softmax(router(y.clone()), dim=-1), V)
    return y


def without_gradient(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    with torch.no_grad():
        gates = F.softmax(router(x), dim=-1)
    return x + s * torch.einsum("bte,ef->btf", gates, V)


def detached(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    return x + s * torch.einsum("bte,ef->btf", F.softmax(router(x).detach(), dim=-1), V)


def only_the_last_step_without_gradient(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    delta = torch.einsum("bte,ef->btf", F.softmax(router(x), dim=-1), V)
    with torch.no_grad():
        y = x + delta
    return y + delta


def stacked(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    gates = [F.softmax(router(x * k), dim=-1) for k in (1, 2, 3)]
    mean = torch.stack(gates).mean(0)
    return x + s * mean @ V, torch.cat([gates[0], gates[2]], dim=-1)


def numbers(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    gates = F.softmax(router(x), dim=-1)
    strongest = float(gates.detach().max()), gates[0, 0, 0].item(), gates.detach().numpy().sum(), [len(row) for row in gates]
    return x + sum(strongest[:3]) * torch.einsum("bte,ef->btf", gates, V)


def arithmetic(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    z = router(x)
    return (1 - z) ** 2 / (2 + z.abs()), -z, z - 1, z @ z.mT, z.mT @ z, (z > 0).to(z), z.exp().log(), 3.0 * z, z + z, abs(z), z[0], z[:, 1:]


def gates_for_another_stream(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    gates = F.softmax(router(x), dim=-1)
    y = x + s * torch.einsum("bte,ef->btf", gates, V)
    return y + s * torch.einsum("bte,ef->btf", gates, V), gates


def rows_of_two_layers(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    logits = router(x)
    y = x + F.softmax(logits[:, :, :2], dim=-1) @ V[:2]
    return x + F.softmax(logits[:, :, -2:], dim=-1) @ V[2:], y, logits


def strided_rows(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    logits = router(x)
    return x + F.softmax(logits[:, :, ::2], dim=-1) @ V[::2] + F.softmax(logits[:, 1:3, :], dim=-1).sum() + logits[None].sum()


def in_a_dict(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    gates = F.softmax(router(x), dim=-1)
    y = x + s * torch.einsum("bte,ef->btf", gates, V)
    return {"y": y, "more": [{"gates": gates}, (gates, None)]}


STRAYS = [
    *(touched_logits, touched_gates, gates_written_to, logits_written_to_through_a_slice, logits_sliced_then_written_to, temperature),
    *(dropped_gates, another_stream, equal_but_not_the_same, another_dimension, every_spelling, twice, scaled_twice, a_scale_a_channel),
    *(with_alpha, in_place, without_gradient, detached, only_the_last_step_without_gradient, stacked, numbers, arithmetic),
    *(gates_for_another_stream, rows_of_two_layers, strided_rows, in_a_dict),
]


class Stray(nn.Module):
    def __init__(self, body: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = body
        self.steering_vectors = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.layer_scales = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Any:
        return self.body(x, self.router, self.steering_vectors, self.layer_scales)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors(item)]
    if isinstance(value, dict):
        return tensors(list(value.values()))
    assert value is None or type(value) is Tensor
    return [] if value is None else [value]


def everything(model: nn.Module) -> Results:
    x = draw().requires_grad_()
    outputs = tensors(model(x))
    loss = sum((output * torch.linspace(-1, 1, output.shape[-1]).to(output)).sum() for output in outputs)
    wanted = {"x": x} | dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    found = {f"d {name}": gradient for name, gradient in zip(wanted, gradients, strict=True) if gradient is not None}
    return {str(i): output.detach() for i, output in enumerate(outputs)} | found


@pytest.mark.parametrize("body", STRAYS, ids=lambda body: body.__name__)
def test_code_that_strays_from_the_formula(body: Any) -> None:
    public = Stray(body).double()
    ours = patch_steermoe(copy.deepcopy(public))
    assert_same(everything(ours), everything(public))
    with torch.no_grad():
        for mine, theirs in zip(tensors(ours(draw())), tensors(public(draw())), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    with torch.inference_mode():
        for mine, theirs in zip(tensors(ours(draw())), tensors(public(draw())), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_the_usual_spellings_are_fused(passes: list) -> None:
    patch_steermoe(Stray(every_spelling))(draw().float())
    assert len(passes) == 4


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (lambda x, router, V, s: router(x[..., :5]), RuntimeError),
        (lambda x, router, V, s: router(x[0, 0])[:, :, 0:2], IndexError),
        (lambda x, router, V, s: x + torch.einsum("bte,ef->btf", F.softmax(router(x), dim=-1), V[:2]), RuntimeError),
        (lambda x, router, V, s: x + F.softmax(router(x), dim=-1) @ V[:, :3], RuntimeError),
        (lambda x, router, V, s: x + F.softmax(router(x), dim=-1) @ V.float(), RuntimeError),
        (lambda x, router, V, s: F.softmax(router(x), dim=7), IndexError),
        (lambda x, router, V, s: router(x).no_such_thing, AttributeError),
    ],
)
def test_errors_of_the_public_code_stay_errors(body: Any, error: Any) -> None:
    public = Stray(body).double()
    with pytest.raises(error):
        public(draw())
    with pytest.raises(error):
        patch_steermoe(public)(draw())


@pytest.mark.parametrize("what", ["stream", "router", "vectors", "gates"])
def test_a_late_result_of_something_written_to_is_refused(what: str) -> None:
    def body(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
        x = x.clone()
        gates = F.softmax(router(x), dim=-1)
        delta = torch.einsum("bte,ef->btf", gates, V)
        if what == "gates":
            gates = (x + delta, gates)[1]  # the sum gives the gates their value; the product stays open
        with torch.no_grad():
            {"stream": x, "router": router.weight, "vectors": V, "gates": gates}[what].mul_(2)
        return x + s * delta

    with pytest.raises(RuntimeError, match="changed in place after the router"):
        patch_steermoe(Stray(body))(draw().float())
