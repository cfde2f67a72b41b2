"""Fingerprints: SHA-256 of a module's weights, tensor by tensor, and its settings, by which a backbone is known again to the bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

__all__ = ["Fingerprint", "backbone_weights"]

_THREADS = 4
# Under this name `steer_encoder` registers the aligner in the encoder.
_STEERING = "steering."

# Settings of a config that say nothing of what a frozen module computes: of files, of outputs, of training. Ties show in the tensors.
_ASIDE = {"architectures", "attn_implementation", "auto_map", "dtype", "torch_dtype", "tie_word_embeddings", "tokenizer_class"}
_ASIDE |= {"id2label", "label2id", "problem_type", "return_dict", "task_specific_params"}
_ASIDE |= {"apply_spec_augment", "gradient_checkpointing", "initializer_factor", "initializer_range", "init_std"}
# Those that generation reads, which versions of the library move from one file to another.
_GENERATION = frozenset(GenerationConfig().to_dict())
# Of a model with a decoder, those that its encoder does not read; the encoder is often kept without, or with another decoder.
_DECODER = frozenset({"vocab_size", "max_target_positions"})
_VERSION = "transformers_version"
_ABSENT = object()


@dataclass(frozen=True)
class Fingerprint:
    """Of each tensor its dtype, shape and SHA-256; ``digest`` is the SHA-256 over all of those, in the order of names.

    ``settings``: those of the module's config that decide what it computes with the tensors, by dotted name, and the version of
    transformers that read them; of a module without a config, its numbers of heads. None in what was saved before settings were recorded.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...], str]]
    settings: Mapping[str, Any] | None = None

    @property
    def digest(self) -> str:
        rows = [[name, dtype, list(shape), digest] for name, (dtype, shape, digest) in sorted(self.tensors.items())]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @classmethod
    def of(cls, module: nn.Module, *, dtypes: Mapping[str, str] | None = None) -> Fingerprint:
        """Of the weights and settings of ``module``, without an aligner it may hold. ``dtypes``: in these dtypes, by name of tensor."""
        wanted = dtypes or {}
        weights = dict(backbone_weights(module))

        def digest(item: tuple[str, Tensor]) -> tuple[str, tuple[int, ...], str]:
            name, tensor = item
            dtype = getattr(torch, wanted.get(name, ""), tensor.dtype)
            return str(dtype).removeprefix("torch."), tuple(tensor.shape), _digest(tensor.detach().to(dtype))

        # Hashing releases the interpreter's lock, and large backbones take seconds.
        with ThreadPoolExecutor(_THREADS) as pool:
            return cls(dict(zip(weights, pool.map(digest, weights.items()), strict=True)), _settings(module))

    def matching(self, module: nn.Module) -> Fingerprint:
        """The fingerprint of ``module`` in the dtypes of this one: equal digests if it holds the same weights, however it stores them."""
        return Fingerprint.of(module, dtypes={name: dtype for name, (dtype, _, _) in self.tensors.items()})

    def differences(self, other: Fingerprint) -> list[str]:
        """What sets the weights of ``other`` apart, a line a tensor: missing, added, of another shape or dtype, or with other values."""
        lines = [f"{name} is missing" for name in self.tensors if name not in other.tensors]
        lines += [f"{name} is not expected" for name in other.tensors if name not in self.tensors]
        for name, (dtype, shape, digest) in self.tensors.items():
            if name in other.tensors:
                their_dtype, their_shape, their_digest = other.tensors[name]
                if shape != their_shape:
                    lines.append(f"{name} has shape {their_shape} instead of {shape}")
                elif dtype != their_dtype:
                    lines.append(f"{name} is {their_dtype} instead of {dtype}")
                elif digest != their_digest:
                    lines.append(f"{name} has other values")
        return lines

    def changed_settings(self, other: Fingerprint) -> list[str]:
        """What sets the settings of ``other`` apart, a line a setting; nothing where either has none recorded."""
        if self.settings is None or other.settings is None:
            return []
        names = [name for name in {**self.settings, **other.settings} if name != _VERSION]
        if self.settings.get(_VERSION) != other.settings.get(_VERSION):
            # Versions add settings, with defaults that change nothing, and take others away.
            names = [name for name in names if name in self.settings and name in other.settings]
        lines = []
        for name in names:
            mine, theirs = self.settings.get(name, _ABSENT), other.settings.get(name, _ABSENT)
            if mine != theirs:
                now, then = ("not set" if value is _ABSENT else repr(value) for value in (theirs, mine))
                lines.append(f"setting {name} is {now} instead of {then}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        tensors = {name: {"dtype": dtype, "shape": list(shape), "sha256": digest} for name, (dtype, shape, digest) in self.tensors.items()}
        return {"tensors": tensors, "settings": None if self.settings is None else dict(self.settings)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Fingerprint:
        """From `to_dict`, or from the tensors alone, as fingerprints were saved before settings were recorded."""
        complete = saved.keys() == {"tensors", "settings"}
        tensors, settings = (saved["tensors"], saved["settings"]) if complete else (saved, None)
        if not isinstance(settings, Mapping | None):
            raise TypeError(f"settings must be a mapping, got {type(settings).__name__}")
        return cls({name: (entry["dtype"], tuple(entry["shape"]), entry["sha256"]) for name, entry in tensors.items()}, settings)


def backbone_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every weight in the state dict of ``module``, without those of an aligner in it."""
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor) and not name.startswith(_STEERING):
            yield name, value


def _settings(module: nn.Module) -> dict[str, Any]:
    """By dotted name, as JSON gives them back."""
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "to_dict"):
        # An openai-whisper encoder has no config, and of its dimensions the heads alone leave no trace in the shapes of tensors.
        heads = {f"{name}.n_head": getattr(part, "n_head", None) for name, part in module.named_modules()}
        return {name: count for name, count in heads.items() if isinstance(count, int)}
    settings = json.loads(json.dumps(config.to_dict(), default=str))
    if settings.get("is_encoder_decoder") and not hasattr(module, "decoder"):
        settings = {name: value for name, value in settings.items() if name not in _DECODER and not name.startswith("decoder_")}
    return {**dict(_flat(settings)), _VERSION: settings.get(_VERSION)}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if name in _ASIDE or name in _GENERATION or name.startswith(("_", "mask_")) or "drop" in name:
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _digest(tensor: Tensor) -> str:
    data = tensor.to("cpu").contiguous().reshape(-1)
    return hashlib.sha256(data.view(torch.uint8).numpy().data if data.numel() else b"").hexdigest()
