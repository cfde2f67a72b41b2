"""`SteerMoEConfig`: which two backbones, and the aligner between them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from transformers import PretrainedConfig

from .audio_frames import FrameCounts
from .suggestions import did_you_mean, nearest

__all__ = ["AUDIO_TOKEN", "PADDINGS", "POOLS", "SteerMoEConfig", "check_arguments", "check_audio_padding", "given_counts"]

AUDIO_TOKEN = "<|audio|>"
POOLS = ("max", "mean", None)
PADDINGS = ("longest", "max_length")


class SteerMoEConfig(PretrainedConfig):
    """The two frozen backbones by name, and the sizes of the aligner between them.

    ``audio_model`` and ``text_model`` are hub ids or paths, with ``audio_revision`` and ``text_revision`` where they are from a hub;
    ``audio_fingerprint`` and ``text_fingerprint`` are the SHA-256 over their weights (`Fingerprint.digest`). ``num_experts``, ``top_k``,
    ``renormalize``, ``steering_scale`` and ``backend`` are `FusedSteerMoE`'s. The encoder's frames are pooled by ``pool`` ("max", "mean",
    or None with a size of 1) over ``pool_size`` frames. ``audio_token_id`` is the tokenizer's id of ``audio_token``. ``audio_padding``
    "longest" encodes a clip as long as it is, and "max_length" with silence up to the encoder's longest input, as Whisper was trained;
    either way the language model reads the clip's own frames only. ``frame_counts`` (`FrameCounts`, or its ``to_dict()``) is for encoders
    of families that `FrameCounts.of` does not know, None for others. ValueError for values outside these, TypeError for a name that is
    nearly one of these; any other name is transformers' or the user's, and kept.
    """

    model_type = "steermoe"
    keys_to_ignore_at_inference = ["past_key_values", "gates", "frame_mask"]  # noqa: RUF012 - transformers' own declaration

    def __init__(
        self,
        audio_model: str | None = None,
        text_model: str | None = None,
        audio_revision: str | None = None,
        text_revision: str | None = None,
        audio_fingerprint: str | None = None,
        text_fingerprint: str | None = None,
        num_experts: int = 8,
        top_k: int | None = None,
        renormalize: bool = True,
        steering_scale: float = 0.1,
        pool: str | None = "max",
        pool_size: int = 4,
        backend: str = "auto",
        audio_token: str = AUDIO_TOKEN,
        audio_token_id: int | None = None,
        audio_padding: str = "longest",
        frame_counts: FrameCounts | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for name in kwargs:
            # Any other name is kept, so only what can hardly be one is refused.
            if nearest(name, self.field_names(), alike=0.85):
                raise TypeError(f"SteerMoEConfig has no field {name!r}{did_you_mean(name, self.field_names())}")
        named = {"audio_model": audio_model, "text_model": text_model, "audio_revision": audio_revision, "text_revision": text_revision}
        for name, value in named.items():
            if value is not None and not isinstance(value, str | os.PathLike):
                raise ValueError(f"{name} must be a string, got {value!r}")
        _check_number("num_experts", num_experts, whole=True)
        for name, count in (("top_k", top_k), ("audio_token_id", audio_token_id)):
            if count is not None:
                _check_number(name, count, whole=True)
        _check_number("steering_scale", steering_scale)
        if not isinstance(renormalize, bool):
            raise ValueError(f"renormalize must be true or false, got {renormalize!r}")
        if pool not in POOLS:
            raise ValueError(f"pool must be 'max', 'mean' or None, got {pool!r}")
        if not isinstance(pool_size, int) or pool_size < 1:
            raise ValueError(f"pool_size must be a whole number of at least 1, got {pool_size!r}")
        if pool is None and pool_size != 1:
            raise ValueError(f"pool None pools nothing, and pool_size must be 1 then, got {pool_size}")
        check_audio_padding(audio_padding)
        for name in ("dtype", "torch_dtype"):
            if (dtype := kwargs.get(name)) is not None:
                _check_dtype(name, dtype)
        self.audio_model = audio_model
        self.text_model = text_model
        self.audio_revision = audio_revision
        self.text_revision = text_revision
        self.audio_fingerprint = audio_fingerprint
        self.text_fingerprint = text_fingerprint
        self.num_experts = num_experts
        self.top_k = top_k
        self.renormalize = renormalize
        self.steering_scale = steering_scale
        self.pool = pool
        self.pool_size = pool_size
        self.backend = backend
        self.audio_token = audio_token
        self.audio_token_id = audio_token_id
        self.audio_padding = audio_padding
        self.frame_counts = None if frame_counts is None else given_counts(frame_counts).to_dict()
        super().__init__(**kwargs)

    @classmethod
    def field_names(cls) -> list[str]:
        """The fields that are this config's own."""
        return [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "kwargs")]


def check_arguments(function: str, given: Iterable[str], known: Collection[str]) -> None:
    """TypeError, naming the first of ``given`` that is not ``known`` and the nearest that is, as Python itself would."""
    for name in given:
        if name not in known:
            raise TypeError(f"{function} has no argument {name!r}{did_you_mean(name, known)}")


def _check_number(name: str, value: Any, *, whole: bool = False) -> None:
    """ValueError for a field of a saved config, or an argument, that is no number: what reads it would not name it."""
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise ValueError(f"{name} must be a {'whole ' if whole else ''}number, got {value!r}")


def _check_dtype(name: str, value: Any) -> None:
    """ValueError for what is neither a dtype nor the name of one: transformers looks it up in torch, and says no more."""
    if not isinstance(getattr(torch, value, None) if isinstance(value, str) else value, torch.dtype):
        raise ValueError(f"{name} must be the name of a torch.dtype, as 'float32', got {value!r}")


def given_counts(frame_counts: FrameCounts | Mapping[str, Any]) -> FrameCounts:
    """``frame_counts`` as `FrameCounts`. ValueError, naming the argument, for a mapping that cannot be one."""
    if isinstance(frame_counts, FrameCounts):
        return frame_counts
    try:
        return FrameCounts.from_dict(frame_counts)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"frame_counts must be FrameCounts, or a mapping of their fields, got {frame_counts!r}: {error}") from None


def check_audio_padding(audio_padding: str) -> None:
    """ValueError for an ``audio_padding`` that does not exist."""
    if audio_padding not in PADDINGS:
        raise ValueError(f"audio_padding must be 'longest' or 'max_length', got {audio_padding!r}")
