"""Arguments that do not fit get a sentence that names them and says what came, and change nothing. Empty batches are not errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steermoe_kernels import FusedSteerMoE, reference
from steermoe_kernels import functional as SF
from steermoe_kernels.backends import backend_states

WIDTH, EXPERTS = 6, 3
UNAVAILABLE = [name for name, reason in backend_states().items() if reason is not None]


def _arguments(device: torch.device | str = "cpu", shape: tuple[int, ...] = (2, 5, WIDTH)) -> dict[str, Any]:
    """What fits."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": shape,
        "weight": (EXPERTS, WIDTH),
        "bias": (EXPERTS,),
        "vectors": (EXPERTS, WIDTH),
        "scale": (),
        "norm_weight": (WIDTH,),
        "norm_bias": (WIDTH,),
        "residual": shape,
    }
    return {name: torch.randn(size, generator=generator).to(device).requires_grad_() for name, size in shapes.items()}


def _steer_norm(arguments: dict[str, Any], backend: str) -> tuple[Tensor, ...]:
    names = ("x", "weight", "bias", "vectors", "scale", "norm_weight", "norm_bias")
    positional = [arguments[name] for name in names]
    return SF.steer_norm(*positional, **{"backend": backend} | {name: arguments[name] for name in arguments if name not in names})


def _steer(arguments: dict[str, Any], backend: str) -> tuple[Tensor, ...]:
    positional = [arguments[name] for name in ("x", "weight", "bias", "vectors", "scale")]
    options = {name: arguments[name] for name in ("top_k", "renormalize", "backend") if name in arguments}
    return SF.steer(*positional, **{"backend": backend} | options)


def _zeros(*shape: int, **like: Any) -> Tensor:
    return torch.zeros(shape, **like)


