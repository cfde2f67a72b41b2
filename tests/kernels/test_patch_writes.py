"""`patch_steermoe` where something changes between the router's answer and the sum, or the sum is written to."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from public_loop import LAYERS, Loop, delta_of, gates_of, logits_of, steered
from public_versions import EXPERTS, WIDTH, assert_same, draw
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from steermoe_kernels import patch_steermoe
from steermoe_kernels.encoders import expressions


@pytest.mark.parametrize("written", ["all", "a frame", "some channels", "the gates"])
def test_writing_to_the_stream_is_noticed_in_inference_mode(written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def body(m: Any, x: Tensor, layer: int) -> Any:
        gates = gates_of(m, x, layer)
        delta = delta_of(m, gates, layer)
        if written == "the gates":
            x + delta
            gates.mul_(2)
        else:
            {"all": x, "a frame": x[1, 3:4], "some channels": x[..., : WIDTH // 2]}[written].mul_(0.5)
        return x + m.layer_scales[layer] * delta, gates

    ours = patch_steermoe(Loop(body))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="changed in place after the router"):
        ours(draw().float())
    monkeypatch.setattr(expressions, "_READ_AT_ONCE", ())  # as on a device, for which the comparison waits until the end
    with torch.inference_mode(), pytest.raises(RuntimeError, match="changed in place after the router"):
        ours(draw().float())
    ours.body = steered
    with torch.inference_mode():
        ours(draw().float())


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_every_frame_and_channel_is_looked_at_in_inference_mode(layout: str) -> None:
    """Also where there are more frames than channels, and where these do not lie one after another."""
    frames = 3 * WIDTH + 2
    places = [(0, frame) for frame in range(frames)] + [(..., channel) for channel in range(WIDTH)]
    for place in places:

        def body(m: Any, x: Tensor, layer: int, place: Any = place) -> Any:
            gates = gates_of(m, x, layer)
            x[place] *= 3
            return x + m.layer_scales[layer] * delta_of(m, gates, layer), gates

        ours = patch_steermoe(Loop(body))
        x = torch.randn(1, WIDTH, frames).mT if layout == "strided" else torch.randn(1, frames, WIDTH)
        with torch.inference_mode(), pytest.raises(RuntimeError, match="changed in place after the router"):
            ours.body(ours, x + 0, 0)


@pytest.mark.parametrize("change", [lambda m, x: x.requires_grad_(), lambda m, x: m.router.weight.requires_grad_(False)])
def test_what_gradients_go_to_may_not_change_in_between(change: Any) -> None:
    def body(m: Any, x: Tensor, layer: int) -> Any:
        x = x.detach()
        gates = gates_of(m, x, layer)
        change(m, x)
        return x + m.layer_scales[layer] * delta_of(m, gates, layer), gates

    with pytest.raises(RuntimeError, match="changed"):
        patch_steermoe(Loop(body))(draw().float())


def test_gates_that_a_function_saw_let_the_rest_go() -> None:
    """C++ code has a hold on them then, so that they turn into tensors later, where the method ends."""
    streams: list[weakref.ref[Tensor]] = []

    class Passed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value * 1

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    def body(m: Any, x: Tensor, layer: int) -> Any:
        streams.append(weakref.ref(x))
        gates = gates_of(m, x, layer)
        Passed.apply(gates)
        return x + m.layer_scales[layer] * delta_of(m, gates, layer), gates

    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            _, gates = patch_steermoe(Loop(body))(draw().float())
            assert all(type(g) is Tensor for g in gates)
            assert not any(stream() is not None for stream in streams)
            gates[0].mul_(2)


def test_a_step_that_failed_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it is made from written to in the meantime it is refused, not computed from that."""
    from steermoe_kernels.encoders.formula import Gates

    compute, failures = Gates.compute, [MemoryError()]

    def failing(self: Any, *inputs: Any) -> Tensor:
        if failures:
            raise failures.pop()
        return compute(self, *inputs)

    monkeypatch.setattr(Gates, "compute", failing)

    def body(m: Any, x: Tensor, layer: int) -> Any:
        logits = logits_of(m, x, layer)
        gates = F.softmax(logits, -1)
        with pytest.raises(MemoryError):
            logits.sum()
        logits.mul_(3)
        return x + m.layer_scales[layer] * delta_of(m, gates, layer), gates

    with torch.no_grad(), pytest.raises(RuntimeError, match="changed in place after the router"):
        patch_steermoe(Loop(body))(draw().float())


