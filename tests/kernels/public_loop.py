"""The public loop for tests of patched models, with a body that says what is done after each layer, and the steps it is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from public_versions import EXPERTS, WIDTH
from torch import Tensor, nn

LAYERS = 2


class Keep(nn.Module):
    def forward(self, gates: Tensor) -> Tensor:
        return gates


class Loop(nn.Module):
    """The public loop, with ``body`` for what it does after each layer."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.keep = body, Keep()
        self.steering_vectors = nn.Parameter(torch.randn(LAYERS, EXPERTS, WIDTH))
        self.router = nn.Linear(WIDTH, LAYERS * EXPERTS)
        self.layer_scales = nn.Parameter(torch.tensor([0.7, -0.4]))
        self.register_buffer("slot", None, persistent=False)

    def forward(self, x: Tensor) -> Any:
        gates_of_layers = []
        for layer in range(LAYERS):
            x, gates = self.body(self, torch.tanh(x), layer)
            gates_of_layers.append(gates)
        return x, gates_of_layers


# These are no methods, whose results would be tensors.


def logits_of(m: Any, x: Tensor, layer: int) -> Tensor:
    return m.router(x)[:, :, layer * EXPERTS : (layer + 1) * EXPERTS]


def gates_of(m: Any, x: Tensor, layer: int) -> Tensor:
    return F.softmax(logits_of(m, x, layer), dim=-1)


def delta_of(m: Any, gates: Tensor, layer: int) -> Tensor:
    return torch.einsum("bte,ef->btf", gates, m.steering_vectors[layer])


def steered(m: Any, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    gates = gates_of(m, x, layer)
    return x + m.layer_scales[layer] * delta_of(m, gates, layer), gates
