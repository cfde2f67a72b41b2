"""How an audio encoder counts: from samples to feature frames, from those to the frames it puts out, and to pooled ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["FrameCounts"]

Count = TypeVar("Count", int, Tensor)

LAYOUTS = ("mel", "waveform", "filterbank")
# Families of transformers that read the waveform through unpadded convolutions, listed in their config, and keep the number of frames
# from there on.
_WAVEFORM = ("wav2vec2", "wav2vec2-conformer", "hubert", "wavlm", "unispeech", "unispeech-sat", "data2vec-audio")


@dataclass(frozen=True)
class FrameCounts:
    """The arithmetic of one encoder.

    ``layout`` says what it reads: "mel" (clips, bins, frames), "waveform" (clips, samples), "filterbank" (clips, frames, bins). The
    convolutions from there to its layers have ``kernels``, ``strides`` and ``paddings``, in order; no paddings are zeros. ``longest`` is
    its longest input in feature frames, None without a limit. ValueError for another layout, and for numbers that fit no convolution.
    """

    layout: str
    kernels: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    paddings: tuple[int, ...] = ()
    longest: int | None = None

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        if not self.paddings:
            object.__setattr__(self, "paddings", (0,) * len(self.kernels))
        for name, least in (("kernels", 1), ("strides", 1), ("paddings", 0)):
            given = getattr(self, name)
            if len(given) != len(self.kernels) or not all(type(number) is int and number >= least for number in given):
                raise ValueError(
                    f"{name} must hold a whole number of at least {least} for each of {len(self.kernels)} kernels, got {given}"
                )

    @classmethod
    def of(cls, source: Any) -> FrameCounts:
        """Of an encoder, its config, or an openai-whisper ``ModelDimensions``. ValueError for one of a family that is not known here.

        An encoder of any other family comes with its counts, ``from_backbones(..., frame_counts=FrameCounts(...))``: transformers' own
        arithmetic (``_get_feat_extract_output_lengths``) does not say what a model reads nor the shortest clip, and for some takes numbers
        only.
        """
        if hasattr(source, "n_audio_ctx"):
            return cls._whisper(source.n_audio_ctx)
        if hasattr(source, "dims"):  # openai-whisper's Whisper
            return cls._whisper(source.dims.n_audio_ctx)
        if hasattr(source, "positional_embedding"):  # and its AudioEncoder
            return cls._whisper(source.positional_embedding.shape[0])
        config = getattr(source, "config", source)
        kind = getattr(config, "model_type", type(config).__name__)
        if kind == "whisper":
            return cls._whisper(config.max_source_positions)
        if getattr(config, "add_adapter", False):
            raise ValueError(
                f"the {kind} encoder has an adapter that shortens what comes out of its layers: load it with add_adapter=False"
            )
        if kind in _WAVEFORM:
            kernels, strides = tuple(config.conv_kernel), tuple(config.conv_stride)
            return cls("waveform", kernels, strides)
        if kind == "wav2vec2-bert":
            return cls("filterbank")
        known = ", ".join(("whisper", *_WAVEFORM, "wav2vec2-bert"))
        raise ValueError(
            f"the number of frames that a {kind} encoder puts out is not known; known are {known}: give frame_counts, a "
            "steermoe.FrameCounts of its layout and its convolutions' kernels, strides and paddings, to from_backbones of model and "
            "processor, or as model.frame_counts in a configuration"
        )

    @classmethod
    def _whisper(cls, positions: int) -> FrameCounts:
        return cls("mel", (3, 3), (1, 2), (1, 1), longest=2 * positions)

    @property
    def time_dim(self) -> int:
        """The dimension of the features that counts frames."""
        return 1 if self.layout == "filterbank" else -1

    @property
    def shortest(self) -> int:
        """The fewest feature frames that give one frame."""
        length = 1
        for kernel, stride, padding in reversed(list(zip(self.kernels, self.strides, self.paddings, strict=True))):
            length = max(1, (length - 1) * stride + kernel - 2 * padding)
        return length

    def frames(self, features: Count) -> Count:
        """The frames that ``features`` feature frames give."""
        for kernel, stride, padding in zip(self.kernels, self.strides, self.paddings, strict=True):
            features = (features + 2 * padding - kernel) // stride + 1
        return features

    def pooled(self, features: Count, pool_size: int) -> Count:
        """The pooled frames that ``features`` feature frames give: as many embeddings of the language model."""
        return (self.frames(features) + pool_size - 1) // pool_size

    def whole_windows(self, features: int, pool_size: int) -> int:
        """``features`` rounded up to whole windows of the convolutions' strides and of the pool, as far as the longest input allows.

        A mel encoder runs clips of several lengths in one batch, and so each ends where a window ends, alone and in the batch.
        """
        if self.layout != "mel":
            return max(features, self.shortest)
        window = pool_size
        for stride in self.strides:
            window *= stride
        rounded = -(-features // window) * window
        return rounded if self.longest is None else min(rounded, self.longest)

    def to_dict(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> FrameCounts:
        """What `to_dict` gave, or a mapping like it. TypeError for a key that is none of the fields, ValueError as above."""
        fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
        return cls(**fields)
