"""`FusedSteerMoE`: names, sizes, what it starts from, what it shares with the plain aligner, and how it copies."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_as_accurate
from problems import dtypes_of
from torch import Tensor, nn
from torch.nn.utils import prune

from steermoe_kernels import FusedSteerMoE, reference
from steermoe_kernels import functional as SF

WIDTH, EXPERTS, LAYERS, OUT = 12, 5, 3, 7


def _aligner(backend: str, device: torch.device | str = "cpu", **settings: object) -> FusedSteerMoE:
    torch.manual_seed(0)
    aligner = FusedSteerMoE(WIDTH, EXPERTS, LAYERS, backend=backend, **{"output_dim": OUT} | settings).to(device)  # type: ignore[arg-type]
    with torch.no_grad():
        aligner.steering_vectors.normal_()
        aligner.layer_scales.copy_(torch.linspace(0.1, 0.4, LAYERS))
    return aligner


def _frames(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)


# --- parameters -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FusedSteerMoE, reference.SteerMoEAligner])
def test_the_published_size(kind: type) -> None:
    """Whisper-large-v3 with 8 experts, read by a language model of width 896."""
    aligner = kind(1280, num_experts=8, num_layers=32, output_dim=896, device="meta")
    shapes = {name: tuple(parameter.shape) for name, parameter in aligner.named_parameters()}
    assert shapes == {
        "steering_vectors": (32, 8, 1280),
        "layer_scales": (32,),
        "router.weight": (256, 1280),
        "router.bias": (256,),
        "prompt_proj.weight": (896, 1280),
        "prompt_proj.bias": (896,),
    }
    assert sum(parameter.numel() for parameter in aligner.parameters()) == 1_803_424
    assert not list(aligner.buffers())


def test_what_it_starts_from() -> None:
    torch.manual_seed(0)
    aligner = FusedSteerMoE(256, 16, 8, steering_scale=0.25)
    vectors = aligner.steering_vectors
    assert abs(vectors.mean().item()) < 4 * 0.01 / vectors.numel() ** 0.5
    assert abs(vectors.std().item() - 0.01) < 1e-4
    assert (aligner.layer_scales == 0.25).all()
    torch.manual_seed(0)
    torch.randn(8, 16, 256)
    linear = nn.Linear(256, 8 * 16)
    assert torch.equal(aligner.router.weight, linear.weight) and torch.equal(aligner.router.bias, linear.bias)
    assert aligner.prompt_proj is None
    assert (FusedSteerMoE(4).num_experts, FusedSteerMoE(4).num_layers) == (8, 1)
    assert (FusedSteerMoE(4).layer_scales == torch.tensor(0.1)).all()


def test_the_plain_aligner_takes_the_same_arguments() -> None:
    fused, plain = (inspect.signature(kind).parameters for kind in (FusedSteerMoE, reference.SteerMoEAligner))
    assert {name: parameter for name, parameter in fused.items() if name != "backend"} == dict(plain)


@pytest.mark.parametrize("output_dim", [None, OUT])
def test_state_dicts_are_interchangeable(output_dim: int | None) -> None:
    fused, plain = (kind(WIDTH, EXPERTS, LAYERS, output_dim=output_dim) for kind in (FusedSteerMoE, reference.SteerMoEAligner))
    assert list(fused.state_dict()) == list(plain.state_dict())
    for source, target in ((fused, plain), (plain, fused)):
        nn.init.normal_(source.layer_scales)
        target.load_state_dict(source.state_dict())
        for name, tensor in source.state_dict().items():
            assert torch.equal(target.state_dict()[name], tensor), name


def test_the_same_seed_makes_the_same_aligner() -> None:
    made = []
    for kind in (FusedSteerMoE, reference.SteerMoEAligner):
        torch.manual_seed(3)
        made.append(kind(WIDTH, EXPERTS, LAYERS, output_dim=OUT).state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


# --- forward ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k, renormalize", [(None, True), (2, True), (2, False)])
def test_every_layer_is_the_plain_aligners(backend: str, device: torch.device, top_k: int | None, renormalize: bool) -> None:
    fused = _aligner(backend, device, top_k=top_k, renormalize=renormalize)
    if top_k is not None:  # experts far apart, so that all take the same
        nn.init.normal_(fused.router.bias, std=20.0, generator=torch.Generator(device).manual_seed(4))

    def run(kind: type, dtype: torch.dtype) -> dict[str, Tensor]:
        if kind is FusedSteerMoE:
            aligner: Any = fused
        else:
            aligner = kind(WIDTH, EXPERTS, LAYERS, top_k=top_k, renormalize=renormalize, output_dim=OUT, device=device, dtype=dtype)
            aligner.load_state_dict(fused.state_dict())
        h = _frames(device, dtype).requires_grad_()
        results = {}
        y = h
        for layer in range(LAYERS):
            y, results[f"gates {layer}"] = aligner(y, layer, return_gates=True)
            assert torch.equal(aligner(y, layer), aligner(y, layer, return_gates=True)[0])
        q = aligner.project(y)
        (q.square().sum() + results["gates 1"].square().sum()).backward()
        grads = {"d" + name: parameter.grad for name, parameter in aligner.named_parameters()}
        return {"y": y, "q": q, "dh": h.grad} | results | grads

    plain, exact = run(reference.SteerMoEAligner, torch.float32), run(reference.SteerMoEAligner, torch.float64)
    assert_as_accurate(run(FusedSteerMoE, torch.float32), plain, exact, torch.float32)


def test_one_layer_is_the_default(backend: str, device: torch.device) -> None:
    aligner = _aligner(backend, device)
    assert torch.equal(aligner(_frames(device)), aligner(_frames(device), 0))
    assert not torch.equal(aligner(_frames(device)), aligner(_frames(device), 1))


def test_frames_of_any_rank(backend: str, device: torch.device) -> None:
    aligner, h = _aligner(backend, device), _frames(device)
    whole, gates = aligner(h, 1, return_gates=True)
    assert gates.shape == (2, 5, EXPERTS)
    for shape in ((10, WIDTH), (1, 2, 1, 5, WIDTH)):
        y, g = aligner(h.view(shape), 1, return_gates=True)
        assert y.shape == shape and g.shape == (*shape[:-1], EXPERTS)
        assert torch.equal(y.view(2, 5, WIDTH), whole)
    y, g = aligner(h[0, 0], 1, return_gates=True)
    assert y.shape == (WIDTH,) and g.shape == (EXPERTS,)
    torch.testing.assert_close(y, whole[0, 0])


def test_layer_parameters_are_the_layers(backend: str, device: torch.device) -> None:
    aligner = _aligner(backend, device)
    slices = aligner.layer_parameters()
    assert len(slices) == LAYERS
    for layer, cut in enumerate(slices):
        for name, tensor in aligner.layer(layer)._asdict().items():
            assert torch.equal(getattr(cut, name), tensor), name

    def gradients(cut_once: bool) -> list[Tensor]:
        parameters = aligner.layer_parameters() if cut_once else [aligner.layer(layer) for layer in range(LAYERS)]
        y = _frames(device)
        for layer in parameters:
            y, _ = SF.steer(y, *layer, backend=backend)
        trained = [parameter for name, parameter in aligner.named_parameters() if not name.startswith("prompt_proj")]
        return list(torch.autograd.grad(y.square().sum(), trained))

    assert all(torch.equal(once, each) for once, each in zip(gradients(True), gradients(False), strict=True))


@pytest.mark.parametrize("affine", [True, False])
def test_steer_norm_takes_the_norm_that_reads_next(backend: str, device: torch.device, affine: bool) -> None:
    aligner, x, residual = _aligner(backend, device, top_k=2), _frames(device), _frames(device).flip(0)
    norm = nn.LayerNorm(WIDTH, eps=1e-3, elementwise_affine=affine, device=device)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    settings: dict[str, Any] = {"residual": residual, "pool": "mean", "pool_size": 2}
    with aligner.record_gates() as gates:
        y, normed = aligner.steer_norm(x, 1, norm, **settings)
        again = aligner.steer_norm(x, 1, norm, parameters=aligner.layer_parameters()[1], **settings)
    expected = SF.steer_norm(x, *aligner.layer(1), norm.weight, norm.bias, eps=1e-3, top_k=2, backend=backend, **settings)
    for mine, theirs in ((y, expected[0]), (normed, expected[1]), (gates[1], expected[2]), (again[0], y), (again[1], normed)):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("eps", [1e-3, None])
def test_steer_norm_takes_an_rms_norm(backend: str, device: torch.device, eps: float | None) -> None:
    aligner, x = _aligner(backend, device), _frames(device)
    norm = nn.RMSNorm(WIDTH, eps=eps, device=device)
    nn.init.normal_(norm.weight)
    y, normed = aligner.steer_norm(x, 1, norm)
    torch.testing.assert_close(normed, norm(y))

    class T5RMSNorm(nn.Module):  # the names that transformers' own use
        weight, variance_epsilon = norm.weight, 1e-3 if eps is None else eps

    expected = nn.functional.rms_norm(y, (WIDTH,), norm.weight, T5RMSNorm.variance_epsilon)
    torch.testing.assert_close(aligner.steer_norm(x, 1, T5RMSNorm())[1], expected)
    T5RMSNorm.__name__ = "T5LayerNorm"  # what transformers calls it, although it takes no mean off
    torch.testing.assert_close(aligner.steer_norm(x, 1, T5RMSNorm())[1], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_residual", [False, True])
def test_an_eps_that_is_left_to_torch(backend: str, device: torch.device, dtype: torch.dtype, of_residual: bool) -> None:
    """Of small streams in half precision it is most of the norm; and the stream is the residual's where that is wider."""
    if dtype not in dtypes_of(backend, device):
        pytest.skip(f"{backend} does not take {dtype} here")
    aligner, x = _aligner(backend, device), 0.01 * _frames(device).detach()
    norm = nn.RMSNorm(WIDTH, device=device)
    residual = 0.01 * torch.randn_like(x) if of_residual else None
    with torch.no_grad():
        aligner.steering_vectors.mul_(0.001)
        y, normed = aligner.steer_norm(x.to(dtype), 1, norm.to(torch.float32 if of_residual else dtype), residual=residual)
    assert y.dtype == (torch.float32 if of_residual else dtype)
    torch.testing.assert_close(normed, norm(y), rtol=2 * torch.finfo(y.dtype).eps, atol=1e-6)


