"""The operators inside everything PyTorch wraps around a model: opcheck, torch.compile, autocast, checkpointing, shared aligners."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from closeness import assert_as_accurate
from problems import Problem, draw, fused, interpreted
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from steermoe_kernels import FusedSteerMoE, reference
from steermoe_kernels import functional as SF

WIDTH, EXPERTS, LAYERS = 16, 4, 3


def _aligner(backend: str, device: torch.device, **settings: Any) -> FusedSteerMoE:
    torch.manual_seed(0)
    aligner = FusedSteerMoE(WIDTH, EXPERTS, LAYERS, output_dim=6, backend=backend, device=device, **settings)
    with torch.no_grad():
        aligner.steering_vectors.normal_()
    return aligner


def _frames(device: torch.device, *shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed)).to(device)


# --- opcheck ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "problem",
    [
        Problem(),
        Problem(top_k=2, renormalize=False, bias=False),
        Problem(top_k=2, norm="layer", residual=True),
        Problem(norm="rms", residual=True, norm_weight=False, norm_bias=False, wanted=("residual", "vectors")),
        Problem(batch=2, frames=5, norm="layer", pool="max", pool_size=2),
        Problem(batch=2, frames=5, norm="layer", pool="mean", pool_size=2, wanted=("x",)),
        Problem(frames=0),
        Problem(norm="layer", wanted=()),
        Problem(layout="permuted", norm="layer"),
    ],
    ids=str,
)
def test_opcheck(backend: str, device: torch.device, problem: Problem) -> None:
    names = ("x", "residual", "weight", "bias", "vectors", "scale", "norm_weight", "norm_bias")
    inputs, _ = draw(problem, torch.float32, device)
    top_k = problem.num_experts if problem.top_k is None else problem.top_k
    settings = (problem.norm, 1e-5, problem.pool or "", problem.pool_size, top_k, problem.renormalize, backend)
    torch.library.opcheck(torch.ops.steermoe.steer.default, (*(inputs.get(name) for name in names), *settings))


@pytest.mark.parametrize("lead", [(), (5,), (1, 2, 2, 1)], ids=str)
def test_opcheck_of_streams_of_any_shape(backend: str, device: torch.device, lead: tuple[int, ...]) -> None:
    x, residual = (_frames(device, *lead, seed=seed).requires_grad_() for seed in (1, 2))
    weight, vectors = _frames(device, EXPERTS, seed=3), _frames(device, EXPERTS, seed=4).requires_grad_()
    settings = ("layer", 1e-5, "", 1, 2, True, backend)
    arguments = (x, residual, weight, None, vectors, torch.tensor(0.1, device=device), None, None, *settings)
    torch.library.opcheck(torch.ops.steermoe.steer.default, arguments)
    with pytest.raises(ValueError, match="to be pooled over time"):
        torch.ops.steermoe.steer(*arguments[:8], "layer", 1e-5, "max", 2, 2, True, backend)


@pytest.mark.parametrize("wanted", [(), ("h",), ("weight", "bias"), ("h", "weight", "bias")])
def test_opcheck_of_the_projection(wanted: tuple[str, ...]) -> None:
    tensors = {"h": torch.randn(2, 5, WIDTH), "weight": torch.randn(6, WIDTH), "bias": torch.randn(6)}
    for name in wanted:
        tensors[name].requires_grad_()
    torch.library.opcheck(torch.ops.steermoe.project.default, tuple(tensors.values()))


def test_shapes_without_data() -> None:
    aligner = FusedSteerMoE(WIDTH, EXPERTS, LAYERS, output_dim=6, device="meta")
    x = torch.randn(2, 7, WIDTH, device="meta")
    y, gates = aligner(x, 1, return_gates=True)
    assert y.shape == x.shape and gates.shape == (2, 7, EXPERTS)
    y, normed = aligner.steer_norm(x, 1, nn.LayerNorm(WIDTH, device="meta"), pool="max", pool_size=3)
    assert y.shape == x.shape and normed.shape == (2, 3, WIDTH)
    assert aligner.project(normed).shape == (2, 3, 6)
    assert y.is_meta and gates.is_meta and normed.is_meta


# --- torch.compile ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _encoder_tail(aligner: FusedSteerMoE, norm: nn.LayerNorm) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A model that uses everything at once: a steered layer, a fused residual, a pool, a projection, a loss on the gates."""

    def run(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        with aligner.record_gates() as gates:
            h = aligner(torch.tanh(x), 0)
            h, _ = aligner.steer_norm(h, 1, norm, residual=residual)
            _, pooled = aligner.steer_norm(h, 2, norm, pool="max", pool_size=2)
            balance = sum(gate.mean((0, 1)).square().sum() for gate in gates.values())
        return aligner.project(pooled), balance  # type: ignore[return-value]

    return run


def _outputs_and_gradients(run: Callable[..., tuple[Tensor, Tensor]], parameters: dict[str, Tensor], *inputs: Tensor) -> dict[str, Tensor]:
    inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in inputs)
    q, balance = run(*inputs)
    grads = torch.autograd.grad(q.square().sum() + balance, [*inputs, *parameters.values()])
    names = [f"d{index}" for index in range(len(inputs))] + ["d" + name for name in parameters]
    return {"q": q.detach(), "balance": balance.detach()} | dict(zip(names, grads, strict=True))