# What replaces a fitting argument, the error, and what its message has to say.
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("width of x", {"x": _zeros(2, 5, 7), "residual": None}, ValueError, r"weight .*\(E, 7\).*width 7.*\(3, 6\)"),
    ("width of weight", {"weight": _zeros(EXPERTS, 7)}, ValueError, r"weight .*\(E, 6\).*\(3, 7\)"),
    ("width of vectors", {"vectors": _zeros(EXPERTS, 7)}, ValueError, r"vectors .*\(3, 6\).*\(3, 7\)"),
    ("experts of vectors", {"vectors": _zeros(4, WIDTH)}, ValueError, r"vectors .*\(3, 6\).*\(4, 6\)"),
    ("length of bias", {"bias": _zeros(4)}, ValueError, r"bias .*\(3,\).*\(4,\)"),
    ("length of norm_weight", {"norm_weight": _zeros(7)}, ValueError, r"norm_weight .*\(6,\).*\(7,\)"),
    ("length of norm_bias", {"norm_bias": _zeros(1)}, ValueError, r"norm_bias .*\(6,\).*\(1,\)"),
    ("several scales", {"scale": _zeros(2)}, ValueError, r"scale .*\(\).*\(2,\)"),
    ("no experts", {"weight": _zeros(0, WIDTH)}, ValueError, r"weight .*at least one expert.*\(0, "),
    ("rank of x", {"x": torch.tensor(1.0), "residual": None}, ValueError, r"(x|h) must have the width.*no dimensions"),
    ("rank of weight", {"weight": _zeros(EXPERTS * WIDTH)}, ValueError, r"weight .*\(E, 6\).*\(18,\)"),
    ("rank of all layers' weights", {"weight": _zeros(2, EXPERTS, WIDTH)}, ValueError, r"weight .*\(E, 6\).*\(2, 3, 6\)"),
    ("rank of bias", {"bias": _zeros(1, EXPERTS)}, ValueError, r"bias .*\(3,\).*\(1, 3\)"),
    ("rank of vectors", {"vectors": _zeros(1, EXPERTS, WIDTH)}, ValueError, r"vectors .*\(3, 6\).*\(1, 3, 6\)"),
    ("rank of norm_weight", {"norm_weight": _zeros(1, WIDTH)}, ValueError, r"norm_weight .*\(6,\).*\(1, 6\)"),
    ("rank of x under a pool", {"x": _zeros(5, WIDTH), "residual": None, "pool": "max"}, ValueError, r"x .*batch, time.*\(5, 6\)"),
    ("integer x", {"x": _zeros(2, 5, WIDTH, dtype=torch.int64)}, TypeError, r"(x|h) must be float32.*got int64"),
    ("complex x", {"x": _zeros(2, 5, WIDTH, dtype=torch.complex64)}, TypeError, r"(x|h) must be float32.*got complex64"),
    ("integer residual", {"residual": _zeros(2, 5, WIDTH, dtype=torch.int32)}, TypeError, r"residual .*got int32"),
    ("integer weight", {"weight": _zeros(EXPERTS, WIDTH, dtype=torch.int64)}, TypeError, r"weight .*got int64"),
    ("integer bias", {"bias": _zeros(EXPERTS, dtype=torch.int64)}, TypeError, r"bias .*got int64"),
    ("boolean vectors", {"vectors": _zeros(EXPERTS, WIDTH, dtype=torch.bool)}, TypeError, r"vectors .*got bool"),
    ("integer scale", {"scale": torch.tensor(1)}, TypeError, r"scale .*got int64"),
    ("integer norm_weight", {"norm_weight": _zeros(WIDTH, dtype=torch.int64)}, TypeError, r"norm_weight .*got int64"),
    ("integer norm_bias", {"norm_bias": _zeros(WIDTH, dtype=torch.int64)}, TypeError, r"norm_bias .*got int64"),
    ("a list for x", {"x": [[1.0] * WIDTH]}, TypeError, r"(x|h) must be a tensor, got list"),
    ("a list for residual", {"residual": [[1.0] * WIDTH]}, TypeError, r"residual must be a tensor, got list"),
    ("no weight", {"weight": None}, TypeError, r"weight must be a tensor, got NoneType"),
    ("residual of another shape", {"residual": _zeros(5, WIDTH)}, ValueError, r"residual .*\(2, 5, 6\).*\(5, 6\)"),
    ("top_k of zero", {"top_k": 0}, ValueError, r"top_k must be between 1 and num_experts \(3\), got 0"),
    ("negative top_k", {"top_k": -1}, ValueError, r"top_k must be between 1 and num_experts \(3\), got -1"),
    ("top_k above E", {"top_k": 4}, ValueError, r"top_k must be between 1 and num_experts \(3\), got 4"),
    ("fractional top_k", {"top_k": 1.5}, TypeError, r"top_k must be an integer or None, got 1.5"),
    ("boolean top_k", {"top_k": True}, TypeError, r"top_k must be an integer or None, got True"),
    ("unknown pool", {"pool": "median"}, ValueError, r"pool must be None, 'max' or 'mean', got 'median'"),
    ("pool_size of zero", {"pool": "max", "pool_size": 0}, ValueError, r"pool_size must be at least 1, got 0"),
    ("negative pool_size", {"pool": "mean", "pool_size": -2}, ValueError, r"pool_size must be at least 1, got -2"),
    ("fractional pool_size", {"pool": "mean", "pool_size": 2.0}, TypeError, r"pool_size must be an integer, got 2.0"),
    ("endless pool_size", {"pool": "mean", "pool_size": 2**70}, ValueError, r"pool_size must be at most 2147483647, got"),
    ("pool_size without pool", {"pool_size": 4}, ValueError, r"pool None pools nothing, and pool_size must be 1 then, got 4"),
    ("a word for renormalize", {"renormalize": "no"}, TypeError, r"renormalize must be True or False, got 'no'"),
    ("a word for the scale", {"scale": "x"}, TypeError, r"scale must be a tensor of one element or a number, got 'x'"),
    ("no scale", {"scale": None}, TypeError, r"scale must be a tensor of one element or a number, got None"),
    ("eight bits of weight", {"weight": _zeros(EXPERTS, WIDTH).to(torch.float8_e4m3fn)}, TypeError, r"weight .*got float8_e4m3fn"),
    ("negative eps", {"eps": -1e-5}, ValueError, r"eps must be at least 0, got -1e-05"),
    ("a word for eps", {"eps": "small"}, TypeError, r"eps must be a number, got 'small'"),
    ("sparse x", {"x": _zeros(2, 5, WIDTH).to_sparse()}, TypeError, r"(x|h) must be a dense tensor, got a sparse_coo one"),
    ("sparse residual", {"residual": _zeros(2, 5, WIDTH).to_sparse()}, TypeError, r"residual must be a dense tensor, got a sparse_coo one"),
    ("nested x", {"x": torch.nested.nested_tensor([_zeros(5, WIDTH)])}, TypeError, r"(x|h) must be a dense tensor, got a nested one"),
    ("sparse weight", {"weight": _zeros(EXPERTS, WIDTH).to_sparse()}, TypeError, r"weight must be a dense tensor, got a sparse_coo one"),
    (
        "CSR vectors",
        {"vectors": _zeros(EXPERTS, WIDTH).to_sparse_csr()},
        TypeError,
        r"vectors must be a dense .*, got a sparse_csr one",
    ),
    ("sparse bias", {"bias": _zeros(EXPERTS).to_sparse()}, TypeError, r"bias must be a dense tensor, got a sparse_coo one"),
    ("sparse scale", {"scale": torch.tensor(0.1).to_sparse()}, TypeError, r"scale must be a dense tensor, got a sparse_coo one"),
    (
        "nested weight",
        {"weight": torch.nested.nested_tensor([_zeros(WIDTH)])},
        TypeError,
        r"weight must be a dense .*, got a nested one",
    ),
    ("sparse norm_weight", {"norm_weight": _zeros(WIDTH).to_sparse()}, TypeError, r"norm_weight must be a dense tensor, got a sparse_coo"),
    ("no number for the scale", {"scale": float("nan")}, ValueError, r"scale must be a finite number of float32, got nan"),
    ("a scale beyond float32", {"scale": 1e300}, ValueError, r"scale must be a finite number of float32, got 1e\+300"),
    ("an endless scale", {"scale": 10**400}, ValueError, r"scale must be a finite number of float32, got 1000"),
    ("an endless eps", {"eps": float("inf")}, ValueError, r"eps must be a finite number of float64, got inf"),
    ("a list for the backend", {"backend": []}, ValueError, r"unknown backend \[\]: choose one of auto, "),
    ("unknown backend", {"backend": "tpu"}, ValueError, r"unknown backend 'tpu': choose one of auto, .*reference"),
    *[("a backend that cannot run here", {"backend": name}, RuntimeError, f"backend '{name}' is unavailable: ") for name in UNAVAILABLE],
]
STEER_HAS = {"x", "weight", "bias", "vectors", "scale", "top_k", "backend"}
RUNS = [pytest.param(_steer_norm, *case[1:], id=f"{case[0]} in steer_norm") for case in BAD]
RUNS += [pytest.param(_steer, *case[1:], id=f"{case[0]} in steer") for case in BAD if STEER_HAS & case[1].keys() and "pool" not in case[1]]