def test_an_inference_mode_inside_of_which_gradients_are_enabled() -> None:
    model = Loop(steered)
    ours = patch_steermoe(copy.deepcopy(model))
    with torch.inference_mode(), torch.enable_grad():
        torch.testing.assert_close(ours(draw().float())[0], model(draw().float())[0])


@pytest.mark.parametrize("inside", ["router", "gates", "delta"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_that_ends_within_the_formula(inside: str, use_reentrant: bool) -> None:
    def body(m: Any, x: Tensor, layer: int) -> Any:
        part = {
            "router": lambda x: m.router(x),
            "gates": lambda x: gates_of(m, x, layer),
            "delta": lambda x: delta_of(m, gates_of(m, x, layer), layer),
        }[inside]
        value = checkpoint(part, x, use_reentrant=use_reentrant)
        if inside == "router":
            value = F.softmax(value[:, :, layer * EXPERTS : (layer + 1) * EXPERTS], -1)
        if inside != "delta":
            value = delta_of(m, value, layer)
        return x + m.layer_scales[layer] * value, value

    model = Loop(body)
    ours = patch_steermoe(copy.deepcopy(model))
    results = []
    for each in (ours, model):
        x = draw().requires_grad_()
        y = each.double()(x)[0]
        y.sin().sum().backward()
        results.append({"y": y, "dx": x.grad} | {name: p.grad for name, p in each.named_parameters()})
    assert_same(*results)


@pytest.mark.parametrize("scale", [float("inf"), float("nan")])
def test_scales_that_are_no_finite_number(scale: float) -> None:
    def body(m: Any, x: Tensor, layer: int) -> Any:
        gates = gates_of(m, x, layer)
        return x + scale * delta_of(m, gates, layer), gates

    model = Loop(body)
    ours = patch_steermoe(copy.deepcopy(model))
    with torch.no_grad():
        torch.testing.assert_close(ours(draw().float())[0], model(draw().float())[0], equal_nan=True)


def test_a_stream_of_nan_is_not_taken_for_a_changed_one(passes: list) -> None:
    for x in (draw().float() * torch.nan, draw().float().transpose(0, 1), draw().float()[:, :0]):
        passes.clear()
        with torch.inference_mode():
            patch_steermoe(Loop(lambda m, x, layer: steered(m, x.clone(), layer)))(x)
        assert len(passes) == LAYERS


def test_gates_have_no_gradient_along_the_stream() -> None:
    """As the docstring says: the sum goes past them. Whatever they were made from has all of its gradient."""
    ours = patch_steermoe(Loop(steered))
    y, gates = ours(draw().float())
    gates[0].retain_grad()
    (y.sum() + gates[0].square().sum()).backward()
    torch.testing.assert_close(gates[0].grad, 2 * gates[0].detach())


def test_writing_to_the_steered_stream_fails_in_the_backward() -> None:
    def body(m: Any, x: Tensor, layer: int) -> Any:
        y, gates = steered(m, x, layer)
        return y.clamp_(-1, 1), gates

    public = Loop(body)
    ours = patch_steermoe(copy.deepcopy(public))
    with torch.no_grad():
        torch.testing.assert_close(ours(draw().float())[0], public(draw().float())[0])
    public(draw().float())[0].sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ours(draw().float())[0].sum().backward()