def _assert_like_eager(
    compiled: Callable, eager: Callable, parameters: dict[str, Tensor], device: torch.device, lead: tuple[int, int]
) -> None:
    inputs = _frames(device, *lead), _frames(device, *lead, seed=2)
    expected = _outputs_and_gradients(eager, parameters, *inputs)
    for name, tensor in _outputs_and_gradients(compiled, parameters, *inputs).items():
        torch.testing.assert_close(tensor, expected[name], msg=lambda text: f"{name}: {text}")  # noqa: B023


def test_the_operator_shows_where_somebody_looks(backend: str, device: torch.device) -> None:
    """Eager calls skip the dispatcher, but not for the profiler or a dispatch mode, and give the same numbers either way."""
    aligner = _aligner(backend, device, top_k=2)
    x = torch.randn(2, 5, WIDTH, device=device)

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(aligner(x, 1).square().sum(), [aligner.steering_vectors, aligner.router.weight]))

    unseen = gradients()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        profiled = gradients()
    names = {event.key for event in profile.key_averages()}
    assert {"steermoe::steer", "steermoe::steer_backward"} <= names
    with _Names() as seen:
        dispatched = gradients()
    assert {"steermoe.steer.default", "steermoe.steer_backward.default"} <= seen.names
    for others in (profiled, dispatched):
        assert all(map(torch.equal, unseen, others))


class _Names(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_compiled_without_graph_breaks_at_any_length(backend: str, device: torch.device, fresh_dynamo: None) -> None:
    """One graph, traced with symbolic sizes, serves every batch and length, forward and backward, with the operators' own results."""
    aligner, norm = _aligner(backend, device, top_k=2), nn.LayerNorm(WIDTH, device=device)
    parameters = dict(aligner.named_parameters()) | dict(norm.named_parameters(prefix="norm"))
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    eager = _encoder_tail(aligner, norm)
    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend=keep)
    _assert_like_eager(compiled, eager, parameters, device, (2, 6))
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch, frames in ((2, 7), (3, 11), (5, 4)):
            _assert_like_eager(compiled, eager, parameters, device, (batch, frames))
    called = [node.target for node in graphs[-1].graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.steermoe.steer.default) == 3 and called.count(torch.ops.steermoe.project.default) == 1


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.skipif(importlib.util.find_spec("torch._inductor") is None, reason="this torch has no Inductor")
def test_compiled_by_inductor(backend: str, device: torch.device, fresh_dynamo: None) -> None:
    aligner, norm = _aligner(backend, device), nn.LayerNorm(WIDTH, device=device)
    parameters = dict(aligner.named_parameters()) | dict(norm.named_parameters(prefix="norm"))
    eager = _encoder_tail(aligner, norm)
    compiled = torch.compile(eager, fullgraph=True, dynamic=True)
    for frames in (6, 9):
        _assert_like_eager(compiled, eager, parameters, device, (2, frames))


def test_a_compiled_call_fails_with_the_same_words(backend: str, device: torch.device, fresh_dynamo: None) -> None:
    aligner = _aligner(backend, device)

    def run(h: Tensor, vectors: Tensor) -> Tensor:
        weight, bias, _, scale = aligner.layer(0)
        return SF.steer(h, weight, bias, vectors, scale, backend=backend)[0]

    h, vectors = _frames(device, 3), torch.ones(EXPERTS, WIDTH + 1, device=device)
    message = rf"vectors must have shape \({EXPERTS}, {WIDTH}\) for a stream of width {WIDTH}, got \({EXPERTS}, {WIDTH + 1}\)"
    with pytest.raises(ValueError, match=message):
        run(h, vectors)
    with pytest.raises(Exception, match=message):
        torch.compile(run, backend="aot_eager")(h, vectors)


