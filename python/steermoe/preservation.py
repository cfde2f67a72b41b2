"""Proof that steering left both backbones as they were: their weights, the language model's text-only logits, the encoder's output.

Everything is compared bit for bit with the untouched backbones, loaded once more from where they are from; and those with the fingerprints
that the model or checkpoint recorded, settings included, so that a backbone which has changed on the disk shows as well.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steermoe_kernels import unsteer_encoder

from .audio_frames import FrameCounts
from .fingerprint import Fingerprint, backbone_weights
from .loading import Backbone, BackboneError, cast, freeze, load_encoder, load_language_model
from .model import SteerMoEForConditionalGeneration

__all__ = ["Check", "Fingerprint", "Preservation", "verify"]

_SEED = 20251013
# Prompts that are compared: rows and tokens.
_PROMPTS, _TOKENS = 2, 64
_SECONDS_OF_WAVEFORM, _MEL_FRAMES, _FILTERBANK_FRAMES = 1.0, 100, 64
_SHOWN = 5


@dataclass(frozen=True)
class Check:
    """One comparison. ``passed`` is None if it could not be made; ``faults`` name the tensors or settings that differ, or say why."""

    name: str
    passed: bool | None
    detail: str
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preservation:
    """What `verify` found. ``passed`` if nothing differs and nothing was left uncompared."""

    audio_model: str
    text_model: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed is True for check in self.checks)

    @property
    def faults(self) -> list[str]:
        """Everything that differs or could not be compared, a line each."""
        return [fault for check in self.checks for fault in check.faults]

    def report(self) -> str:
        """A line a check, and below it what differs."""
        verdict = "both backbones are untouched" if self.passed else "NOT shown to be untouched"
        lines = [f"audio encoder: {self.audio_model}", f"language model: {self.text_model}"]
        for check in self.checks:
            mark = {True: "same", False: "DIFFERS", None: "not compared"}[check.passed]
            lines.append(f"  {check.name}: {mark} ({check.detail})")
            lines += [f"    {fault}" for fault in check.faults[:_SHOWN]]
            if len(check.faults) > _SHOWN:
                lines.append(f"    and {len(check.faults) - _SHOWN} more")
        return "\n".join([*lines, verdict])

    __str__ = report

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "passed": self.passed}


@torch.no_grad()
def verify(
    model: SteerMoEForConditionalGeneration | str | os.PathLike[str],
    *,
    audio_model: str | os.PathLike[str] | None = None,
    text_model: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
) -> Preservation:
    """Compare the backbones of a model, or of a saved one, with the untouched ones.

    ``audio_model`` and ``text_model`` say where the untouched ones are, if not where the model says; ``device`` is where a saved model is
    loaded. The untouched backbones are loaded one after the other, to the device of the model. A difference is a result, not an error;
    BackboneError and CheckpointError are for what cannot be loaded at all.
    """
    if isinstance(model, (str, os.PathLike)):
        model = SteerMoEForConditionalGeneration.from_pretrained(
            model, audio_model=audio_model, text_model=text_model, device=device, check_backbones=False
        )
    names = {
        "audio": None if (audio := audio_model or model.config.audio_model) is None else os.fspath(audio),
        "text": None if (text := text_model or model.config.text_model) is None else os.fspath(text),
    }
    checks = [*_encoder_checks(model, names["audio"]), *_language_model_checks(model, names["text"])]
    shown = {kind: name or "a module of no known origin" for kind, name in names.items()}
    return Preservation(shown["audio"], shown["text"], tuple(checks))


def _encoder_checks(model: SteerMoEForConditionalGeneration, name: str | None) -> Iterator[Check]:
    encoder = model.encoder
    revision = model.config.audio_revision if name == model.config.audio_model else None
    untouched = _untouched(load_encoder, name, revision, encoder)
    yield from _weight_checks("audio encoder", encoder, model.fingerprints["audio"], untouched)
    if untouched is None:
        return
    unsteered = unsteer_encoder(copy.deepcopy(encoder))
    features = _features(model.frame_counts, encoder).to(model.aligner.steering_vectors.device, model.encoder_dtype)
    ours, theirs = _first(unsteered(features)), _first(untouched.module(features))
    yield _same_output("audio encoder, unsteered: output", ours, theirs, f"features of shape {tuple(features.shape)}")


def _language_model_checks(model: SteerMoEForConditionalGeneration, name: str | None) -> Iterator[Check]:
    language_model = model.language_model
    revision = model.config.text_revision if name == model.config.text_model else None
    untouched = _untouched(load_language_model, name, revision, language_model)
    yield from _weight_checks("language model", language_model, model.fingerprints["text"], untouched)
    if untouched is None:
        return
    generator = torch.Generator().manual_seed(_SEED)
    table: Any = model.get_input_embeddings()
    vocabulary = table.weight.shape[0]
    tokens = torch.randint(vocabulary, (_PROMPTS, _TOKENS), generator=generator)
    tokens[tokens == model.config.audio_token_id] = 0
    if model.config.audio_token_id == 0:
        tokens[tokens == 0] = 1
    tokens = tokens.to(language_model.device)
    mask = torch.ones_like(tokens)
    ours = model(input_ids=tokens, attention_mask=mask).logits
    theirs = untouched.module(input_ids=tokens, attention_mask=mask).logits
    yield _same_output("language model: text-only logits", ours, theirs, f"{_PROMPTS} prompts of {_TOKENS} tokens")


def _untouched(load: Any, name: str | None, revision: str | None, like: Any) -> Backbone | None:
    """The untouched backbone as its files have it; None where they are not known."""
    if name is None:
        return None
    attention = getattr(getattr(like, "config", None), "_attn_implementation", None)
    try:
        backbone: Backbone = load(name, revision=revision, attn_implementation=attention)
    except BackboneError as error:
        raise BackboneError(f"the untouched backbone to compare with cannot be had: {error}") from error
    freeze(backbone.module)
    return backbone


def _weight_checks(what: str, module: nn.Module, recorded: Fingerprint, untouched: Backbone | None) -> Iterator[Check]:
    """Recorded against untouched, and untouched against those in the model; without untouched ones, recorded against the model's.

    Leaves the untouched backbone in the dtype and on the device of the model's.
    """
    trained_for = f"fingerprint {recorded.digest[:12]} over {len(recorded.tensors)} tensors"
    if untouched is None:
        found = recorded.matching(module)
        faults = recorded.differences(found)
        yield Check(f"{what}: weights and recorded fingerprint", not faults, trained_for, tuple(faults))
        yield from _settings_check(what, recorded, found)
        yield Check(f"{what}: output", None, "its files are not known", (f"{what}: it was given as a module of no known origin",))
        return
    found = recorded.matching(untouched.module)
    faults = recorded.differences(found)
    yield Check(f"{what}: files and recorded fingerprint", not faults, trained_for, tuple(faults))
    yield from _settings_check(what, recorded, found)
    ours = dict(_tensors(module))
    first = next(iter(backbone_weights(module)))[1]
    cast(untouched.module, _dtype(ours))
    untouched.module.to(first.device)
    theirs = dict(_tensors(untouched.module))
    stored = dict(backbone_weights(untouched.module))
    # Some encoders compute a table of positions when they run, in the dtype they run in.
    theirs = {name: tensor if name in stored or name not in ours else tensor.to(ours[name].dtype) for name, tensor in theirs.items()}
    faults = [f"{name} is only in the files" for name in theirs.keys() - ours.keys()]
    faults += [f"{name} is only in the model" for name in ours.keys() - theirs.keys()]
    faults += [fault for name in ours if name in theirs and (fault := _difference(name, ours[name], theirs[name]))]
    count = sum(tensor.numel() for tensor in ours.values())
    yield Check(f"{what}: weights", not faults, f"{len(ours)} tensors, {count:,} numbers", tuple(sorted(faults)))


def _settings_check(what: str, recorded: Fingerprint, found: Fingerprint) -> Iterator[Check]:
    """The settings a backbone was trained with against those it has; nothing for a module that has none."""
    name = f"{what}: settings"
    if recorded.settings is None:
        yield Check(name, None, "not recorded", (f"{name} were not recorded: the checkpoint was made by an earlier version",))
    elif recorded.settings or found.settings:
        faults = recorded.changed_settings(found)
        yield Check(name, not faults, f"{len(recorded.settings)} recorded", tuple(faults))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All that a backbone computes with: its weights, and the buffers that are not stored."""
    yield from backbone_weights(module)
    stored = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if name not in stored:
            yield name, buffer


