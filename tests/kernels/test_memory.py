"""What a steering pass keeps for its backward, computes there, and leaves alone."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from problems import Problem, call, draw, dtypes_of, interpreted
from torch import Tensor

from steermoe_kernels import FusedSteerMoE
from steermoe_kernels import functional as SF


def _kept(forward: Callable[[], object], known: Iterable[Tensor]) -> tuple[object, dict[int, Tensor]]:
    """What ``forward`` returned, and the tensors it saved for the backward: one a storage, without those of ``known``."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    mine = {tensor.untyped_storage().data_ptr() for tensor in known}
    return result, {pointer: tensor for pointer, tensor in saved.items() if pointer not in mine and tensor.numel()}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("top_k, renormalize", [(None, True), (2, True), (2, False)])
@pytest.mark.parametrize("norm, pool", [("", None), ("layer", None), ("rms", None), ("layer", "max"), ("layer", "mean")])
def test_gates_and_two_numbers_a_frame(
    backend: str, device: torch.device, top_k: int | None, renormalize: bool, norm: str, pool: str | None
) -> None:
    problem = Problem(
        batch=2,
        frames=5,
        num_experts=8,
        top_k=top_k,
        renormalize=renormalize,
        norm=norm,
        pool=pool,
        pool_size=2 if pool else 1,
        residual=bool(norm),
    )
    for dtype in dtypes_of(backend, device):
        inputs, _ = draw(problem, dtype, device)
        stream = {name: inputs.pop(name) for name in ("x", "residual") if name in inputs}
        settings = {"top_k": top_k, "renormalize": renormalize, "backend": backend}
        outputs, saved = _kept(partial(call, SF, problem, stream | inputs, settings), inputs.values())
        y = outputs["y"]  # type: ignore[index]
        saved.pop(y.untyped_storage().data_ptr(), None)
        for tensor in stream.values():
            assert tensor.untyped_storage().data_ptr() not in saved, "the stream is kept"
        frames, wide = problem.batch * problem.frames, y.new_empty(0).to(torch.promote_types(dtype, torch.float32)).element_size()
        gates = frames * problem.num_experts * wide
        probs = 0 if renormalize else gates
        stats = 2 * problem.batch * problem.pooled * wide if norm else 0
        assert _bytes(saved.values()) == gates + probs + stats, f"{dtype}: {[tuple(tensor.shape) for tensor in saved.values()]}"


def test_at_most_a_twentieth_of_what_the_public_formula_keeps(backend: str, device: torch.device) -> None:
    layers, num_experts, width = 4, 8, 384
    frames = 5 if interpreted(backend) else 50
    aligner = FusedSteerMoE(width, num_experts, layers, backend=backend, device=device)

    def public(h: Tensor) -> list[Tensor]:
        streams = [h]
        for layer in range(layers):
            logits = aligner.router(streams[-1]).view(1, frames, layers, num_experts)[:, :, layer]
            steering = torch.einsum("bte,ef->btf", torch.softmax(logits, -1), aligner.steering_vectors[layer])
            streams.append(streams[-1] + aligner.layer_scales[layer] * steering)
        return streams

    def ours(h: Tensor) -> list[Tensor]:
        streams = [h]
        for layer in range(layers):
            streams.append(aligner(streams[-1], layer))
        return streams

    def kept(forward: Callable[[Tensor], list[Tensor]], *, count_streams: bool) -> int:
        h = torch.randn(1, frames, width, device=device)
        streams, saved = _kept(lambda: forward(h), aligner.parameters())
        if not count_streams:
            for y in streams:  # type: ignore[attr-defined]
                saved.pop(y.untyped_storage().data_ptr(), None)
        return _bytes(saved.values())

    assert kept(ours, count_streams=False) <= 0.05 * kept(public, count_streams=True)


def test_nothing_is_kept_without_gradients(backend: str, device: torch.device) -> None:
    problem = Problem(norm="layer", residual=True)
    inputs, _ = draw(problem, torch.float32, device)
    with torch.no_grad():
        outputs, saved = _kept(lambda: call(SF, problem, inputs, {"backend": backend}), [])
    assert not saved
    assert not any(output.requires_grad for output in outputs.values())  # type: ignore[attr-defined]
    frozen = {name: tensor.detach() for name, tensor in inputs.items()}
    outputs, saved = _kept(lambda: call(SF, problem, frozen, {"backend": backend}), [])
    assert not saved
    assert not any(output.requires_grad for output in outputs.values())  # type: ignore[attr-defined]


def test_the_projection_keeps_its_input_for_the_weight_alone() -> None:
    h, weight, bias = torch.randn(6, 8, requires_grad=True), torch.randn(4, 8), torch.randn(4)
    _, saved = _kept(lambda: SF.project(h, weight, bias), [weight, bias])
    assert not saved
    _, saved = _kept(lambda: SF.project(h, weight.requires_grad_(), bias), [weight, bias])
    assert [tensor.shape for tensor in saved.values()] == [h.shape]