def test_an_eps_that_is_left_to_torch_does_not_hinder_tracers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.aligner, self.norm = FusedSteerMoE(16, 4, 1), nn.RMSNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.aligner.steer_norm(x, 0, self.norm)[1]

    torch.export.export(Net(), (torch.randn(2, 3, 16),), strict=False)
    with torch.device("meta"):
        assert Net()(torch.randn(2, 3, 16)).shape == (2, 3, 16)


# --- router and prompt_proj that are not plain ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
        nn.utils.weight_norm,
        lambda linear: nn.utils.spectral_norm(linear.eval()),  # in training, each forward takes the weight further
        nn.utils.parametrizations.weight_norm,
    ],
    ids=["pruned", "weight_norm", "spectral_norm", "parametrized"],
)
def test_weights_that_are_made_for_each_forward(backend: str, device: torch.device, change: Callable[[nn.Module], object]) -> None:
    aligner, h = _aligner(backend, device), _frames(device)
    for linear in (aligner.router, aligner.prompt_proj):
        change(linear)
    optimizer = torch.optim.SGD(aligner.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        y, _ = SF.steer(h, *aligner.layer_parameters()[1], backend=backend)
        q, routed = aligner.project(aligner(y, 0)), aligner(h, 2, return_gates=True)[1]
        (q.square().sum() + routed.square().sum()).backward()
        gradients = [parameter.grad for name, parameter in aligner.named_parameters() if parameter.numel() > 1]
        assert all(gradient is not None and gradient.any() for gradient in gradients)
        optimizer.step()
    cut, gates, q = aligner.layer_parameters()[1].weight, aligner(h, 1, return_gates=True)[1], aligner.project(h)
    logits = aligner.router(h).unflatten(-1, (LAYERS, EXPERTS))[..., 1, :]
    torch.testing.assert_close(gates, logits.softmax(-1))
    torch.testing.assert_close(q, aligner.prompt_proj(h))
    assert torch.equal(cut, aligner.layer(1).weight)


def test_other_hooks_are_not_run() -> None:
    aligner, h = _aligner("auto"), _frames()
    y = aligner(h, 1)
    aligner.router.register_forward_pre_hook(lambda *_: pytest.fail("the router is not called"))
    assert torch.equal(aligner(h, 1), y) and len(aligner.layer_parameters()) == LAYERS


class MethodsForWeights(nn.Module):
    """As torch's quantized Linear has them."""

    def weight(self) -> None: ...

    def bias(self) -> None: ...


class Adapter(nn.Module):
    """As low-rank adapters wrap a Linear: with its weight, and more than that in the forward."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.more = nn.Linear(base.in_features, base.out_features)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, h: Tensor) -> Tensor:
        return self.base(h) + self.more(h)


@pytest.mark.parametrize("wrap", [lambda _: MethodsForWeights(), Adapter, nn.Sequential], ids=["quantized", "adapter", "sequential"])
def test_a_router_or_projection_that_is_more_than_its_weight(wrap: Callable[[nn.Linear], nn.Module]) -> None:
    aligner = _aligner("auto")
    aligner.router, aligner.prompt_proj = wrap(aligner.router), wrap(aligner.prompt_proj)  # type: ignore[assignment]
    kind = type(aligner.router).__name__
    for call in (lambda: aligner(_frames(), 1), aligner.layer_parameters):
        with pytest.raises(TypeError, match=rf"router must be a torch\.nn\.Linear, got \S*{kind}, which"):
            call()
    with pytest.raises(TypeError, match=rf"prompt_proj must be a torch\.nn\.Linear, got \S*{kind}, which"):
        aligner.project(_frames())


def test_a_router_without_a_bias() -> None:
    aligner = _aligner("auto")
    aligner.router.bias = None
    for call in (lambda: aligner(_frames(), 1), aligner.layer_parameters):
        with pytest.raises(TypeError, match=r"router\.bias must be a tensor, got NoneType"):
            call()


# --- project ----------------------------------------------------------------------------------------------------------------------------


def test_project(backend: str, device: torch.device) -> None:
    proj = _aligner(backend, device).prompt_proj
    for dtype in dtypes_of(backend, device):
        incoming = torch.randn(2, 5, OUT, generator=torch.Generator().manual_seed(5))
        given = [tensor.detach().to(device, dtype) for tensor in (_frames(), proj.weight, proj.bias, incoming)]
        fused, plain = _projected(SF.project, *given), _projected(nn.functional.linear, *given)
        exact = _projected(nn.functional.linear, *(tensor.double() for tensor in given))
        assert {tensor.dtype for tensor in fused.values()} == {dtype}
        assert_as_accurate(fused, plain, exact, dtype)


def _projected(project: Callable, h: Tensor, weight: Tensor, bias: Tensor, incoming: Tensor) -> dict[str, Tensor]:
    inputs = [tensor.requires_grad_() for tensor in (h.clone(), weight.clone(), bias.clone())]
    q = project(*inputs)
    return {"q": q.detach()} | dict(zip(("dh", "dweight", "dbias"), torch.autograd.grad(q, inputs, incoming), strict=True))


def test_project_with_float32_weights_under_a_half_stream(device: torch.device, backend: str) -> None:
    aligner = _aligner(backend, device)
    for dtype in dtypes_of(backend, device):
        h = _frames(device, dtype).requires_grad_()
        q = aligner.project(h)
        assert q.dtype == dtype and q.shape == (2, 5, OUT)
        q.sum().backward()
        assert h.grad is not None and h.grad.dtype == dtype
        assert {parameter.grad.dtype for parameter in aligner.prompt_proj.parameters()} == {torch.float32}
        aligner.zero_grad()


@pytest.mark.parametrize("wanted", [(), ("h",), ("weight",), ("bias",), ("h", "bias")])
def test_project_computes_what_is_wanted(wanted: tuple[str, ...]) -> None:
    tensors = {"h": torch.randn(4, WIDTH), "weight": torch.randn(OUT, WIDTH), "bias": torch.randn(OUT)}
    for name in wanted:
        tensors[name].requires_grad_()
    q = SF.project(*tensors.values())
    assert q.requires_grad == bool(wanted)
    if wanted:
        q.sum().backward()
    assert {name for name, tensor in tensors.items() if tensor.grad is not None} == set(wanted)


# --- record_gates -----------------------------------------------------------------------------------------------------------------------


def test_record_gates(backend: str, device: torch.device) -> None:
    aligner, h = _aligner(backend, device), _frames(device)
    aligner(h, 0)
    with aligner.record_gates() as gates:
        assert gates == {}
        _, first = aligner(h, 0, return_gates=True)
        aligner(h, 2)
        assert set(gates) == {0, 2} and gates[0] is first
        assert gates[2].shape == (2, 5, EXPERTS)
        _, again = aligner(h + 1, 0, return_gates=True)
        assert gates[0] is again, "a layer's latest pass stays"
    aligner(h, 1)
    assert set(gates) == {0, 2}, "recording ended with the block"
    sum(gate.square().sum() for gate in gates.values()).backward()  # type: ignore[union-attr]
    assert aligner.router.weight.grad is not None
    rows = aligner.router.weight.grad.view(LAYERS, EXPERTS, WIDTH).abs().sum((1, 2))
    assert rows[0] > 0 and rows[1] == 0 and rows[2] > 0


def test_nested_records(backend: str, device: torch.device) -> None:
    aligner, h = _aligner(backend, device), _frames(device)
    with aligner.record_gates() as outer:
        aligner(h, 0)
        with aligner.record_gates() as inner:
            aligner(h, 1)
        aligner(h, 2)
    assert set(outer) == {0, 1, 2} and set(inner) == {1}
    assert inner[1] is outer[1]


def test_a_record_that_ends_in_an_error(backend: str, device: torch.device) -> None:
    aligner, h = _aligner(backend, device), _frames(device)
    with pytest.raises(ZeroDivisionError), aligner.record_gates() as gates:
        aligner(h, 0)
        raise ZeroDivisionError
    aligner(h, 1)
    assert set(gates) == {0}


# --- copies and conversions -------------------------------------------------------------------------------------------------------------


def _through_pickle(aligner: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(aligner))


def _through_a_file(aligner: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(aligner, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _through_pickle, _through_a_file])
def test_copies(backend: str, device: torch.device, duplicate: object) -> None:
    aligner, h = _aligner(backend, device, top_k=2, renormalize=False), _frames(device)
    with aligner.record_gates() as gates:
        aligner(h, 0)
        twin = duplicate(aligner)  # type: ignore[operator]
        expected = aligner(h, 1)
        recorded = gates[1]
        assert torch.equal(twin(h, 1), expected)
        assert gates[1] is recorded, "the copy records into the original's block"
    assert (twin.top_k, twin.renormalize, twin.backend) == (2, False, backend)
    with torch.no_grad():
        twin.steering_vectors.zero_()
    assert torch.equal(aligner(h, 1), expected), "the copy shares its parameters"


def test_conversions(backend: str, device: torch.device) -> None:
    for dtype in dtypes_of(backend, device):
        aligner = _aligner(backend, device).to(dtype)
        assert {parameter.dtype for parameter in aligner.parameters()} == {dtype}
        y, gates = aligner(_frames(device, dtype), 1, return_gates=True)
        assert y.dtype == dtype and gates.dtype == torch.promote_types(dtype, torch.float32)
        assert aligner.project(y).dtype == dtype
    half = _aligner(backend, device).half()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    assert {parameter.device.type for parameter in half.to("meta").parameters()} == {"meta"}


def test_device_and_dtype_arguments() -> None:
    aligner = FusedSteerMoE(WIDTH, EXPERTS, output_dim=OUT, device="meta", dtype=torch.bfloat16)
    assert {(parameter.device.type, parameter.dtype) for parameter in aligner.parameters()} == {("meta", torch.bfloat16)}


def test_its_printed_form_says_how_it_was_made() -> None:
    text = repr(FusedSteerMoE(WIDTH, EXPERTS, LAYERS, top_k=2, renormalize=False, backend="reference"))
    for part in ("feature_dim=12", "num_experts=5", "num_layers=3", "top_k=2", "renormalize=False", "backend='reference'"):
        assert part in text
