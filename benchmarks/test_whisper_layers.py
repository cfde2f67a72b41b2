"""A stack of Whisper encoder layers: unsteered, steered by the public formula and by the best eager one, steered by `steer_encoder`.

transformers' encoder with random weights, frozen; the training step is forward and backward to the aligner's parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from baselines import eager_steer, public_steer
from kept import kept_for_backward
from machine import DEVICE
from passes import GEOMETRY
from proof import errors, fault
from timing import Preparation, Thunk, Work
from torch import Tensor, nn

from steermoe_kernels import FusedSteerMoE, reference, steer_encoder
from steermoe_kernels.backends import select_backend

transformers = pytest.importorskip("transformers", reason="the Whisper layers are transformers'")

VARIANTS = {
    "forward": ("unsteered", "unsteered_compiled", "public", "eager", "ours"),
    "training step": ("public", "eager", "ours"),
}
_FRAMES, _MELS_IN = 1500, 3000
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


QUICK = Stack("tiny", 1)
if DEVICE.type == "cuda":
    CASES = [QUICK, *(Stack("large-v3", 32, batch, torch.bfloat16) for batch in (1, 16))]
else:  # two layers of the large one tell as much, and thirty-two take minutes
    CASES = [QUICK, Stack("tiny", 4), Stack("large-v3", 2)]


def params() -> list:
    found = []
    for case in CASES:
        for direction, variants in VARIANTS.items():
            for variant in variants:
                quick = case == QUICK and direction == "forward" and variant != "unsteered_compiled"
                name = f"{case}-{direction.replace(' ', '_')}-{variant}"
                found.append(pytest.param(case, direction, variant, id=name, marks=[pytest.mark.quick] * quick))
    return found


@pytest.mark.parametrize("case, direction, variant", params())
def test_whisper_layers(case: Stack, direction: str, variant: str, compare: Callable[..., None]) -> None:
    info = {
        "variant": variant,
        "direction": direction,
        "dtype": str(case.dtype).removeprefix("torch."),
        "model": case.model,
        "N": case.batch * _FRAMES,
        "D": case.width,
        "E": 8,
        "L": case.num_layers,
        "device": DEVICE.type,
    }
    if variant == "ours":
        info["backend"] = select_backend("auto", DEVICE, case.dtype).__name__.rpartition(".")[2]
    compare(f"whisper {case} {direction}", variant, partial(_make, case, direction), info)


def _make(case: Stack, direction: str, variants: list[str]) -> Work:
    stack = _Encoders(case)
    faults = stack.faults([name for name in variants if not name.startswith("unsteered")], direction)
    notes = {}
    if direction == "training step":
        for name in variants:
            kept, with_output = kept_for_backward(partial(stack.run, name), stack.encoders[name].parameters())
            notes[name] = {"kept_bytes": kept, "kept_bytes_with_output": with_output}
    preparations = {name: stack.preparation(name, direction) for name in variants}
    return Work(preparations, faults, notes, queued=False)


class _Encoders:
    """One frozen encoder in several guises, which share its weights and the aligner's values."""

    def __init__(self, case: Stack) -> None:
        self.case = case
        config = transformers.WhisperConfig(
            d_model=case.width,
            encoder_layers=case.num_layers,
            encoder_attention_heads=case.width // 64,
            encoder_ffn_dim=4 * case.width,
            num_mel_bins=128 if case.model == "large-v3" else 80,
        )
        torch.manual_seed(_SEEDS["weights"])
        encoder = transformers.models.whisper.modeling_whisper.WhisperEncoder(config).to(DEVICE, case.dtype).eval()
        encoder.requires_grad_(False)
        torch.manual_seed(_SEEDS["aligner"])
        aligner = FusedSteerMoE.for_encoder(encoder, dtype=case.dtype)
        generator = torch.Generator().manual_seed(_SEEDS["data"])
        self.mel = torch.randn((case.batch, config.num_mel_bins, _MELS_IN), generator=generator).to(DEVICE, case.dtype)
        self.incoming = torch.randn((case.batch, _FRAMES, case.width), generator=generator).to(DEVICE, case.dtype)
        self.plain, self.aligner = encoder, aligner
        self.aligners = {name: copy.deepcopy(aligner) for name in ("public", "eager", "ours")}
        self.encoders = {
            "unsteered": encoder,
            "unsteered_compiled": torch.compile(_twin(encoder)),
            "public": _hook(_twin(encoder), self.aligners["public"], _public),
            "eager": _hook(_twin(encoder), self.aligners["eager"], _eager),
            "ours": steer_encoder(_twin(encoder), self.aligners["ours"]),
        }

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
        aligner = copy.deepcopy(self.aligner).double()
        exact = _hook(copy.deepcopy(self.plain).double(), aligner, _reference)
        truth = _results(exact, aligner, self.mel.double(), self.incoming.double(), direction)

        def found(variant: str) -> dict[str, float]:
            results = _results(self.encoders[variant], self.aligners[variant], self.mel, self.incoming, direction)
            return errors(results, truth)

        usual = found("eager")
        return {variant: fault(found(variant), usual, self.case.dtype) for variant in variants}


def _results(encoder: Any, aligner: FusedSteerMoE, mel: Tensor, incoming: Tensor, direction: str) -> dict[str, Tensor]:
    """The output, and for a training step the large gradients."""
    with torch.set_grad_enabled(direction != "forward"):
        output = encoder(mel).last_hidden_state
    if direction == "forward":
        return {"output": output}
    drouter, dvectors = torch.autograd.grad(output, [aligner.router.weight, aligner.steering_vectors], incoming)
    return {"output": output.detach(), "drouter": drouter, "dvectors": dvectors}


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
