"""Which experts are chosen and with what weight; and that a bad frame harms no other."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_as_accurate
from problems import Problem, call, draw, dtypes_of
from torch import Tensor

from steermoe_kernels import functional as SF
from steermoe_kernels import reference


def _gates(logits: Tensor, backend: str, **settings: object) -> Tensor:
    """Gates for exactly these logits (N, E): frames that are the logits, and a router that is the identity."""
    num_experts = logits.shape[-1]
    eye = torch.eye(num_experts, dtype=logits.dtype, device=logits.device)
    _, gates = SF.steer(logits, eye, None, torch.zeros_like(eye), 0.0, backend=backend, **settings)  # type: ignore[arg-type]
    return gates


def _logits(num_experts: int, ties: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(num_experts)
    frames = 4 if num_experts > 64 else 12
    if ties:  # few values, so that most are shared; both zeros count as equal
        logits = torch.randint(-2, 3, (frames, num_experts), generator=generator).double()
        logits[1] = 0.0
        logits[2] = -0.0
        logits[2, ::2] = 0.0
        return logits.to(dtype).to(device)
    order = torch.rand((frames, num_experts), generator=generator).argsort(-1)
    return ((order - num_experts / 2) * (8.0 / num_experts)).to(dtype).to(device)


@pytest.mark.parametrize("ties", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("num_experts", [1, 2, 7, 8, 16, 64, 256])
def test_the_same_experts_as_the_reference(backend: str, device: torch.device, num_experts: int, ties: bool) -> None:
    for dtype in dtypes_of(backend, device):
        logits = _logits(num_experts, ties, dtype, device)
        for top_k in sorted({1, min(2, num_experts), (num_experts + 1) // 2, max(1, num_experts - 1), num_experts}):
            selected = reference.select_top_k(logits, top_k)
            assert (selected.sum(-1) == top_k).all()
            for renormalize in (True, False):
                gates = _gates(logits, backend, top_k=top_k, renormalize=renormalize)
                assert torch.equal(gates != 0, selected), f"{dtype}, top_k={top_k}, renormalize={renormalize}"
                plain = reference.route(logits.to(gates.dtype), top_k, renormalize)
                exact = reference.route(logits.double(), top_k, renormalize)
                assert_as_accurate({"gates": gates}, {"gates": plain}, {"gates": exact}, gates.dtype)


def test_of_equal_logits_the_lowest_index_wins(backend: str, device: torch.device) -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0], [3.0, -1.0, -1.0, -1.0, 3.0]], device=device)
    gates = _gates(logits, backend, top_k=2)
    assert gates.tolist() == [[0.0, 0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0, 0.5]]


def test_products_too_small_for_their_type_tie_with_zero(backend: str, device: torch.device) -> None:
    """Their sum is a negative zero, where every register's lane has one."""
    for dtype in dtypes_of(backend, device):
        if dtype == torch.float16:  # products of two halves are not too small for the float32 they are summed in
            continue
        smallest = torch.finfo(dtype).tiny
        frames = torch.full((3, 64), -smallest, dtype=dtype, device=device)
        weight = torch.tensor([[smallest], [0.0]], dtype=dtype, device=device).repeat(1, 64)
        _, gates = SF.steer(frames, weight, None, torch.zeros_like(weight), 0.0, top_k=1, backend=backend)
        assert gates.tolist() == [[1.0, 0.0]] * 3, dtype


def test_experts_with_equal_rows_tie(backend: str, device: torch.device) -> None:
    """Equal rows of the router give equal logits to the bit, wherever among the experts they stand."""
    if backend not in ("cpu", "cuda", "triton"):
        pytest.skip("only products by kernels of our own promise this; those of a library do not")
    generator = torch.Generator().manual_seed(0)
    frames, row = torch.randn(12, 33, generator=generator), torch.randn(1, 33, generator=generator)
    for dtype in dtypes_of(backend, device):
        for num_experts in (2, 3, 5, 6, 7, 11):
            weight = row.expand(num_experts, 33).to(device, dtype)
            for top_k in (None, 1):
                _, gates = SF.steer(frames.to(device, dtype), weight, None, torch.zeros_like(weight), 0.0, top_k=top_k, backend=backend)
                expected = torch.ones_like(gates) / num_experts if top_k is None else torch.eye(num_experts).to(gates)[:1].expand_as(gates)
                assert torch.equal(gates, expected), f"{dtype}, {num_experts} experts, top_k={top_k}"


def test_gates_sum_to_one(backend: str, device: torch.device) -> None:
    for dtype in dtypes_of(backend, device):
        for top_k in (None, 1, 2, 15, 16):
            inputs, _ = draw(Problem(frames=9, num_experts=16, top_k=top_k), dtype, device)
            _, gates = SF.steer(*inputs.values(), top_k=top_k, backend=backend)
            assert (gates >= 0).all()
            ones = torch.ones_like(gates[..., 0])
            torch.testing.assert_close(gates.sum(-1), ones, rtol=4 * torch.finfo(gates.dtype).eps, atol=0.0)


