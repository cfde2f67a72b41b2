"""Small encoders whose layers sit in one list, of torch, of transformers and of our own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoder_oracle import Results, shake
from torch import Tensor, nn

WIDTH, LAYERS, EXPERTS = 12, 3, 5


class Block(nn.Module):
    """A pre-norm layer; ``shape`` says in what it returns its output."""

    def __init__(self, width: int = WIDTH, shape: Any = None) -> None:
        super().__init__()
        self.norm, self.linear, self.shape = nn.LayerNorm(width), nn.Linear(width, width), shape

    def forward(self, h: Tensor) -> Any:
        y = h + torch.tanh(self.linear(self.norm(h)))
        return y if self.shape is None else self.shape(y)


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.norm = nn.ModuleList(layers), nn.LayerNorm(WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(h)
            h = h if isinstance(h, Tensor) else h["first"] if isinstance(h, dict) else h[0]
        return self.norm(h)


def conformer_config(**changes: Any) -> Any:
    configuration = pytest.importorskip("transformers").Wav2Vec2ConformerConfig
    options: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "conv_dim": (WIDTH,) * 4,
        "conv_kernel": (3,) * 4,
        "conv_stride": (2,) * 4,
        "num_feat_extract_layers": 4,
        "feat_extract_norm": "layer",
        "conv_depthwise_kernel_size": 3,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "conformer_conv_dropout": 0.0,
        "feat_proj_dropout": 0.0,
        "layerdrop": 0.0,
        "mask_time_prob": 0.0,
    }
    return configuration(**options | changes)


def conformer_encoder() -> nn.Module:
    modeling = pytest.importorskip("transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer")
    return modeling.Wav2Vec2ConformerEncoder(conformer_config())


def conformer_model() -> nn.Module:
    return pytest.importorskip("transformers").Wav2Vec2ConformerModel(conformer_config())


def vit_model() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=12,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.ViTModel(config)


def vit_encoder() -> nn.Module:
    """The part of a ViT that holds the layers, as other models embed it."""
    model = vit_model()
    return Stack(*model.layers) if hasattr(model, "layers") else model.encoder


def torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)


def frames(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


ENCODERS = {
    "conformer encoder": (conformer_encoder, lambda e: e.layers, frames(2, 11, WIDTH)),
    "conformer": (conformer_model, lambda e: e.encoder.layers, frames(2, 200)),
    "vit": (vit_model, lambda e: e.layers if hasattr(e, "layers") else e.encoder.layer, frames(2, 3, 12, 12)),
    "vit encoder": (vit_encoder, lambda e: e.layers if hasattr(e, "layers") else e.layer, frames(2, 11, WIDTH)),
    "torch": (torch_encoder, lambda e: e.layers, frames(2, 11, WIDTH)),
    "own": (lambda: Stack(*(Block() for _ in range(LAYERS))), lambda e: e.layers, frames(2, 11, WIDTH)),
}


def made(make: Any) -> nn.Module:
    torch.manual_seed(0)
    return shake(make()).double().eval()


def run(encoder: nn.Module, x: Tensor) -> Results:
    output = encoder(x)
    return {"last": output if isinstance(output, Tensor) else output.last_hidden_state}


def time_first_encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0), LAYERS, enable_nested_tensor=False)