@pytest.mark.parametrize("lead", [(7,), (7, 3), (7, 2, 3)], ids=str)
def test_exported_and_traced_at_any_length(backend: str, device: torch.device, lead: tuple[int, ...]) -> None:
    """A graph holds no number of frames, whatever the rank."""
    aligner = _aligner(backend, device).requires_grad_(False)
    exported = torch.export.export(aligner, (_frames(device, *lead),), dynamic_shapes=({0: torch.export.Dim("length", min=2, max=99)},))
    traced = torch.jit.trace(aligner, _frames(device, *lead))
    longer = _frames(device, 11, *lead[1:])
    for graph in (exported.module(), traced):
        assert torch.equal(graph(longer), aligner(longer))


# --- autocast ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """A layer's output is half, the stream and the parameters are float32: the fused pass runs in float32, the projection in half."""
    aligner, norm = _aligner(backend, device), nn.LayerNorm(WIDTH, device=device)
    layer = nn.Linear(WIDTH, WIDTH, device=device)
    x = _frames(device, 2, 5)
    with torch.autocast(device.type, dtype):
        out = layer(x)
        assert out.dtype == dtype
        y, normed = aligner.steer_norm(out, 1, norm, residual=x)
        q = aligner.project(normed)
    assert (y.dtype, normed.dtype, q.dtype) == (torch.float32, torch.float32, dtype)
    grads = torch.autograd.grad(q.float().square().sum(), [layer.weight, *aligner.parameters()], retain_graph=True)
    expected_y, expected_normed = aligner.steer_norm(out.float(), 1, norm, residual=x)
    expected_q = aligner.project(expected_normed.to(dtype))
    expected = torch.autograd.grad(expected_q.float().square().sum(), [layer.weight, *aligner.parameters()])
    assert torch.equal(y, expected_y) and torch.equal(normed, expected_normed) and torch.equal(q, expected_q)
    for mine, theirs in zip(grads, expected, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs)


def test_autocast_leaves_a_whole_pass_alone(backend: str, device: torch.device) -> None:
    """Same numbers inside and outside: autocast must not reach into the operators' own products."""
    aligner, x = _aligner(backend, device), _frames(device, 2, 5)
    outside, outside_gates = aligner(x, 1, return_gates=True)
    with torch.autocast(device.type, torch.bfloat16):
        inside, inside_gates = aligner(x, 1, return_gates=True)
        inside_grads = torch.autograd.grad(inside.square().sum(), [aligner.router.weight, aligner.steering_vectors])
    outside_grads = torch.autograd.grad(outside.square().sum(), [aligner.router.weight, aligner.steering_vectors])
    assert torch.equal(inside, outside) and torch.equal(inside_gates, outside_gates)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(inside_grads, outside_grads, strict=True))