@pytest.mark.parametrize("run, changes, error, message", RUNS)
def test_operators(backend: str, device: torch.device, run: Any, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    good = _arguments(device)
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in changes.items()}
    _expect(good, lambda: run(good | moved, backend), error, message)


@pytest.mark.parametrize(
    "run, name",
    [(_steer, name) for name in ("x", "weight", "bias", "vectors", "scale")]
    + [(_steer_norm, name) for name in ("x", "weight", "bias", "vectors", "scale", "norm_weight", "norm_bias", "residual")],
)
def test_mixed_devices(backend: str, device: torch.device, run: Any, name: str) -> None:
    good = _arguments(device)
    elsewhere = good | {name: good[name].detach().to("meta")}
    named = "residual|weight" if name == "x" else name
    _expect(good, lambda: run(elsewhere, backend), ValueError, rf"({named}) must be on (the stream's|x's) device .*, got .*")


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("name", ["x", "residual", "weight", "bias", "vectors", "scale", "norm_weight", "norm_bias"])
def test_a_storage_that_has_been_freed(backend: str, device: torch.device, name: str, offset: int) -> None:
    """It begins at address 0, as what is absent does; where a tensor lies further on in it, its address is not even 0."""
    good = _arguments(device)
    tensor = good[name].detach()
    storage = torch.zeros(offset + tensor.numel(), device=device)
    freed = good | {name: storage[offset:].view(tensor.shape)}
    storage.untyped_storage().resize_(0)
    words = "not allocated yet|has been freed" if backend == "reference" else f"{name} has no memory: its storage has been freed"
    _expect(good, lambda: _steer_norm(freed, backend), RuntimeError, words)


