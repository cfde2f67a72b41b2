"""`patch_steermoe` where an expression is handed to code that does not ask it, or outlives the method that made it."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from public_loop import LAYERS, Loop, delta_of, gates_of, logits_of, steered
from public_versions import EXPERTS, WIDTH, Results, assert_same, draw
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steermoe_kernels import patch_steermoe
from steermoe_kernels.encoders.expressions import Expression


class Tripled(torch.autograd.Function):
    """As it is; its gradient times three."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        assert ctx.saved_tensors[0].sum().isfinite()
        return 3 * gradient


def everything(model: nn.Module) -> Results:
    """By ``backward``, which is all that reentrant checkpoints know."""
    x = draw().requires_grad_()
    y, gates = model(x)
    loss = (y * torch.linspace(-1, 1, WIDTH).to(y)).sum() + sum((g * torch.linspace(0, 3, EXPERTS).to(g)).square().sum() for g in gates)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()} | {"d x": x.grad}
    return {"y": y.detach()} | {str(i): g.detach() for i, g in enumerate(gates)} | {n: g for n, g in found.items() if g is not None}


# --- code that does not ask -------------------------------------------------------------------------------------------------------------


def function_of_logits(m: Any, x: Tensor, layer: int) -> Any:
    gates = F.softmax(Tripled.apply(logits_of(m, x, layer)), dim=-1)
    return x + m.layer_scales[layer] * delta_of(m, gates, layer), gates


def function_of_all_logits(m: Any, x: Tensor, layer: int) -> Any:
    gates = F.softmax(Tripled.apply(m.router(x))[..., :EXPERTS], dim=-1)
    return x + m.layer_scales[layer] * delta_of(m, gates, layer), gates


def function_of_mixed_logits(m: Any, x: Tensor, layer: int) -> Any:
    gates = F.softmax(Tripled.apply(logits_of(m, x, layer) @ m.steering_vectors[layer, :, :EXPERTS]), dim=-1)
    return x + m.layer_scales[layer] * delta_of(m, gates, layer), gates


def function_of_gates(m: Any, x: Tensor, layer: int) -> Any:
    gates = Tripled.apply(gates_of(m, x, layer))
    return x + m.layer_scales[layer] * delta_of(m, gates, layer), gates


def function_of_delta(m: Any, x: Tensor, layer: int) -> Any:
    gates = gates_of(m, x, layer)
    return x + m.layer_scales[layer] * Tripled.apply(delta_of(m, gates, layer)), gates


def function_of_scaled_delta(m: Any, x: Tensor, layer: int) -> Any:
    gates = gates_of(m, x, layer)
    return x + Tripled.apply(0.3 * delta_of(m, gates, layer)) + Tripled.apply(m.layer_scales[layer] * delta_of(m, gates, layer)), gates


def function_of_steered(m: Any, x: Tensor, layer: int) -> Any:
    y, gates = steered(m, x, layer)
    return y, Tripled.apply(gates)


def function_of_both(m: Any, x: Tensor, layer: int) -> Any:
    """The fused pass, after a function took the gates: gradients come both ways."""
    gates = gates_of(m, x, layer)
    delta = delta_of(m, gates, layer)
    tripled = Tripled.apply(gates)
    return x + m.layer_scales[layer] * delta, tripled + gates


