"""Stand-ins for the versions of the public code, and what a comparison of a patched one with a plain one takes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Results = dict[str, Tensor]


class Layer(nn.Module):
    """An encoder's layer; with ``as_tuple`` it answers as older libraries do."""

    def __init__(self, width: int, as_tuple: bool) -> None:
        super().__init__()
        self.linear, self.as_tuple = nn.Linear(width, width), as_tuple

    def forward(self, x: Tensor, *others: Any, **more: Any) -> Any:
        y = x + torch.tanh(self.linear(x))
        return (y, None) if self.as_tuple else y


class SpeechEncoder(nn.Module):
    def __init__(self, width: int, num_layers: int, as_tuple: bool, name: str = "layers") -> None:
        super().__init__()
        self.add_module(name, nn.ModuleList([Layer(width, as_tuple) for _ in range(num_layers)]))
        self.layer_norm = nn.LayerNorm(width)


class Loaded(nn.Module):
    """What loads the speech encoder from a file in the public code, and holds it."""

    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.speech_encoder = SpeechEncoder(*args)


class PublicBase(nn.Module):
    steers_from: int

    def __init__(self, original_encoder: nn.Module, width: int, num_layers: int, num_experts: int) -> None:
        super().__init__()
        self.original_encoder = original_encoder.requires_grad_(False)
        self.num_experts, self.num_layers, self.feature_dim = num_experts, num_layers, width
        self.steering_vectors = nn.Parameter(torch.randn(num_layers, num_experts, width))
        self.layer_scales = nn.Parameter(torch.randn(num_layers))


class SingleRouterWhisper(PublicBase):
    """The published version: one router, a method beside ``forward``, pooling after a layer whose number is given."""

    def __init__(self, width: int, num_layers: int, num_experts: int, pooling_position: int = 32) -> None:
        super().__init__(Loaded(width, num_layers, True), width, num_layers, num_experts)
        self.router = nn.Linear(width, num_experts * num_layers)
        self.pooling_position, self.pooling_layer = pooling_position, nn.MaxPool1d(kernel_size=4)

    def _forward_with_steering(self, mel_features: Tensor, return_gating: bool = False) -> Any:
        x, gating_scores_list = mel_features, []
        for layer_idx, layer in enumerate(self.original_encoder.speech_encoder.layers):
            layer_output = layer(x)[0]
            self.router = self.router.to(self.steering_vectors.device)
            router_output = self.router(layer_output)
            layer_gating_logits = router_output[:, :, layer_idx * self.num_experts : (layer_idx + 1) * self.num_experts]
            gating_scores = F.softmax(layer_gating_logits, dim=-1)
            steering_adjustment = torch.einsum("bte,ef->btf", gating_scores, self.steering_vectors[layer_idx])
            x = layer_output + self.layer_scales[layer_idx] * steering_adjustment
            gating_scores_list.append(gating_scores)
            if layer_idx + 1 == self.pooling_position:
                x = F.pad(x.permute(0, 2, 1), (0, -x.shape[1] % 4))
                x = self.pooling_layer(x).permute(0, 2, 1)
        x = self.original_encoder.speech_encoder.layer_norm(x)
        return (x, gating_scores_list) if return_gating else x

    def tokenize_waveform(self, audio: Tensor, return_gating: bool = False) -> Any:
        return self._forward_with_steering(audio, return_gating)

    def forward(self, mel_spec: Tensor, return_gating: bool = False) -> Any:
        return self._forward_with_steering(mel_spec, return_gating)

    def get_steering_analysis(self, gating_scores_list: list[Tensor]) -> dict[str, Any]:
        averages = [gating_scores.mean(dim=(0, 1)) for gating_scores in gating_scores_list]
        return {"strength": [average.max().item() for average in averages], "scales": self.layer_scales.detach().cpu().numpy().tolist()}


class EarlyWhisper(PublicBase):
    """An early version: the loop in ``forward``, layers that return tensors."""

    def __init__(self, width: int, num_layers: int, num_experts: int) -> None:
        super().__init__(SpeechEncoder(width, num_layers, False), width, num_layers, num_experts)
        self.router = nn.Linear(width, num_experts * num_layers)

    def forward(self, mel_spec: Tensor, return_gating: bool = False) -> Any:
        x, gates_of_layers = mel_spec, []
        for index, layer in enumerate(self.original_encoder.layers):
            h = layer(x)
            logits = self.router(h)[:, :, index * self.num_experts : (index + 1) * self.num_experts]
            gates = F.softmax(logits, dim=-1)
            x = h + self.layer_scales[index] * torch.einsum("bte,ef->btf", gates, self.steering_vectors[index])
            gates_of_layers.append(gates)
        x = self.original_encoder.layer_norm(x)
        return (x, gates_of_layers) if return_gating else x