def test_large_logits_do_not_overflow(backend: str, device: torch.device) -> None:
    logits = torch.tensor([[30000.0, 29990.0, -30000.0, 0.0]], device=device)
    torch.testing.assert_close(_gates(logits, backend).double(), reference.route(logits.double()), rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(_gates(-logits, backend).double(), reference.route(-logits.double()), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("norm, pool", [("", None), ("layer", None), ("rms", "max")])
def test_all_experts_is_dense_bit_for_bit(backend: str, device: torch.device, renormalize: bool, norm: str, pool: str | None) -> None:
    for dtype in dtypes_of(backend, device):
        problem = Problem(batch=2, frames=5, num_experts=7, norm=norm, pool=pool, pool_size=2 if pool else 1)
        inputs, incoming = draw(problem, dtype, device)
        runs = []
        for top_k in (None, 7):
            outputs = call(SF, problem, inputs, {"top_k": top_k, "renormalize": renormalize, "backend": backend})
            coming = [incoming[name].to(outputs[name].dtype) for name in outputs]
            runs.append([*outputs.values(), *torch.autograd.grad(list(outputs.values()), list(inputs.values()), coming)])
        assert all(torch.equal(dense, every) for dense, every in zip(*runs, strict=True)), dtype


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], ids=hex)
def test_a_nan_of_any_bits_is_passed_on(backend: str, device: torch.device, bits: int) -> None:
    """In enough frames for the CPU's matrix unit, which takes coefficients in parts."""
    for dtype in dtypes_of(backend, device):
        inputs, _ = draw(Problem(frames=192, width=64, num_experts=8), dtype, device)
        bias = inputs["bias"].detach().float()
        bias.view(torch.int32)[3] = bits
        y, gates = SF.steer(inputs["x"], inputs["weight"], bias, inputs["vectors"], inputs["scale"], backend=backend)
        assert gates.isnan().all() and y.isnan().all(), dtype


@pytest.mark.parametrize("bad", [float("nan"), -float("nan")], ids=["nan", "-nan"])
@pytest.mark.parametrize("num_experts", [8, 128])
def test_a_nan_counts_as_the_largest(backend: str, device: torch.device, num_experts: int, bad: float) -> None:
    """Left out, it would be steered past in silence. Before it stands an infinity, behind it the frames' own logits."""
    for dtype in dtypes_of(backend, device):
        inputs, _ = draw(Problem(frames=7, num_experts=num_experts), dtype, device)
        bias = inputs["bias"].detach().float()
        bias[1], bias[5] = float("inf"), bad
        for renormalize in (True, False):
            settings = {"top_k": 1, "renormalize": renormalize, "backend": backend}
            y, gates = SF.steer(inputs["x"], inputs["weight"], bias, inputs["vectors"], inputs["scale"], **settings)  # type: ignore[arg-type]
            assert gates[..., 5].isnan().all() and y.isnan().all(), f"{dtype}, renormalize={renormalize}"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "problem",
    [
        Problem(batch=2, frames=7, num_experts=8),
        Problem(batch=2, frames=7, num_experts=8, top_k=2),
        Problem(batch=2, frames=7, num_experts=8, top_k=2, renormalize=False, norm="rms", residual=True),
        Problem(batch=2, frames=7, num_experts=8, norm="layer", residual=True),
        Problem(batch=2, frames=7, num_experts=8, norm="layer", pool="mean", pool_size=3),
        Problem(batch=2, frames=7, num_experts=8, norm="layer", pool="max", pool_size=3, residual=True),
    ],
    ids=str,
)
def test_a_bad_frame_stays_alone(backend: str, device: torch.device, problem: Problem, bad: float) -> None:
    settings = {"top_k": problem.top_k, "renormalize": problem.renormalize, "backend": backend}
    clip, frame = 1, 4
    others = torch.ones(problem.batch, problem.frames, dtype=torch.bool, device=device)
    others[clip, frame] = False
    windows = torch.ones(problem.batch, problem.pooled, dtype=torch.bool, device=device)
    windows[clip, frame // problem.pool_size if problem.pool else frame] = False
    same_window = ~others if not problem.pool else ~windows.repeat_interleave(problem.pool_size, 1)[:, : problem.frames]
    for dtype in dtypes_of(backend, device):
        runs = []
        for value in (None, bad):
            inputs, incoming = draw(problem, dtype, device)
            if value is not None:
                with torch.no_grad():
                    inputs["x"][clip, frame, 5] = value
            outputs = call(SF, problem, inputs, settings)
            coming = [incoming[name].to(outputs[name].dtype) for name in outputs]
            (dx,) = torch.autograd.grad(list(outputs.values()), [inputs["x"]], coming)
            runs.append({name: tensor.detach() for name, tensor in outputs.items()} | {"dx": dx})
        good, harmed = runs
        assert not harmed["y"][clip, frame, 5].isfinite(), "the bad value was swallowed"
        for name in ("y", "gates"):
            assert torch.equal(good[name][others], harmed[name][others]), f"{name}, {dtype}"
        if problem.norm:
            assert torch.equal(good["normed"][windows], harmed["normed"][windows]), f"normed, {dtype}"
            assert harmed["normed"][~windows].isnan().any(), "the bad value was normalised away"
        assert torch.equal(good["dx"][~same_window], harmed["dx"][~same_window]), f"dx, {dtype}"
