"""Models of tiny backbones, with an aligner that steers visibly, and the chats and clips the tests give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_backbones import noise

from steermoe import SteerMoEForConditionalGeneration, SteerMoEProcessor

GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}


def build(encoder: Path, language_model: Path, *, dtype: torch.dtype = torch.float32, **config: Any) -> tuple[Any, SteerMoEProcessor]:
    """The model, its aligner drawn large, and the processor."""
    config = {"num_experts": 4, "pool_size": 4, "steering_scale": 1.0, **config}
    model = SteerMoEForConditionalGeneration.from_backbones(encoder, language_model, dtype=dtype, **config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            if parameter.dim() > 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    padding = config.get("audio_padding", "longest")
    return model, SteerMoEProcessor.from_backbones(encoder, language_model, pool_size=config["pool_size"], audio_padding=padding)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# Chats with one clip, none, two, and one in an earlier turn; and the clips of each.
MIXED = [
    user("<|audio|>What is said?"),
    user("No audio here, only a rather long text that makes the others' padding longer."),
    user("<|audio|>and <|audio|> differ"),
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hear <|audio|>"},
        {"role": "assistant", "content": "I did."},
        {"role": "user", "content": "Then?"},
    ],
]
CLIPS = [[noise(0.53, 1)], [], [noise(1.7, 2), noise(0.031, 3)], [noise(1.03, 4)]]
ALL_CLIPS = [clip for clips in CLIPS for clip in clips]
ANSWERS = ["yes", "no, not at all", "they do", ""]