class MultiRouterWhisper(PublicBase):
    """One router a layer."""

    def __init__(self, width: int, num_layers: int, num_experts: int) -> None:
        super().__init__(SpeechEncoder(width, num_layers, False), width, num_layers, num_experts)
        self.routers = nn.ModuleList([nn.Linear(width, num_experts) for _ in range(num_layers)])

    def forward(self, mel_spec: Tensor, return_gating: bool = False) -> Any:
        x, gates_of_layers = mel_spec, []
        for index, layer in enumerate(self.original_encoder.layers):
            h = layer(x)
            gates = F.softmax(self.routers[index](h), dim=-1)
            x = h + self.layer_scales[index] * torch.einsum("bte,ef->btf", gates, self.steering_vectors[index])
            gates_of_layers.append(gates)
        x = self.original_encoder.layer_norm(x)
        return (x, gates_of_layers) if return_gating else x


class SharedRouterWhisper(PublicBase):
    """One small router for all layers, and a matrix for each."""

    def __init__(self, width: int, num_layers: int, num_experts: int) -> None:
        super().__init__(SpeechEncoder(width, num_layers, False), width, num_layers, num_experts)
        self.shared_router = nn.Linear(width, num_experts)
        self.layer_weights = nn.Parameter(torch.eye(num_experts) + 0.3 * torch.randn(num_layers, num_experts, num_experts))

    def forward(self, mel_spec: Tensor, return_gating: bool = False) -> Any:
        x, gates_of_layers = mel_spec, []
        for index, layer in enumerate(self.original_encoder.layers):
            h = layer(x)
            logits = torch.einsum("bte,ef->btf", self.shared_router(h), self.layer_weights[index])
            gates = F.softmax(logits, dim=-1)
            x = h + self.layer_scales[index] * torch.einsum("bte,ef->btf", gates, self.steering_vectors[index])
            gates_of_layers.append(gates)
        return (x, gates_of_layers) if return_gating else x