# --- checkpointing ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("top_k, renormalize", [(None, True), (2, False)])
def test_gradient_checkpointing(backend: str, device: torch.device, top_k: int | None, renormalize: bool, use_reentrant: bool) -> None:
    aligner = _aligner(backend, device, top_k=top_k, renormalize=renormalize)
    norm, mix = nn.LayerNorm(WIDTH, device=device), nn.Linear(WIDTH, WIDTH, device=device)

    def block(h: Tensor, layer: int) -> Tensor:
        y, normed = aligner.steer_norm(mix(h), layer, norm, residual=h)
        return y + normed

    def gradients(checkpointed: bool) -> list[Tensor]:
        h = start = _frames(device, 2, 5).requires_grad_()
        for layer in range(LAYERS):
            h = checkpoint(block, h, layer, use_reentrant=use_reentrant) if checkpointed else block(h, layer)
        for module in (aligner, norm, mix):
            module.zero_grad()
        aligner.project(h).square().sum().backward()
        leaves = [start, *aligner.parameters(), *norm.parameters(), *mix.parameters()]
        return [h.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    kept, redone = gradients(checkpointed=False), gradients(checkpointed=True)
    assert len(kept) == 2 + len([*aligner.parameters(), *norm.parameters(), *mix.parameters()])
    assert all(torch.equal(*pair) for pair in zip(kept, redone, strict=True))


# --- one aligner, many uses ---------------------------------------------------------------------------------------------------------------


def test_several_layers_and_clips_in_one_graph(backend: str, device: torch.device) -> None:
    """Clips of different lengths, each through every layer and one of them twice, one backward."""
    fused = _aligner(backend, device)
    clips = [_frames(device, 1, frames, seed=frames) for frames in ((3, 4) if interpreted(backend) else (3, 50, 17))]

    def run(kind: type, dtype: torch.dtype) -> dict[str, Any]:
        aligner: Any = fused
        if kind is not FusedSteerMoE:
            aligner = kind(WIDTH, EXPERTS, LAYERS, output_dim=6, device=device, dtype=dtype)
            aligner.load_state_dict(fused.state_dict())
        aligner.zero_grad()
        starts = [clip.clone().to(dtype).requires_grad_() for clip in clips]
        ends = []
        for h in starts:
            for layer in (0, 1, 2, 1):
                h, gates = aligner(h, layer, return_gates=True)
            ends.append(aligner.project(h).square().mean() + gates.square().sum())
        torch.stack(ends).sum().backward()
        grads = {"d" + name: parameter.grad.clone() for name, parameter in aligner.named_parameters()}
        clip_grads = {f"dclip {index}": start.grad for index, start in enumerate(starts)}
        return {"ends": torch.stack(ends).detach()} | grads | clip_grads

    plain, exact = run(reference.SteerMoEAligner, torch.float32), run(reference.SteerMoEAligner, torch.float64)
    assert_as_accurate(run(FusedSteerMoE, torch.float32), plain, exact, torch.float32)


def test_gradients_accumulate(backend: str, device: torch.device) -> None:
    aligner = _aligner(backend, device)
    aligner(_frames(device, 2, 3), 0).square().sum().backward()
    once = {name: parameter.grad.clone() for name, parameter in aligner.named_parameters() if parameter.grad is not None}
    aligner(_frames(device, 2, 3), 0).square().sum().backward()
    for name, grad in once.items():
        assert torch.equal(dict(aligner.named_parameters())[name].grad, 2 * grad), name


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)], ids=str)
def test_the_gradient_of_stream_and_residual_accumulates_in_each(
    backend: str, device: torch.device, lead: tuple[int, ...], compiled: bool, fresh_dynamo: None
) -> None:
    if interpreted(backend) and lead != (3,):
        pytest.skip("too slow in Triton's interpreter")
    streams = [_frames(device, *lead, seed=seed).requires_grad_() for seed in (1, 2)]
    weight, vectors = _frames(device, EXPERTS, seed=3), _frames(device, EXPERTS, seed=4)

    def run(x: Tensor, residual: Tensor) -> Tensor:
        y, normed, gates = SF.steer_norm(x, weight, None, vectors, 0.1, None, None, residual=residual, backend=backend)
        return y.square().sum() + normed[..., :3].sum() + gates.square().sum()

    passes = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
    once = torch.autograd.grad(run(*streams), streams)
    for _ in range(2):
        passes(*streams).backward()
    for stream, grad in zip(streams, once, strict=True):
        torch.testing.assert_close(stream.grad, 2 * grad)


def test_functional_call_with_other_weights(backend: str, device: torch.device) -> None:
    aligner, h = _aligner(backend, device), _frames(device, 2, 3)
    weights = {name: tensor + 0.5 for name, tensor in aligner.state_dict().items()}
    steered = torch.func.functional_call(aligner, weights, (h, 1))
    aligner.load_state_dict(weights)
    assert torch.equal(steered, aligner(h, 1))


# --- threads, and CUDA graphs -------------------------------------------------------------------------------------------------------------


def test_threads_with_streams_of_different_widths(backend: str, device: torch.device) -> None:
    """What one thread asks of a kernel, shared memory above all, is no business of another that launches it at the same time."""
    if interpreted(backend):
        pytest.skip("too slow in Triton's interpreter")
    problems = [Problem(frames=40, width=width, norm="layer", residual=True) for width in (1280, 8)]
    draws = [draw(problem, torch.float32, device) for problem in problems]
    expected = [fused(problem, *drawn, backend) for problem, drawn in zip(problems, draws, strict=True)]

    def run(which: int) -> bool:
        runs = (fused(problems[which], *draws[which], backend) for _ in range(30))
        return all(torch.equal(results[name], tensor) for results in runs for name, tensor in expected[which].items())

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == [True, True]


@pytest.mark.parametrize("width, num_experts", [(40, 8), (40, 20), (33, 8)])
def test_captured_in_a_cuda_graph(backend: str, device: torch.device, width: int, num_experts: int) -> None:
    """A pass and its gradients, captured once, replayed on other numbers."""
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    problem = Problem(frames=37, width=width, num_experts=num_experts, norm="layer", residual=True)
    (inputs, incoming), (others, _) = (draw(problem, torch.bfloat16, device, seed) for seed in range(2))
    expected = fused(problem, others, incoming, backend)
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # kernels are loaded, and Triton's compiled, before the capture
        fused(problem, inputs, incoming, backend)
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = fused(problem, inputs, incoming, backend)
    with torch.no_grad():
        for name, tensor in inputs.items():
            tensor.copy_(others[name])
    graph.replay()
    for name, tensor in expected.items():
        assert torch.equal(results[name], tensor), name
