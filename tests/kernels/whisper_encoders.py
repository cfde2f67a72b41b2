"""transformers' Whisper encoder, small and plain, steered, and steered by the oracle's hooks.

Where transformers is missing, importing this file skips the test file that does.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from encoder_oracle import Results, draw_aligner, fused_aligner, hooked, shake
from torch import Tensor, nn

from steermoe_kernels import steer_encoder

whisper = pytest.importorskip("transformers.models.whisper.modeling_whisper")

BINS, POSITIONS, WIDTH, LAYERS, EXPERTS = 6, 20, 30, 3, 5


def plain_encoder(**changes: Any) -> nn.Module:
    options: dict[str, Any] = {
        "d_model": WIDTH,
        "encoder_layers": LAYERS,
        "encoder_attention_heads": 3,
        "encoder_ffn_dim": 40,
        "max_source_positions": POSITIONS,
        "num_mel_bins": BINS,
    }
    torch.manual_seed(0)
    config = whisper.WhisperConfig(**options | changes)
    return shake(whisper.WhisperEncoder(config)).double().eval()


def draw_input(frames: int = 2 * POSITIONS, seed: int = 3) -> Tensor:
    return torch.randn(2, BINS, frames, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shortened(encoder: nn.Module, frames: int) -> nn.Module:
    """The plain encoder as it would be for inputs of ``frames`` only: what a short input through a steered one must equal."""
    encoder = copy.deepcopy(encoder)
    vars(encoder.config)["max_source_positions"] = frames / 2  # past its check for integers: an odd length ends in half a position
    table = encoder.embed_positions.weight[: (frames + 1) // 2].detach().clone()
    encoder.embed_positions = nn.Embedding.from_pretrained(table, freeze=True)
    return encoder


def pair(encoder: nn.Module, dtype: torch.dtype = torch.float64, *, pool: str | None = None, pool_size: int = 1, **options: Any):
    """A steered copy and the oracle of it, in ``dtype``."""
    backend = options.pop("backend", "auto")
    aligner = draw_aligner(WIDTH, EXPERTS, len(encoder.layers), **options)
    ours = copy.deepcopy(encoder).to(dtype)
    steer_encoder(ours, fused_aligner(aligner, dtype, backend=backend), pool=pool, pool_size=pool_size)
    return ours, hooked(encoder, lambda e: e.layers, aligner, dtype, pool=pool, pool_size=pool_size)


def last(encoder: nn.Module, x: Tensor) -> Results:
    return {"last": encoder(x).last_hidden_state}
