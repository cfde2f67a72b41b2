"""A stack of Whisper encoder layers in several guises: unsteered, steered by the public formula, by the best eager one, by `steer_encoder`.

transformers' encoder with random weights, frozen; the training step is forward and backward to the aligner's parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from baselines import eager_steer, public_steer
from machine import DEVICE
from passes import GEOMETRY
from proof import errors, fault
from timing import Preparation, Thunk
from torch import Tensor, nn

from steermoe_kernels import FusedSteerMoE, reference, steer_encoder

__all__ = ["FRAMES", "Encoders", "Stack"]

FRAMES, _MELS_IN = 1500, 3000
_SEEDS = {"weights": 0, "aligner": 1, "data": 2}


@dataclass(frozen=True)
class Stack:
    """``num_layers`` layers of a Whisper size, on ``batch`` clips of 30 s."""

    model: str
    num_layers: int
    batch: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def width(self) -> int:
        return GEOMETRY[self.model][0]

    def __str__(self) -> str:
        return f"{self.model}-{self.num_layers}layers-B{self.batch}-{str(self.dtype).removeprefix('torch.')}"


class Encoders:
    """One frozen encoder in several guises, which share its weights and the aligner's values.

    ``fused``: names of variants that run through `steer_encoder`, each a backend's name, or "ours" for the backend that "auto" takes.
    """

    def __init__(self, case: Stack, fused: Sequence[str] = ("ours",)) -> None:
        import transformers

        self.case = case
        config = transformers.WhisperConfig(
            d_model=case.width,
            encoder_layers=case.num_layers,
            encoder_attention_heads=case.width // 64,
            encoder_ffn_dim=4 * case.width,
            num_mel_bins=128 if case.model == "large-v3" else 80,
        )
        torch.manual_seed(_SEEDS["weights"])
        with DEVICE:  # where a large encoder's weights are drawn in no time
            encoder = transformers.models.whisper.modeling_whisper.WhisperEncoder(config).to(case.dtype).eval()
        encoder.requires_grad_(False)
        torch.manual_seed(_SEEDS["aligner"])
        aligner = FusedSteerMoE.for_encoder(encoder, dtype=case.dtype)
        generator = torch.Generator().manual_seed(_SEEDS["data"])
        self.mel = torch.randn((case.batch, config.num_mel_bins, _MELS_IN), generator=generator).to(DEVICE, case.dtype)
        self.incoming = torch.randn((case.batch, FRAMES, case.width), generator=generator).to(DEVICE, case.dtype)
        self.plain, self.aligner = encoder, aligner
        self._truths: dict[str, dict[str, Tensor]] = {}
        self.aligners = {name: copy.deepcopy(aligner) for name in ("public", "eager", *fused)}
        for name in fused:
            self.aligners[name].backend = "auto" if name == "ours" else name
        self.encoders = {
            "unsteered": encoder,
            "unsteered_compiled": torch.compile(_twin(encoder)),
            "public": _hook(_twin(encoder), self.aligners["public"], _public),
            "eager": _hook(_twin(encoder), self.aligners["eager"], _eager),
        } | {name: steer_encoder(_twin(encoder), self.aligners[name]) for name in fused}

    def run(self, variant: str) -> Tensor:
        return self.encoders[variant](self.mel).last_hidden_state

    def preparation(self, variant: str, direction: str) -> Preparation:
        def forward() -> object:
            with torch.no_grad():
                return self.run(variant)

        def step() -> object:
            return torch.autograd.grad(self.run(variant), list(self.aligners[variant].parameters()), self.incoming)

        thunk: Thunk = forward if direction == "forward" else step
        return lambda: [thunk]

    def faults(self, variants: list[str], direction: str) -> dict[str, str | None]:
        """Per variant, what is more than twice as wrong as with the eager formula, both against float64; None if nothing."""
        if direction not in self._truths:
            self._truths[direction] = self._truth(direction)
        truth = self._truths[direction]

        def found(variant: str) -> dict[str, float]:
            results = _results(self.encoders[variant], self.aligners[variant], self.mel, self.incoming, direction)
            return errors(results, truth)

        usual = found("eager")
        return {variant: fault(found(variant), usual, self.case.dtype) for variant in variants}

    def _truth(self, direction: str) -> dict[str, Tensor]:
        """The reference in float64."""
        aligner = copy.deepcopy(self.aligner).double()
        exact = _hook(copy.deepcopy(self.plain).double(), aligner, _reference)
        return _joined(  # clip by clip: a batch's attention in float64, kept for the backward, is more than a GPU has
            [
                _results(exact, aligner, *clip, direction)
                for clip in zip(self.mel.double().split(1), self.incoming.double().split(1), strict=True)
            ]
        )


def _results(encoder: Any, aligner: FusedSteerMoE, mel: Tensor, incoming: Tensor, direction: str) -> dict[str, Tensor]:
    """The output, and for a training step the large gradients."""
    with torch.set_grad_enabled(direction != "forward"):
        output = encoder(mel).last_hidden_state
    if direction == "forward":
        return {"output": output}
    drouter, dvectors = torch.autograd.grad(output, [aligner.router.weight, aligner.steering_vectors], incoming)
    return {"output": output.detach(), "drouter": drouter, "dvectors": dvectors}


def _joined(clips: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The results of a batch from those of its clips: the outputs side by side, the gradients added up."""
    joined = {name: torch.stack([clip[name] for clip in clips]) for name in clips[0]}
    return {name: results.flatten(0, 1) if name == "output" else results.sum(0) for name, results in joined.items()}


def _twin(encoder: nn.Module) -> nn.Module:
    """Another encoder with the very same weights."""
    return copy.deepcopy(encoder, memo={id(parameter): parameter for parameter in encoder.parameters()})


Formula = Callable[[FusedSteerMoE, int, Tensor], Tensor]


def _hook(encoder: Any, aligner: FusedSteerMoE, formula: Formula) -> Any:
    """Steer after each layer, as one does with an encoder one does not want to change."""
    for index, layer in enumerate(encoder.layers):
        layer.register_forward_hook(lambda module, args, output, index=index: formula(aligner, index, output))
    return encoder


def _public(aligner: FusedSteerMoE, layer: int, h: Tensor) -> Tensor:
    return public_steer(h, aligner.router.weight, aligner.router.bias, aligner.steering_vectors, aligner.layer_scales, layer)


def _eager(aligner: FusedSteerMoE, layer: int, h: Tensor) -> Tensor:
    return eager_steer(h, *aligner.layer(layer))


def _reference(aligner: FusedSteerMoE, layer: int, h: Tensor) -> Tensor:
    return reference.steer(h, *aligner.layer(layer))[0]
