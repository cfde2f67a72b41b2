"""The router's statistics and losses against values worked out by hand and against plain loops."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from steermoe.router_losses import load_balancing_loss, record_router_logits, router_z_loss, valid_logits
from steermoe.statistics import RouterCounts, RouterStatistics, append_statistics, drop_statistics_after, read_statistics
from steermoe_kernels import FusedSteerMoE

SCALES = torch.tensor([0.1, -0.2])


def gates_of(layers: int = 2, clips: int = 3, frames: int = 5, experts: int = 4) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {layer: torch.randn(clips, frames, experts, generator=generator).softmax(-1) for layer in range(layers)}


def test_statistics_by_hand() -> None:
    gates = torch.tensor([[[1.0, 0.0], [0.5, 0.5], [0.25, 0.75]]])
    counts = RouterCounts()
    counts.add({0: gates}, torch.tensor([[True, True, False]]))
    statistics = counts.statistics(torch.tensor([0.5]))
    assert statistics is not None
    assert statistics.load.tolist() == [[0.75, 0.25]]
    assert statistics.selected.tolist() == [[1.0, 0.0]]
    assert statistics.entropy.tolist() == pytest.approx([0.5])
    assert statistics.frames == 2
    assert statistics.summary() == pytest.approx(
        {"router_entropy": 0.5, "router_max_load": 0.75, "router_min_load": 0.25, "layer_scale_mean": 0.5, "layer_scale_max": 0.5}
    )
    assert statistics.scalars()["router_load/layer_00/expert_1"] == 0.25


def test_passes_add_up_and_padding_counts_nothing() -> None:
    gates = gates_of()
    mask = torch.tensor([[True] * 5, [True, True, False, False, False], [False] * 5])
    valid = {layer: values[mask] for layer, values in gates.items()}
    whole, parts = RouterCounts(), RouterCounts()
    whole.add(gates, mask)
    for layers in (slice(0, 1), slice(1, 3)):
        parts.add({layer: values[layers] for layer, values in gates.items()}, mask[layers])
    first, second = whole.statistics(SCALES), parts.statistics(SCALES)
    assert first is not None and second is not None and first.frames == second.frames == 7
    for layer, values in valid.items():
        assert torch.allclose(first.load[layer], values.double().mean(0), atol=1e-6)
        entropy = -(values * values.log()).sum(-1).mean() / math.log(4)
        assert float(first.entropy[layer]) == pytest.approx(float(entropy), abs=1e-6)
    assert torch.allclose(first.load, second.load, atol=1e-6) and torch.equal(first.selected, second.selected)
    whole.reset()
    assert whole.statistics(SCALES) is None


def test_one_expert_and_sparse_gates() -> None:
    counts = RouterCounts()
    counts.add({0: torch.ones(1, 4, 1)})
    single = counts.statistics(torch.ones(1))
    assert single is not None and single.entropy.tolist() == [0.0] and single.load.tolist() == [[1.0]]
    counts = RouterCounts()
    # Top-2 of the full softmax, not renormalised: two equal shares have an entropy of log 2 of log 4.
    counts.add({0: torch.tensor([[[0.3, 0.3, 0.0, 0.0]]])})
    sparse = counts.statistics(torch.ones(1))
    assert sparse is not None and sparse.entropy.tolist() == pytest.approx([0.5])
    assert sparse.load.tolist()[0] == pytest.approx([0.3, 0.3, 0.0, 0.0])


def test_reduction_over_processes() -> None:
    counts = RouterCounts()
    counts.add(gates_of())
    alone, doubled = counts.statistics(SCALES), counts.statistics(SCALES, lambda value: 2 * value)
    assert alone is not None and doubled is not None
    assert doubled.frames == 2 * alone.frames and torch.equal(doubled.load, alone.load)


def test_wrong_input_is_named() -> None:
    counts = RouterCounts()
    with pytest.raises(ValueError, match="at least one layer"):
        counts.add({})
    with pytest.raises(ValueError, match=r"frame_mask must be \(3, 5\) as the gates are, got \(3, 6\)"):
        counts.add(gates_of(), torch.ones(3, 6, dtype=torch.bool))


def test_files_keep_every_digit_and_lose_what_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "router_statistics.jsonl"
    counts = RouterCounts()
    counts.add(gates_of())
    statistics = counts.statistics(SCALES)
    assert statistics is not None
    for step in (10, 20, 30):
        append_statistics(path, step, statistics)
    entries = read_statistics(path)
    assert [step for step, _ in entries] == [10, 20, 30]
    for name in ("load", "selected", "entropy", "layer_scales"):
        assert torch.equal(getattr(entries[1][1], name), getattr(statistics, name))
    drop_statistics_after(path, 20)
    assert [step for step, _ in read_statistics(path)] == [10, 20]
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 30, "load": [[')
    assert [step for step, _ in read_statistics(path)] == [10, 20]
    drop_statistics_after(tmp_path / "none.jsonl", 20)
    assert isinstance(RouterStatistics.from_dict(statistics.to_dict()), RouterStatistics)


def test_load_balancing_by_hand() -> None:
    even = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    one = torch.tensor([[30.0, 0.0], [30.0, 0.0], [30.0, 0.0]])
    assert float(load_balancing_loss(even)) == pytest.approx(1.0)
    assert float(load_balancing_loss(one)) == pytest.approx(2.0)
    # f = (1/4, 1/2, 1/4) over two selections a frame.
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    share = torch.tensor([0.25, 0.5, 0.25])
    expected = 3 * float((share * logits.softmax(-1).mean(0)).sum())
    assert float(load_balancing_loss(logits, top_k=2)) == pytest.approx(expected)
    assert float(load_balancing_loss(torch.zeros(0, 3))) == 0.0


def test_load_balancing_pulls_towards_even_loads() -> None:
    logits = nn.Parameter(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([2.0, 0.0, 0.0, 0.0]))
    optimizer = torch.optim.SGD([logits], lr=20.0)
    before = load_balancing_loss(logits).item()
    for _ in range(50):
        optimizer.zero_grad()
        load_balancing_loss(logits).backward()
        optimizer.step()
    assert before > 1.3 and load_balancing_loss(logits).item() < 1.1


def test_z_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    assert float(router_z_loss(logits)) == pytest.approx((math.log(2) ** 2 + math.log(math.e + math.e**2) ** 2) / 2)
    assert float(router_z_loss(torch.zeros(0, 2))) == 0.0


@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("frames", [10_000, 7, 1])
def test_recorded_logits_are_the_routers_own(top_k: int | None, frames: int) -> None:
    torch.manual_seed(0)
    aligner = FusedSteerMoE(6, 4, 2, top_k=top_k)
    norm = nn.LayerNorm(6)
    x, residual = torch.randn(3, 5, 6, requires_grad=True), torch.randn(3, 5, 6)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False], [False] * 5])
    with record_router_logits(aligner, frames) as record, aligner.record_gates() as gates:
        y = aligner(x, 0)
        y, _ = aligner.steer_norm(y, 1, norm, residual=residual)
    assert record.keys() == gates.keys() == {0, 1}
    for layer, (sampled,) in record.items():
        chosen = gates[layer].reshape(-1, 4)[:: sampled.stride]
        assert 1 <= len(sampled.logits) <= 2 * frames
        if top_k is None:
            assert torch.allclose(sampled.logits.softmax(-1), chosen, atol=1e-6)
        else:
            assert torch.equal(sampled.logits.topk(top_k).indices.sort(-1).values, chosen.topk(top_k).indices.sort(-1).values)
        assert len(valid_logits([sampled], mask)) == int(mask.reshape(-1)[:: sampled.stride].sum())
        # Clips encoded one length at a time come in several passes, none with padding.
        assert len(valid_logits([sampled, sampled], mask)) == 2 * len(sampled.logits) == 2 * len(valid_logits([sampled], None))
    sum(router_z_loss(sampled.logits) for (sampled,) in record.values()).backward()  # type: ignore[union-attr]
    assert aligner.router.weight.grad is not None and aligner.router.weight.grad.abs().sum() > 0
    assert aligner.steering_vectors.grad is None and x.grad is None
    assert "steer_norm" not in vars(aligner) and not aligner._forward_pre_hooks
