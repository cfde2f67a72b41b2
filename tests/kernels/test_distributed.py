"""Two processes under DistributedDataParallel: the gradients of one process on the whole batch, with nothing left unused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from closeness import assert_as_accurate
from problems import device_for, interpreted
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from steermoe_kernels import FusedSteerMoE, available_backends, reference

WIDTH, EXPERTS, LAYERS, OUT, RANKS = 16, 4, 3, 6, 2

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")


class SteeredEncoder(nn.Module):
    """Frozen layers, each followed by steering, and the projection: every parameter of the aligner takes part."""

    def __init__(self, kind: type, **settings: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.aligner = kind(WIDTH, EXPERTS, LAYERS, top_k=2, renormalize=False, output_dim=OUT, **settings)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)).requires_grad_(False)
        with torch.no_grad():
            self.aligner.steering_vectors.normal_()

    def forward(self, h: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            h = self.aligner(h + torch.tanh(layer(h)), index)
        return self.aligner.project(h)


def _batch(clips: int, frames: int) -> Tensor:
    return torch.randn(clips, frames, WIDTH, generator=torch.Generator().manual_seed(1))


def _gradients(model: nn.Module, h: Tensor, steps: int = 1) -> dict[str, Tensor]:
    for _ in range(steps):
        model.zero_grad()
        model(h).square().mean().backward()
    wrapped = model.module if isinstance(model, DistributedDataParallel) else model
    return {name: parameter.grad for name, parameter in wrapped.aligner.named_parameters()}  # type: ignore[union-attr,misc]


def _frames_of(backend: str) -> int:
    return 3 if interpreted(backend) else 40


def _rank(rank: int, backends: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    for backend in backends:
        device = device_for(backend)
        model = DistributedDataParallel(SteeredEncoder(FusedSteerMoE, backend=backend).to(device))
        mine = _batch(2 * RANKS, _frames_of(backend)).chunk(RANKS)[rank].to(device)
        grads = _gradients(model, mine, steps=2)  # a parameter that went unused would stop the second step
        torch.save({name: grad.cpu() for name, grad in grads.items()}, f"{folder}/{backend}-{rank}.pt")
    dist.barrier()
    os._exit(0)  # torch 2.13 aborts now and then when gloo is torn down after DDP, also without a line of this package


@pytest.fixture(scope="module")
def folder_of_gradients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both ranks have run every backend, and left ``BACKEND-RANK.pt`` here."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, (available_backends(), os.fspath(folder)), nprocs=RANKS)
    return folder


def test_gradients_of_two_ranks_are_those_of_one(backend: str, device: torch.device, folder_of_gradients: Path) -> None:
    first, second = (torch.load(folder_of_gradients / f"{backend}-{rank}.pt") for rank in range(RANKS))
    assert all(torch.equal(first[name], second[name]) for name in first), "the ranks do not agree"

    batch = _batch(2 * RANKS, _frames_of(backend))
    single = _gradients(SteeredEncoder(FusedSteerMoE, backend=backend).to(device), batch.to(device))
    plain = _gradients(SteeredEncoder(reference.SteerMoEAligner), batch)
    exact = _gradients(SteeredEncoder(reference.SteerMoEAligner).double(), batch.double())
    assert_as_accurate(first, plain, exact, torch.float32)
    assert_as_accurate({name: grad.cpu() for name, grad in single.items()}, plain, exact, torch.float32)