# --- what the backward computes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted",
    [
        ("x",),
        ("residual",),
        ("weight", "bias", "vectors", "scale"),
        ("x", "vectors"),
        ("norm_weight",),
        ("x", "residual", "weight", "bias", "vectors", "scale", "norm_weight", "norm_bias"),
    ],
    ids="-".join,
)
def test_frozen_inputs_cost_nothing(backend: str, device: torch.device, wanted: tuple[str, ...], listen: Callable[..., None]) -> None:
    """The backend is told which gradients are needed, and tensors that nobody asked about get none."""
    asked: list[list[bool]] = []
    listen(backend, lambda direction, arguments: direction == "backward" and asked.append(list(arguments[-1])))
    problem = Problem(norm="layer", residual=True, wanted=wanted)
    inputs, _ = draw(problem, torch.float32, device)
    outputs = call(SF, problem, inputs, {"backend": backend})
    (outputs["y"] + outputs["normed"]).sum().backward()
    stream = "x" in wanted or "residual" in wanted
    parameters = ("weight", "bias", "vectors", "scale", "norm_weight", "norm_bias")
    assert asked == [[stream, *(name in wanted for name in parameters)]]
    assert {name for name, tensor in inputs.items() if tensor.grad is not None} == set(wanted)


def test_gradients_that_do_not_come_in_are_not_made_up(backend: str, device: torch.device, listen: Callable[..., None]) -> None:
    """An output nobody differentiates reaches the backend as None, not as a stream of zeros."""
    came: list[set[str]] = []

    def hear(direction: str, arguments: tuple) -> None:
        if direction == "backward":
            came.append({name for name, grad in zip(("y", "normed", "gates"), arguments, strict=False) if grad is not None})

    listen(backend, hear)
    for used in ({"y"}, {"normed"}, {"gates"}, {"y", "gates"}):
        inputs, _ = draw(Problem(norm="layer"), torch.float32, device)
        outputs = call(SF, Problem(norm="layer"), inputs, {"backend": backend})
        torch.stack([outputs[name].sum() for name in used]).sum().backward()
        assert came.pop() == used


def test_a_frozen_router_trains_the_rest(backend: str, device: torch.device) -> None:
    aligner = FusedSteerMoE(12, 4, 2, backend=backend, device=device)
    aligner.router.requires_grad_(False)
    h = torch.randn(3, 12, device=device)
    aligner(aligner(h, 0), 1).sum().backward()
    assert aligner.router.weight.grad is None and aligner.router.bias.grad is None
    assert aligner.steering_vectors.grad is not None and aligner.layer_scales.grad is not None


# --- what it never writes to --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize(
    "problem",
    [
        Problem(num_experts=8),
        Problem(num_experts=8, top_k=2, renormalize=False, norm="rms", residual=True),
        Problem(batch=2, frames=5, num_experts=8, norm="layer", pool="max", pool_size=2, residual=True),
        Problem(batch=2, frames=5, num_experts=8, norm="layer", pool="mean", pool_size=1),
    ],
    ids=str,
)
def test_inputs_and_incoming_gradients_are_only_read(backend: str, device: torch.device, problem: Problem, layout: str) -> None:
    problem = replace(problem, layout=layout)
    for dtype in dtypes_of(backend, device):
        inputs, incoming = draw(problem, dtype, device)
        outputs = call(SF, problem, inputs, {"top_k": problem.top_k, "renormalize": problem.renormalize, "backend": backend})
        coming = {name: incoming[name].to(output.dtype) for name, output in outputs.items()}
        read = inputs | {"d" + name: tensor for name, tensor in coming.items()} | outputs
        before = {name: (tensor.detach().clone(), tensor._version) for name, tensor in read.items()}
        torch.autograd.grad(list(outputs.values()), list(inputs.values()), list(coming.values()), retain_graph=True)
        torch.autograd.grad(list(outputs.values()), list(inputs.values()), list(coming.values()))
        for name, (value, version) in before.items():
            assert torch.equal(read[name], value), f"{name} was written to"
            assert read[name]._version == version, f"{name} was written to"
        storages = {tensor.untyped_storage().data_ptr() for tensor in inputs.values()}
        assert not any(output.untyped_storage().data_ptr() in storages for output in outputs.values()), "an output is an input"


def test_a_steered_stream_changed_in_place_is_noticed(backend: str, device: torch.device) -> None:
    """The backward undoes the step from ``y``; if somebody overwrote it, autograd says so instead of answering wrongly."""
    inputs, _ = draw(Problem(), torch.float32, device)
    y, _ = SF.steer(*inputs.values(), backend=backend)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def _large_pages_on_request() -> bool:
    """Whether Linux backs memory with pages of 2 MB where a process asks for them."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.is_file() and "[never]" not in setting.read_text()


@pytest.mark.unpoisoned
@pytest.mark.skipif(not _large_pages_on_request(), reason="this system has no transparent huge pages")
@pytest.mark.parametrize("norm", ["", "layer"])
def test_fresh_streams_on_the_cpu_come_in_large_pages(norm: str) -> None:
    """At 40 MB a tensor, C libraries take memory from the system and give it back: each result's pages are all new."""
    problem = Problem(batch=1, frames=40_000, width=256, num_experts=2, norm=norm)
    inputs, gradients = draw(problem, torch.float32, torch.device("cpu"))
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        outputs = call(SF, problem, leaves, {"backend": "cpu"})
        y = outputs["y"]
        torch.autograd.grad(y, list(leaves.values()), gradients["y"], allow_unused=True)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    fresh = (2 + bool(norm)) * problem.frames * problem.width * 4 / resource.getpagesize()
    counts = [faults() for _ in range(5)]
    assert min(counts) < 0.25 * fresh, f"{counts} page faults, {fresh:.0f} small pages"
