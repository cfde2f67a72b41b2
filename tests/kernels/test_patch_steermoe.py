"""`patch_steermoe` on the versions of the public code: the same results before and after, and what a patched model is as an object."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_as_accurate, stack
from public_versions import (
    EXPERTS,
    LAYERS,
    VERSIONS,
    WIDTH,
    EarlyWhisper,
    Model,
    MultiRouterWhisper,
    Results,
    SingleAligner,
    SingleRouterWhisper,
    assert_same,
    build,
    differentiate,
    draw,
)
from torch import Tensor, nn

from steermoe_kernels import FusedSteerMoE, patch_steermoe, reference
from steermoe_kernels.encoders.expressions import Expression
from steermoe_kernels.encoders.patching import PatchedRouter

DRAWS = 16  # one draw's error, of a gradient of few numbers above all, is a matter of luck


# --- agreement --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "experts", "frames"), [(12, 4, 7), (33, 7, 1), (7, 1, 13)])
@pytest.mark.parametrize("version", VERSIONS)
def test_outputs_gates_and_every_gradient(version: Any, width: int, experts: int, frames: int, backend: str, device: torch.device) -> None:
    public = build(version, width, LAYERS, experts)
    ours = patch_steermoe(copy.deepcopy(public), backend=backend)
    exact = copy.deepcopy(public).double()

    def draws(model: nn.Module, dtype: torch.dtype) -> Results:
        model.to(device)
        return stack(differentiate(model, draw(width, frames, seed=seed).to(device, dtype)) for seed in range(DRAWS))

    assert_as_accurate(draws(ours, torch.float32), draws(public, torch.float32), draws(exact, torch.float64), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("version", VERSIONS)
def test_half_precision(version: Any, dtype: torch.dtype) -> None:
    public = build(version).to(dtype)
    exact = copy.deepcopy(public).double()
    ours = patch_steermoe(copy.deepcopy(public))

    def draws(model: nn.Module, dtype: torch.dtype) -> Results:
        return stack(differentiate(model, draw(seed=seed).to(torch.bfloat16).to(dtype)) for seed in range(DRAWS))

    results, publics = draws(ours, dtype), draws(public, dtype)
    assert {name: value.dtype for name, value in results.items()} == {name: value.dtype for name, value in publics.items()}
    assert_as_accurate(results, publics, draws(exact, torch.float64), dtype)


@pytest.mark.parametrize("version", VERSIONS)
def test_one_fused_pass_a_layer(version: Any, passes: list) -> None:
    ours = patch_steermoe(build(version))
    expected = 1 if version is SingleAligner else LAYERS
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            ours(draw().float())
            ours(draw().float(), return_gating=True)
        assert len(passes) == 2 * expected and set(passes) == {(2, 7, WIDTH)}
        passes.clear()


@pytest.mark.parametrize("version", VERSIONS)
def test_autocast(version: Any, passes: list) -> None:
    public = build(version)
    ours = patch_steermoe(copy.deepcopy(public))
    exact, x = copy.deepcopy(public).double(), draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results, publics = differentiate(ours, x.float()), differentiate(public, x.float())
    assert passes
    assert {name: value.dtype for name, value in results.items()} == {name: value.dtype for name, value in publics.items()}
    assert_as_accurate(results, publics, differentiate(exact, x), torch.bfloat16)


def test_the_weights_are_shared_and_keep_their_names() -> None:
    public = build(Model)
    parameters, names = list(public.parameters()), list(public.state_dict())
    assert patch_steermoe(public) is public
    assert all(mine is theirs for mine, theirs in zip(public.parameters(), parameters, strict=True))
    assert list(public.state_dict()) == names
    before = public(draw().float())
    with torch.no_grad():
        parameters[0].mul_(2)
    assert not torch.equal(public(draw().float()), before)


def test_training_follows_the_public_code() -> None:
    models = [build(Model).double()]
    models.append(patch_steermoe(copy.deepcopy(models[0])))
    losses = []
    for model in models:
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for step in range(10):
            optimizer.zero_grad()
            loss = model(draw(seed=step)).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9) and losses[0][0] != losses[0][-1]


def test_other_methods_of_the_public_code() -> None:
    public = build(SingleRouterWhisper)
    ours = patch_steermoe(copy.deepcopy(public))
    _, gates = ours(draw().float(), return_gating=True)
    _, expected = public(draw().float(), return_gating=True)
    mine, theirs = ours.get_steering_analysis(gates), public.get_steering_analysis(expected)
    assert mine["strength"] == pytest.approx(theirs["strength"], rel=1e-5) and mine["scales"] == theirs["scales"]


def test_empty_batches() -> None:
    public = build(EarlyWhisper).double()
    ours = patch_steermoe(copy.deepcopy(public))
    assert_same(differentiate(ours, draw(batch=0)), differentiate(public, draw(batch=0)))


# --- as an object -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "twin",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: torch.load(_saved(m), weights_only=False)],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("version", [Model, MultiRouterWhisper])
def test_copies_are_patched_and_stand_alone(version: Any, twin: Callable[[nn.Module], nn.Module], passes: list) -> None:
    ours = patch_steermoe(build(version))
    other = twin(ours)
    y = ours(draw().float())
    passes.clear()
    assert torch.equal(other(draw().float()), y) and len(passes) == LAYERS
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(ours(draw().float()), y)


def _saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_patching_again_only_changes_the_backend() -> None:
    ours = patch_steermoe(build(Model))
    y, plain = ours(draw().float()), type(ours.whisper_encoder)
    assert patch_steermoe(ours, backend="reference") is ours
    assert type(ours.whisper_encoder) is plain and ours.whisper_encoder.router._backend == "reference"
    torch.testing.assert_close(ours(draw().float()), y, rtol=1e-4, atol=1e-4)


def test_two_models_are_patched_one_by_one(passes: list) -> None:
    first, second = build(Model), build(Model)
    patch_steermoe(first)
    second(draw().float())
    assert not passes


@pytest.mark.parametrize("model", [nn.Linear(3, 3), FusedSteerMoE(8), reference.SteerMoEAligner(8), nn.Sequential(FusedSteerMoE(8))])
def test_nothing_to_patch(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="holds no public SteerMoE code"):
        patch_steermoe(model)


def test_a_router_of_another_kind_is_left_alone() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    public = build(EarlyWhisper).double()
    public.router = Scaled(WIDTH, LAYERS * EXPERTS).double()
    with pytest.raises(ValueError, match="holds no public SteerMoE code"):
        patch_steermoe(public)
    model = nn.ModuleList([public, build(EarlyWhisper).double()])
    patch_steermoe(model)
    assert type(public.router) is Scaled and isinstance(model[1].router, PatchedRouter)


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn module, got dict"):
        patch_steermoe({})  # type: ignore[arg-type]
    model = build(Model)
    with pytest.raises(ValueError, match="unknown backend 'opencl'"):
        patch_steermoe(model, backend="opencl")
    assert type(model.whisper_encoder) is SingleRouterWhisper and type(model.whisper_encoder.router) is nn.Linear


# --- under hooks, gradient checkpointing and torch.compile --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_on_the_router_see_tensors(kind: str, passes: list) -> None:
    ours = patch_steermoe(build(EarlyWhisper).double())
    y = ours(draw())
    passes.clear()
    seen = []
    getattr(ours.router, f"register_{kind}_hook")(lambda module, *values: seen.append(values))
    again = ours(draw())
    again.sum().backward()
    assert len(seen) == LAYERS and not passes
    assert all(isinstance(value, (Tensor, tuple)) for values in seen for value in values)
    assert not any(isinstance(item, Expression) for values in seen for value in values if isinstance(value, tuple) for item in value)
    torch.testing.assert_close(again, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    public = build(EarlyWhisper).double()
    found = []
    for model, recompute in ((patch_steermoe(copy.deepcopy(public)), True), (public, False)):
        x = draw().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant) if recompute else model(x)
        y.square().sum().backward()
        found.append({"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_same(*found)


@pytest.mark.unpoisoned
def test_compiled_the_formula_runs_as_written() -> None:
    public = build(SingleRouterWhisper, layers=2)
    ours = patch_steermoe(copy.deepcopy(public))
    torch._dynamo.reset()
    try:
        torch.compile(copy.deepcopy(public), fullgraph=True, backend="aot_eager")(draw().float(), return_gating=True)
    except torch._dynamo.exc.Unsupported as error:
        pytest.skip(f"this torch does not compile the public implementation: {str(error).splitlines()[0]}")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    y, gates = compiled(draw().float(), return_gating=True)
    expected, expected_gates = public(draw().float(), return_gating=True)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gates, expected_gates, rtol=1e-4, atol=1e-4)
