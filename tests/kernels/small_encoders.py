"""Three small encoders of one width and depth, one for each way of steering, and what tests of all of them do with one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steermoe_kernels import FusedSteerMoE

BINS, POSITIONS, WIDTH, LAYERS = 6, 10, 12, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.linear(self.norm(h))


class Encoder(nn.Module):
    """Takes spectrograms, as the others here do."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(BINS, WIDTH)
        self.layers = nn.ModuleList([Block() for _ in range(LAYERS)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x.mT)
        for layer in self.layers:
            h = layer(h)
        return h


def whisper() -> nn.Module:
    modeling = pytest.importorskip("transformers.models.whisper.modeling_whisper")
    config = modeling.WhisperConfig(
        d_model=WIDTH,
        encoder_layers=LAYERS,
        encoder_attention_heads=2,
        encoder_ffn_dim=16,
        max_source_positions=POSITIONS,
        num_mel_bins=BINS,
    )
    return modeling.WhisperEncoder(config)


def openai_whisper() -> nn.Module:
    return pytest.importorskip("whisper.model").AudioEncoder(BINS, POSITIONS, WIDTH, 2, LAYERS)


def spectrograms() -> Tensor:
    return torch.randn(2, BINS, 2 * POSITIONS, generator=torch.Generator().manual_seed(0))


# An encoder of WIDTH with LAYERS layers, and what it takes.
KINDS = {"whisper": (whisper, spectrograms), "openai-whisper": (openai_whisper, spectrograms), "layered": (Encoder, spectrograms)}


def run(encoder: nn.Module, x: Tensor) -> Tensor:
    output = encoder(x)
    return output if isinstance(output, Tensor) else output.last_hidden_state


def aligner_for(encoder: nn.Module, **options: Any) -> FusedSteerMoE:
    torch.manual_seed(1)
    aligner = FusedSteerMoE.for_encoder(encoder, 4, steering_scale=3.0, **options)
    nn.init.normal_(aligner.steering_vectors)
    return aligner


def snapshot(encoder: nn.Module) -> dict[str, Any]:
    """All there is to an encoder beside its tensors: classes, attributes, hooks, names."""
    return {
        name: (type(module), sorted(module.__dict__), list(module._modules), list(module._forward_hooks), list(module._forward_pre_hooks))
        for name, module in encoder.named_modules()
    } | {"state": list(encoder.state_dict())}


def layers_of(encoder: nn.Module) -> nn.ModuleList:
    return encoder.layers if hasattr(encoder, "layers") else encoder.blocks