class Conformer(PublicBase):
    """Layers in a ``layer_stack``, lengths and a mask in the answer, pooling at the end."""

    def __init__(self, width: int, num_layers: int, num_experts: int) -> None:
        super().__init__(Loaded(width, num_layers, False, "layer_stack"), width, num_layers, num_experts)
        self.router = nn.Linear(width, num_experts * num_layers)
        self.pooling_layer = nn.MaxPool1d(kernel_size=2)

    def _forward_with_steering(self, mel_features: Tensor, input_lengths: list[int], return_full_output: bool = False) -> Any:
        enc_output, gating_scores_list = mel_features, []
        for layer_idx, layer in enumerate(self.original_encoder.speech_encoder.layer_stack):
            layer_output = layer(enc_output, None, slf_attn_mask=None, pad_mask=None)
            router_output = self.router(layer_output)
            start_idx, end_idx = layer_idx * self.num_experts, (layer_idx + 1) * self.num_experts
            gating_scores = F.softmax(router_output[:, :, start_idx:end_idx], dim=-1)
            steering_adjustment = torch.einsum("bte,ef->btf", gating_scores, self.steering_vectors[layer_idx])
            enc_output = layer_output + self.layer_scales[layer_idx] * steering_adjustment
            gating_scores_list.append(gating_scores)
        enc_output = F.pad(enc_output.permute(0, 2, 1), (0, enc_output.shape[1] % 2))
        enc_output = self.pooling_layer(enc_output).permute(0, 2, 1)
        lengths = [length // 2 for length in input_lengths]
        return (enc_output, lengths, None, gating_scores_list) if return_full_output else enc_output

    def forward(self, mel_features: Tensor, return_gating: bool = False) -> Any:
        if not return_gating:
            return self._forward_with_steering(mel_features, [mel_features.shape[1]])
        enc_output, _, _, gates = self._forward_with_steering(mel_features, [mel_features.shape[1]], True)
        return enc_output, gates


class SingleAligner(nn.Module):
    """Steers once, after the encoder, and without a scale."""

    def __init__(self, width: int, num_layers: int, num_experts: int) -> None:
        super().__init__()
        self.steering_vectors = nn.Parameter(torch.randn(num_experts, width))
        self.router = nn.Linear(width, num_experts)

    def forward(self, h_audio: Tensor, return_gating: bool = False) -> Any:
        gating_scores = F.softmax(self.router(h_audio), dim=-1)
        h_aligned = h_audio + torch.einsum("bte,ef->btf", gating_scores, self.steering_vectors)
        return (h_aligned, gating_scores) if return_gating else h_aligned


class LayerWiseAligner(nn.Module):
    """Holds the steering, and is handed the encoder with every call."""

    def __init__(self, width: int, num_layers: int, num_experts: int) -> None:
        super().__init__()
        self.steering_vectors = nn.Parameter(torch.randn(num_layers, num_experts, width))
        self.routers = nn.ModuleList([nn.Linear(width, num_experts) for _ in range(num_layers)])
        self.layer_scales = nn.Parameter(torch.randn(num_layers))

    def forward(self, whisper_encoder: nn.Module, audio_input: Tensor, return_gating: bool = False) -> Any:
        x, gates_of_layers, outputs = audio_input, [], []
        for index, layer in enumerate(whisper_encoder.layers):
            h = layer(x)
            gates = F.softmax(self.routers[index](h), dim=-1)
            x = h + self.layer_scales[index] * torch.einsum("bte,ef->btf", gates, self.steering_vectors[index])
            outputs.append(x)
            gates_of_layers.append(gates)
        return (x, gates_of_layers, outputs) if return_gating else x


class WithAligner(nn.Module):
    def __init__(self, width: int, num_layers: int, num_experts: int) -> None:
        super().__init__()
        self.whisper_encoder = SpeechEncoder(width, num_layers, False)
        self.aligner = LayerWiseAligner(width, num_layers, num_experts)

    def forward(self, x: Tensor, return_gating: bool = False) -> Any:
        return self.aligner(self.whisper_encoder, x, return_gating)[:2] if return_gating else self.aligner(self.whisper_encoder, x)


class Model(nn.Module):
    """The whole model: a steered encoder and the projection of what it returns."""

    def __init__(self, width: int, num_layers: int, num_experts: int) -> None:
        super().__init__()
        self.whisper_encoder = SingleRouterWhisper(width, num_layers, num_experts, pooling_position=num_layers)
        self.prompt_proj = nn.Linear(width, 5)

    def forward(self, x: Tensor, return_gating: bool = False) -> Any:
        if not return_gating:
            return self.prompt_proj(self.whisper_encoder._forward_with_steering(x))
        h, gates = self.whisper_encoder.tokenize_waveform(x, return_gating=True)
        return self.prompt_proj(h), gates


VERSIONS = [SingleRouterWhisper, EarlyWhisper, MultiRouterWhisper, SharedRouterWhisper, Conformer, SingleAligner, WithAligner, Model]
WIDTH, LAYERS, EXPERTS = 12, 3, 4


def build(version: Any, width: int = WIDTH, layers: int = LAYERS, experts: int = EXPERTS) -> nn.Module:
    torch.manual_seed(0)
    return version(width, layers, experts)


def draw(width: int = WIDTH, frames: int = 7, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, frames, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def differentiate(model: nn.Module, x: Tensor) -> Results:
    """Output, gates, and every gradient of a loss that looks at both."""
    x = x.detach().requires_grad_()
    y, gates = model(x, return_gating=True)
    gates = [gates] if isinstance(gates, Tensor) else gates
    assert all(type(g) is Tensor for g in gates)
    loss = (y * torch.linspace(-1, 1, y.shape[-1]).to(y)).sum()
    for g in gates:
        loss = loss + (g * torch.linspace(0, 3, g.shape[-1]).to(g)).square().sum()
    wanted = {"x": x} | {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    found = {f"d {name}": gradient for name, gradient in zip(wanted, gradients, strict=True) if gradient is not None}
    return {"y": y.detach()} | {f"gates {i}": g.detach() for i, g in enumerate(gates)} | found


def assert_same(ours: Results, public: Results, tolerance: float = 1e-10) -> None:
    assert ours.keys() == public.keys(), ours.keys() ^ public.keys()
    for name, value in public.items():
        assert ours[name].dtype == value.dtype, name
        largest = value.abs().max().item() if value.numel() else 0.0
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance * max(1.0, largest))