@pytest.mark.parametrize("name", ["weight", "vectors", "norm_weight"])
def test_a_storage_freed_before_the_backward(backend: str, device: torch.device, name: str) -> None:
    good = _arguments(device)
    y, normed, _ = _steer_norm(good, backend)
    good[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"not allocated yet|has been freed"):
        (y.sum() + normed.sum()).backward()


def test_numbers_of_numpy(backend: str, device: torch.device) -> None:
    """They are numbers: for the scale, for eps, and where an integer is wanted."""
    good, np = _arguments(device), pytest.importorskip("numpy")
    numbers = {"scale": 0.5, "eps": 0.25, "pool": "max", "pool_size": 2, "top_k": 2}
    kinds = {"scale": np.float32, "eps": np.float32, "pool": str, "pool_size": np.int64, "top_k": np.int8}
    expected = _steer_norm(good | numbers, backend)
    results = _steer_norm(good | {name: kinds[name](value) for name, value in numbers.items()}, backend)
    assert all(map(torch.equal, results, expected))
    assert FusedSteerMoE(WIDTH, steering_scale=np.float32(0.5)).layer_scales.tolist() == [0.5]


def _expect(good: dict[str, Any], call: Any, error: type[Exception], message: str) -> None:
    """The call fails as it should, and afterwards every tensor is what it was."""
    before = {name: tensor.detach().clone() for name, tensor in good.items() if isinstance(tensor, Tensor)}
    with pytest.raises(error, match=message):
        call()
    for name, tensor in before.items():
        assert torch.equal(good[name], tensor) and good[name].grad is None, f"{name} was changed"


