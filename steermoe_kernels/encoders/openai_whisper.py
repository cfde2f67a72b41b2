"""openai-whisper's ``AudioEncoder``: the fused path, for inputs of any length up to the model's maximum."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from .class_swap import swap
from .steering import Steering
from .stream import EncoderPass, Steered, SteeredLayer, all_distinct, begin_pass, fusible_norm, in_rows, place_layers

PRIORITY = 10


def takes(encoder: Any) -> bool:
    """Exactly openai-whisper's encoder, blocks and norms; anything else is steered by hooks instead."""
    model = sys.modules.get("whisper.model")
    if model is None or type(encoder) is not getattr(model, "AudioEncoder", None) or "forward" in encoder.__dict__:
        return False
    blocks = list(encoder.blocks)
    if not all(type(block) is model.ResidualAttentionBlock and "forward" not in block.__dict__ for block in blocks):
        return False
    width = encoder.positional_embedding.shape[1]
    norms = [*(block.attn_ln for block in blocks), encoder.ln_post]
    return (
        all(block.cross_attn is None for block in blocks)
        and all(fusible_norm(norm, model.LayerNorm, width) for norm in norms)
        and all_distinct(blocks, norms)
    )


def layers(encoder: Any) -> list[nn.Module]:
    return list(encoder.blocks)


def steer(encoder: Any, steering: Steering) -> None:
    place_layers(layers(encoder), _norms(encoder), SteeredBlock, steering)
    swap(encoder, SteeredAudioEncoder, _steering=steering)


def _norms(encoder: Any) -> list[Any]:
    """The norms that read the stream after each block."""
    return [*(getattr(block, "attn_ln", None) for block in list(encoder.blocks)[1:]), encoder.ln_post]


class SteeredBlock(SteeredLayer):
    """``ResidualAttentionBlock`` without cross-attention, steered."""

    def forward(
        self,
        x: Tensor,
        xa: Tensor | None = None,
        mask: Tensor | None = None,
        kv_cache: dict | None = None,
        *,
        encoder_pass: EncoderPass | None = None,
    ) -> Tensor:
        residual = in_rows(x)
        residual = residual + self.attn(self.attn_ln(residual), mask=mask, kv_cache=kv_cache)[0]
        return self.steer(self.mlp(self.mlp_ln(residual)), residual, encoder_pass)


class SteeredAudioEncoder(Steered):
    """``AudioEncoder``, steered. The library's forward accepts the full length only; its few lines are here, with positions cut to size."""

    _added: ClassVar[tuple[str, ...]] = ("_steering",)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, mel bins, M), M up to twice the positions. ValueError for any other shape, TypeError for what is no tensor."""
        bins, longest = self.conv1.in_channels, self.positional_embedding.shape[0] * self.conv2.stride[0]
        if not isinstance(x, Tensor):
            raise TypeError(f"the mel spectrogram must be a tensor, got {type(x).__name__}")
        if x.dim() != 3 or x.shape[1] != bins:
            raise ValueError(f"the mel spectrogram must be (batch, {bins}, frames), got {tuple(x.shape)}")
        if not 1 <= x.shape[2] <= longest:
            raise ValueError(f"the mel spectrogram must have between 1 and {longest} frames, got {x.shape[2]}: cut longer audio")
        x = F.gelu(self.conv1(x))
        x = F.gelu(self.conv2(x)).permute(0, 2, 1)
        x = (x + self.positional_embedding[: x.shape[1]]).to(x.dtype)
        encoder_pass = begin_pass(self, self._steering, layers(self), _norms(self))
        for block in self.blocks:
            x = block(x, encoder_pass=encoder_pass)
        return self.ln_post(x)
