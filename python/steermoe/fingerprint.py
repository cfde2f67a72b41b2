"""Fingerprints: SHA-256 of a module's weights, tensor by tensor, by which a backbone is known again to the bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Fingerprint", "backbone_weights"]

_THREADS = 4
# Under this name `steer_encoder` registers the aligner in the encoder.
_STEERING = "steering."


@dataclass(frozen=True)
class Fingerprint:
    """Of each tensor its dtype, shape and SHA-256; ``digest`` is the SHA-256 over all of those, in the order of names."""

    tensors: Mapping[str, tuple[str, tuple[int, ...], str]]

    @property
    def digest(self) -> str:
        rows = [[name, dtype, list(shape), digest] for name, (dtype, shape, digest) in sorted(self.tensors.items())]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @classmethod
    def of(cls, module: nn.Module, *, dtypes: Mapping[str, str] | None = None) -> Fingerprint:
        """Of the weights of ``module``, without an aligner it may hold. ``dtypes``: in these dtypes, by name of tensor."""
        wanted = dtypes or {}
        weights = dict(backbone_weights(module))

        def digest(item: tuple[str, Tensor]) -> tuple[str, tuple[int, ...], str]:
            name, tensor = item
            dtype = getattr(torch, wanted.get(name, ""), tensor.dtype)
            return str(dtype).removeprefix("torch."), tuple(tensor.shape), _digest(tensor.detach().to(dtype))

        # Hashing releases the interpreter's lock, and large backbones take seconds.
        with ThreadPoolExecutor(_THREADS) as pool:
            return cls(dict(zip(weights, pool.map(digest, weights.items()), strict=True)))

    def matching(self, module: nn.Module) -> Fingerprint:
        """The fingerprint of ``module`` in the dtypes of this one: equal if it holds the same weights, however it stores them."""
        return Fingerprint.of(module, dtypes={name: dtype for name, (dtype, _, _) in self.tensors.items()})

    def differences(self, other: Fingerprint) -> list[str]:
        """What sets ``other`` apart, a line a tensor: missing, added, of another shape or dtype, or with other values."""
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

    def to_dict(self) -> dict[str, Any]:
        return {name: {"dtype": dtype, "shape": list(shape), "sha256": digest} for name, (dtype, shape, digest) in self.tensors.items()}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Fingerprint:
        return cls({name: (entry["dtype"], tuple(entry["shape"]), entry["sha256"]) for name, entry in saved.items()})


def backbone_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every weight in the state dict of ``module``, without those of an aligner in it."""
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor) and not name.startswith(_STEERING):
            yield name, value


def _digest(tensor: Tensor) -> str:
    data = tensor.to("cpu").contiguous().reshape(-1)
    return hashlib.sha256(data.view(torch.uint8).numpy().data if data.numel() else b"").hexdigest()