class Routed(torch.autograd.Function):
    """Its forward asks the router, and returns what it answers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, router: Any) -> Tensor:
        ctx.save_for_backward(router.weight)
        return router(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return 2 * gradient @ ctx.saved_tensors[0], None


def function_that_routes(m: Any, x: Tensor, layer: int) -> Any:
    logits = Routed.apply(x, m.router)
    gates = F.softmax(logits[:, :, :EXPERTS], dim=-1)
    return x + m.layer_scales[layer] * delta_of(m, gates, layer), gates


def is_a_tensor(m: Any, x: Tensor, layer: int) -> Any:
    gates = gates_of(m, x, layer)
    assert isinstance(gates, Tensor) and torch.is_tensor(gates) and not isinstance(gates, nn.Parameter)
    return x + m.layer_scales[layer] * delta_of(m, gates, layer), gates


def through_a_submodule(m: Any, x: Tensor, layer: int) -> Any:
    gates = m.keep(gates_of(m, x, layer))
    return x + m.layer_scales[layer] * delta_of(m, gates, layer), gates


def mapped(m: Any, x: Tensor, layer: int) -> Any:
    gates = gates_of(m, x, layer)
    delta = torch.vmap(lambda g: g @ m.steering_vectors[layer])(gates)
    return x + m.layer_scales[layer] * delta, gates


def differentiated(m: Any, x: Tensor, layer: int) -> Any:
    gates = gates_of(m, x, layer)
    slope = torch.func.grad(lambda g: (g @ m.steering_vectors[layer]).square().sum())(gates)
    return x + m.layer_scales[layer] * delta_of(m, gates, layer), gates + slope


def checkpointed(reentrant: bool) -> Callable[..., Any]:
    def body(m: Any, x: Tensor, layer: int) -> Any:
        return checkpoint(lambda x: steered(m, x, layer), x, use_reentrant=reentrant)

    return body


def checkpointed_delta(reentrant: bool) -> Callable[..., Any]:
    def body(m: Any, x: Tensor, layer: int) -> Any:
        gates = gates_of(m, x, layer)
        return x + checkpoint(lambda g: m.layer_scales[layer] * delta_of(m, g, layer).sin(), gates, use_reentrant=reentrant), gates

    return body


def checkpointed_sum(reentrant: bool) -> Callable[..., Any]:
    """The gates are made outside of what is checkpointed, and the formula ends inside of it."""

    def body(m: Any, x: Tensor, layer: int) -> Any:
        gates = gates_of(m, x, layer)
        return checkpoint(lambda x, g: x + m.layer_scales[layer] * delta_of(m, g, layer), x, gates, use_reentrant=reentrant), gates

    return body


BODIES: dict[str, Callable[..., Any]] = {
    body.__name__: body
    for body in (
        *(function_of_logits, function_of_all_logits, function_of_mixed_logits, function_of_gates, function_of_delta),
        *(function_of_scaled_delta, function_of_steered, function_of_both, function_that_routes),
        *(is_a_tensor, through_a_submodule, mapped, differentiated),
    )
}
for kind in (checkpointed, checkpointed_delta, checkpointed_sum):
    BODIES |= {f"{kind.__name__}-{'reentrant' if reentrant else 'other'}": kind(reentrant) for reentrant in (True, False)}


_ENDING_IN_A_CHECKPOINT = ("checkpointed_delta-other", "checkpointed_sum-other")


@pytest.mark.parametrize("name", BODIES)
def test_code_that_does_not_ask_gets_numbers_and_gradients(name: str) -> None:
    if name in _ENDING_IN_A_CHECKPOINT and not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        pytest.skip("this torch does not tell whether a checkpoint begins between two steps")
    public = Loop(BODIES[name]).double()
    ours = patch_steermoe(copy.deepcopy(public))
    for model in (public, ours):
        model.keep.register_full_backward_hook(lambda module, to_input, to_output: tuple(5 * gradient for gradient in to_input))
    assert_same(everything(ours), everything(public))


def test_under_transforms_the_formula_runs_as_written(passes: list) -> None:
    public = Loop(steered).double()
    ours, x = patch_steermoe(copy.deepcopy(public)), draw()
    for transformed in (
        lambda model: torch.func.grad(lambda x: model(x)[0].square().sum())(x),
        lambda model: torch.func.jvp(lambda x: model(x)[0], (x,), (x,))[1],
        lambda model: torch.vmap(lambda x: model(x[None])[0])(x),
    ):
        torch.testing.assert_close(transformed(ours), transformed(public), rtol=1e-10, atol=1e-10)
    assert not passes


def test_nothing_can_read_or_write_the_memory_that_is_not_there() -> None:
    logits = patch_steermoe(Loop(steered)).router(draw().float())
    with torch._C.DisableTorchFunctionSubclass():
        with pytest.raises(RuntimeError, match="data pointer"):
            logits.data_ptr()
        with pytest.raises(RuntimeError, match="clone it first"), torch.no_grad():
            logits.mul_(2)
        assert logits.square().shape == logits.shape


class Doubled(torch.autograd.Function):
    """In place."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.mark_dirty(value)
        return value.mul_(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def test_a_function_that_writes_to_an_expression_is_refused() -> None:
    def body(m: Any, x: Tensor, layer: int) -> Any:
        gates = F.softmax(Doubled.apply(logits_of(m, x, layer)), dim=-1)
        return x + delta_of(m, gates, layer), gates

    with pytest.raises(RuntimeError, match="mul_ writes to a result of a patched router"):
        patch_steermoe(Loop(body))(draw().float())


def test_second_derivatives_through_a_history_are_refused() -> None:
    x = draw().float().requires_grad_()
    logits = Tripled.apply(patch_steermoe(Loop(steered)).router(x))
    (gradient,) = torch.autograd.grad(logits.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_can_be_told_beforehand_does_not_break_up_the_pass(mode: Any, passes: list) -> None:
    def body(m: Any, x: Tensor, layer: int) -> Any:
        logits = logits_of(m, x, layer)
        assert logits.shape == (*x.shape[:2], EXPERTS) and logits.dtype == x.dtype and logits.device == x.device
        gates = F.softmax(logits, dim=-1)
        assert gates.size(-1) == EXPERTS and gates.dim() == gates.ndim == 3 and len(gates) == len(x)
        return x + m.layer_scales[layer] * delta_of(m, gates, layer), gates

    with mode():
        patch_steermoe(Loop(body))(draw().float())
    assert len(passes) == LAYERS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shapes_and_dtypes_are_those_of_the_values(dtype: torch.dtype) -> None:
    ours, identity = patch_steermoe(Loop(steered)), torch.eye(EXPERTS)
    for autocast in (False, True):
        for step in range(6):
            with torch.autocast("cpu", dtype=dtype, enabled=autocast):
                made = [ours.router(draw().float())]
                made.append(made[0][:, :, 2 : 2 + EXPERTS])
                made.append(F.softmax(made[1], dim=-1))
                made.append(made[2] @ ours.steering_vectors[0])
                made += [ours.layer_scales[1] * made[3], made[1] @ identity.to(made[1].dtype)]
                expression = made[step]
                with torch._C.DisableTorchFunctionSubclass():
                    told = (expression.shape, expression.dtype, expression.stride())
                assert isinstance(expression, Expression)
                expression.sum()
                assert type(expression) is Tensor and (expression.shape, expression.dtype, expression.stride()) == told


# --- what outlives its method ------------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    y: Tensor
    gates: Tensor
    logits: Tensor


class Leaky(Loop):
    def __init__(self) -> None:
        super().__init__(steered)
        self.kept: Any = None

    def in_a_dataclass(self, x: Tensor) -> Any:
        y, gates = steered(self, x, 0)
        return Answer(y, gates, logits_of(self, y, 1))

    def as_attributes(self, x: Tensor) -> None:
        self.slot = self.router(x)
        self.kept = {"gates": [gates_of(self, x, 0)], "logits": self.slot}

    def in_steps(self, x: Tensor) -> Iterator[Any]:
        for layer in range(LAYERS):
            gates = gates_of(self, x, layer)
            sent = yield gates, logits_of(self, x, layer)
            x = (x if sent is None else sent) + self.layer_scales[layer] * delta_of(self, gates, layer)


def assert_leaks_nothing(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        assert type(tensor) is Tensor and not vars(tensor) and tensor.grad_fn is not None


def test_expressions_turn_into_tensors_wherever_they_are_kept() -> None:
    public = Leaky().double()
    ours, x = patch_steermoe(copy.deepcopy(public)), draw()
    answer, expected = ours.in_a_dataclass(x), public.in_a_dataclass(x)
    assert_leaks_nothing([answer.y, answer.gates, answer.logits])
    assert_same(vars(answer), vars(expected))

    ours.as_attributes(x)
    public.as_attributes(x)
    assert_leaks_nothing([ours.slot, ours.kept["gates"][0]])
    assert ours.kept["logits"] is ours.slot and "slot" in dict(ours.named_buffers())
    assert_same({"logits": ours.slot, "gates": ours.kept["gates"][0]}, {"logits": public.slot, "gates": public.kept["gates"][0]})


def test_generators_yield_tensors() -> None:
    public = Leaky().double()
    ours = patch_steermoe(copy.deepcopy(public))
    for mine, theirs in zip(ours.in_steps(draw()), public.in_steps(draw()), strict=True):
        assert_leaks_nothing(list(mine))
        assert_same(dict(zip("gl", mine, strict=True)), dict(zip("gl", theirs, strict=True)))
    first, second = ours.in_steps(draw()), public.in_steps(draw())
    assert_same(dict(zip("gl", next(first), strict=True)), dict(zip("gl", next(second), strict=True)))
    assert_same(
        dict(zip("gl", first.send(draw(seed=1)), strict=True)),
        dict(zip("gl", second.send(draw(seed=1)), strict=True)),
    )
    with pytest.raises(KeyError, match="stop"):
        first.throw(KeyError("stop"))


def test_an_expression_handled_outside_of_methods_is_a_tensor() -> None:
    router, x = patch_steermoe(Loop(steered)).router, draw().float()
    value = F.linear(x, router.weight, router.bias)
    with torch.no_grad():
        assert isinstance(router(x), Expression)
        assert torch.equal(pickle.loads(pickle.dumps(router(x))), value)
        assert torch.equal(copy.deepcopy(router(x)), value)
    assert repr(router(x).detach()) == repr(value.detach())
    assert f"{router(x).sum():.3f}" == f"{value.sum():.3f}"
    assert (1 - router(x) == 1 - value).all() and (router(x).detach().numpy() == value.detach().numpy()).all()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_led_to_the_gates_is_let_go(mode: Any) -> None:
    streams: list[weakref.ref[Tensor]] = []

    def body(m: Any, x: Tensor, layer: int) -> Any:
        streams.append(weakref.ref(x))
        return steered(m, x, layer)

    with mode():
        _, gates = patch_steermoe(Loop(body))(draw().float())
    assert len(gates) == LAYERS and all(type(g) is Tensor and not vars(g) for g in gates)
    assert not any(stream() is not None for stream in streams)