# --- modules ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"feature_dim": 0}, ValueError, "feature_dim must be at least 1, got 0"),
        ({"feature_dim": 8.0}, TypeError, r"feature_dim must be an integer, got 8\.0"),
        ({"num_layers": "8"}, TypeError, "num_layers must be an integer, got '8'"),
        ({"renormalize": 1}, TypeError, "renormalize must be True or False, got 1"),
        ({"num_experts": 0}, ValueError, "num_experts must be at least 1, got 0"),
        ({"num_layers": -1}, ValueError, "num_layers must be at least 1, got -1"),
        ({"output_dim": 0}, ValueError, "output_dim must be at least 1, got 0"),
        ({"top_k": 0}, ValueError, r"top_k must be between 1 and num_experts \(8\), got 0"),
        ({"top_k": 9}, ValueError, r"top_k must be between 1 and num_experts \(8\), got 9"),
        ({"steering_scale": "large"}, TypeError, "steering_scale must be a number, got 'large'"),
        ({"steering_scale": 1j}, TypeError, "steering_scale must be a number, got 1j"),
        ({"steering_scale": True}, TypeError, "steering_scale must be a number, got True"),
        ({"steering_scale": torch.tensor(1j)}, TypeError, "steering_scale must be a number, got tensor"),
        ({"steering_scale": torch.ones(3)}, TypeError, "steering_scale must be a number, got tensor"),
        ({"steering_scale": float("nan")}, ValueError, "steering_scale must be a finite number of float32, got nan"),
        ({"steering_scale": 1e39}, ValueError, r"steering_scale must be a finite number of float32, got 1e\+39"),
        ({"steering_scale": 7e4, "dtype": torch.float16}, ValueError, "steering_scale must be a finite number of float16, got 70000"),
        ({"dtype": torch.complex64}, TypeError, r"dtype must be torch\.float32, .*, got torch\.complex64"),
        ({"dtype": torch.int64}, TypeError, r"dtype must be torch\.float32, .*, got torch\.int64"),
        ({"dtype": "float32"}, TypeError, r"dtype must be torch\.float32, .*, got 'float32'"),
        ({"backend": "tpu"}, ValueError, "unknown backend 'tpu'"),
        *[({"backend": name}, RuntimeError, f"backend '{name}' is unavailable: ") for name in UNAVAILABLE],
    ],
    ids=lambda value: " ".join(f"{name}-{argument}" for name, argument in value.items()) if isinstance(value, dict) else None,
)
def test_making_an_aligner(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FusedSteerMoE(**{"feature_dim": WIDTH} | arguments)


def _calls(device: torch.device) -> dict[str, tuple[Any, type[Exception], str]]:
    h = torch.randn(2, 5, WIDTH, device=device)
    norm = nn.LayerNorm(WIDTH, device=device)
    return {
        "layer too large": (lambda a: a(h, 2), IndexError, r"layer must be between 0 and num_layers - 1 \(1\), got 2"),
        "negative layer": (lambda a: a(h, -1), IndexError, r"layer must be between 0 and num_layers - 1 \(1\), got -1"),
        "boolean layer": (lambda a: a(h, True), TypeError, r"layer must be an integer, got True"),
        "layer in steer_norm": (lambda a: a.steer_norm(h, 2, norm), IndexError, r"layer must be .* got 2"),
        "layer's slices": (lambda a: a.layer(2), IndexError, r"layer must be .* got 2"),
        "width": (lambda a: a(h[..., :5]), ValueError, r"h must have .*width \(6\).*\(2, 5, 5\)"),
        "width in steer_norm": (lambda a: a.steer_norm(h[..., :5], 0, norm), ValueError, r"x must have .*width \(6\).*\(2, 5, 5\)"),
        "width in project": (lambda a: a.project(h[..., :5]), ValueError, r"width 6, got \(2, 5, 5\)"),
        "projection's bias": (lambda a: SF.project(h, _zeros(4, 6), _zeros(1)), ValueError, r"projection's bias must have shape \(4,\)"),
        "integer projection": (lambda a: SF.project(h, _zeros(4, 6).long(), None), TypeError, "projection's weight must be .*got int64"),
        "norm without an eps": (lambda a: a.steer_norm(h, 0, nn.Linear(6, 6)), TypeError, "norm must be a LayerNorm .*got Linear"),
        "no norm": (lambda a: a.steer_norm(h, 0, None), TypeError, "norm must be a LayerNorm .*got NoneType"),
        "batch norm": (lambda a: a.steer_norm(h, 0, nn.BatchNorm1d(WIDTH)), TypeError, "norm must be a LayerNorm .*got BatchNorm1d"),
        "group norm": (lambda a: a.steer_norm(h, 0, nn.GroupNorm(2, WIDTH)), TypeError, "norm must be a LayerNorm .*got GroupNorm"),
        "norm over more": (
            lambda a: a.steer_norm(h, 0, nn.LayerNorm((5, WIDTH), elementwise_affine=False)),
            ValueError,
            r"norm must be over the last dimension, \(6,\), got one over \(5, 6\)",
        ),
        "no such layer with parameters": (
            lambda a: a.steer_norm(h, 2, norm, parameters=a.layer(0)),
            IndexError,
            r"layer must be .* got 2",
        ),
        "integers": (lambda a: a(h.long()), TypeError, r"h must be float32.*got int64"),
        "integers in project": (lambda a: a.project(h.long()), TypeError, r"h must be float32.*got int64"),
        "norm of another width": (
            lambda a: a.steer_norm(h, 0, nn.LayerNorm(7, device=device)),
            ValueError,
            r"norm_weight .*\(6,\).*\(7,\)",
        ),
        "unknown pool": (lambda a: a.steer_norm(h, 0, norm, pool="min"), ValueError, r"pool must be .* got 'min'"),
        "pool_size": (lambda a: a.steer_norm(h, 0, norm, pool="max", pool_size=0), ValueError, r"pool_size must be .* got 0"),
        "another device": (lambda a: a(h.to("meta")), ValueError, r"weight must be on the stream's device meta, got"),
        "another device in project": (lambda a: a.project(h.to("meta")), ValueError, r"weight must be on the stream's device meta, got"),
    }


@pytest.mark.parametrize("case", _calls(torch.device("cpu")))
def test_calling_an_aligner(backend: str, device: torch.device, case: str) -> None:
    aligner = FusedSteerMoE(WIDTH, EXPERTS, 2, output_dim=4, backend=backend, device=device)
    call, error, message = _calls(device)[case]
    with aligner.record_gates() as gates:
        _expect(dict(aligner.named_parameters()), lambda: call(aligner), error, message)
    assert not gates


@pytest.mark.parametrize("kind", [FusedSteerMoE, reference.SteerMoEAligner])
def test_projecting_without_a_projection(kind: Any) -> None:
    with pytest.raises(ValueError, match="no projection: give output_dim"):
        kind(WIDTH, EXPERTS).project(torch.randn(2, WIDTH))


# --- empty batches ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, WIDTH), (0, 5, WIDTH), (2, 0, WIDTH), (0, 0, WIDTH)], ids=str)
@pytest.mark.parametrize("top_k, renormalize", [(None, True), (2, True), (2, False)])
def test_empty_batches(backend: str, device: torch.device, shape: tuple[int, ...], top_k: int | None, renormalize: bool) -> None:
    settings = {"top_k": top_k, "renormalize": renormalize}
    given = _arguments(device, shape)
    outputs = _steer(given | settings, backend)
    assert [output.shape for output in outputs] == [shape, (*shape[:-1], EXPERTS)]
    _assert_zero_gradients(given, outputs)

    pools = [(None, 1)] if len(shape) == 2 else [(None, 1), ("max", 2), ("mean", 2)]
    for pool, size in pools:
        given = _arguments(device, shape)
        outputs = _steer_norm(given | settings | {"pool": pool, "pool_size": size}, backend)
        pooled = (shape[0], -(-shape[1] // size), WIDTH) if pool else shape
        assert [output.shape for output in outputs] == [shape, pooled, (*shape[:-1], EXPERTS)]
        _assert_zero_gradients(given, outputs)


def _assert_zero_gradients(given: dict[str, Tensor], outputs: tuple[Tensor, ...]) -> None:
    used = list(given.values())[: 5 if len(outputs) == 2 else None]
    torch.stack([output.sum() for output in outputs]).sum().backward()
    for tensor in used:
        assert tensor.grad is not None and tensor.grad.shape == tensor.shape
        assert (tensor.grad == 0).all()


def test_empty_batches_through_the_aligner(backend: str, device: torch.device) -> None:
    aligner = FusedSteerMoE(WIDTH, EXPERTS, 2, output_dim=4, backend=backend, device=device)
    h = torch.randn(0, 5, WIDTH, device=device, requires_grad=True)
    q = aligner.project(aligner(h, 1))
    assert q.shape == (0, 5, 4)
    q.sum().backward()
    assert h.grad is not None and h.grad.shape == h.shape
    assert all((parameter.grad == 0).all() for parameter in aligner.parameters())


# --- second derivatives -----------------------------------------------------------------------------------------------------------------


def test_second_derivatives_are_refused(backend: str, device: torch.device) -> None:
    message = "differentiable once; use steermoe_kernels.reference for second derivatives"
    given = _arguments(device)
    y, normed, _ = _steer_norm(given, backend)
    (dx,) = torch.autograd.grad((y * normed).sum(), [given["x"]], create_graph=True)
    with pytest.raises(RuntimeError, match=message):
        dx.square().sum().backward()
    assert given["x"].grad is None


def test_second_derivatives_of_the_projection_are_refused() -> None:
    h, weight = (torch.randn(shape, requires_grad=True) for shape in ((2, WIDTH), (4, WIDTH)))
    (dh,) = torch.autograd.grad(SF.project(h, weight, None).square().sum(), [h], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dh.sum().backward()