def _dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    """The dtype of most weights."""
    counts: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype])


def _difference(name: str, ours: Tensor, theirs: Tensor) -> str | None:
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return f"{name} is {ours.dtype} {tuple(ours.shape)} in the model, and {theirs.dtype} {tuple(theirs.shape)} in the files"
    wrong = (_bits(ours) != _bits(theirs)).any(-1)
    if not bool(wrong.any()):
        return None
    return f"{name} has {int(wrong.sum()):,} of {ours.numel():,} numbers that differ"


def _bits(tensor: Tensor) -> Tensor:
    """The bytes (numbers, size): equal for equal bits, NaN and signed zeros included."""
    return tensor.detach().contiguous().reshape(-1, 1).view(torch.uint8)


def _same_output(name: str, ours: Tensor, theirs: Tensor, detail: str) -> Check:
    fault = _difference("the output", ours, theirs)
    if fault is None:
        return Check(name, True, detail)
    gap = float((ours.float() - theirs.float()).abs().max()) if ours.shape == theirs.shape else float("nan")
    return Check(name, False, detail, (f"{name}: {fault.removeprefix('the output ')}, by up to {gap:.3g}",))


def _features(counts: FrameCounts, encoder: Any) -> Tensor:
    """One clip of noise in the encoder's own kind of features."""
    generator = torch.Generator().manual_seed(_SEED)
    if counts.layout == "mel":
        bins = encoder.conv1.in_channels if hasattr(encoder, "conv1") else encoder.config.num_mel_bins
        return torch.randn(1, bins, counts.longest or _MEL_FRAMES, generator=generator)
    if counts.layout == "waveform":
        return torch.randn(1, int(16000 * _SECONDS_OF_WAVEFORM), generator=generator)
    return torch.randn(1, _FILTERBANK_FRAMES, encoder.config.feature_projection_input_dim, generator=generator)


def _first(output: Any) -> Tensor:
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first
