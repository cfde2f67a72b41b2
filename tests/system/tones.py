"""Speech that can be heard without training: each word is a tone, and a processor and model that read tones back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from transformers import BatchFeature

WORDS = ("", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "yes", "no")
LOWEST, STEP = 300.0, 100.0
TONE_SECONDS, PAUSE_SECONDS = 0.3, 0.2


def speak(words: str, rate: int = 16000) -> np.ndarray:
    """(time,) float32: a tone and a pause a word, the pause quieter than any tone and not silent."""
    rng = np.random.default_rng(0)
    parts = [np.zeros(0)]
    for word in words.split():
        frequency = LOWEST + STEP * WORDS.index(word)
        parts += [0.4 * np.sin(2 * np.pi * frequency * np.arange(round(TONE_SECONDS * rate)) / rate), np.zeros(round(PAUSE_SECONDS * rate))]
    samples = np.concatenate(parts)
    return (samples + 1e-4 * rng.standard_normal(len(samples))).astype(np.float32)


def record(path: Path, words: str, rate: int = 16000, **options: Any) -> Path:
    """A file of `speak`, its kind by suffix; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, speak(words, rate), rate, **options)
    return path


class ToneProcessor:
    """The processor's interface: clips padded to the longest, one row a chat of [clips, prompt's length]."""

    sampling_rate = 16000
    max_seconds = 5.0

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, messages: Sequence[Any], audio: Sequence[np.ndarray], answers: Sequence[str] | None = None) -> BatchFeature:
        self.calls.append({"messages": messages, "clips": len(audio), "answers": answers})
        places = [chat[0]["content"].count("<|audio|>") for chat in messages]
        assert sum(places) == len(audio)
        assert all(clip.dtype == np.float32 and clip.ndim == 1 for clip in audio)
        assert all(len(clip) <= self.max_seconds * self.sampling_rate for clip in audio)
        lengths = torch.tensor([len(clip) for clip in audio])
        features = torch.zeros(len(audio), int(lengths.max()))
        for row, clip in zip(features, audio, strict=True):
            row[: len(clip)] = torch.from_numpy(clip)
        batch = {"input_ids": torch.tensor(places)[:, None], "input_features": features, "feature_lengths": lengths}
        if answers is not None:
            batch["labels"] = torch.tensor([[len(answer)] for answer in answers])
        return BatchFeature(batch)

    def batch_decode(self, tokens: torch.Tensor, skip_special_tokens: bool = False) -> list[str]:
        assert skip_special_tokens
        return [" ".join(WORDS[token] for token in row.tolist() if token) for row in tokens]


class ToneModel(torch.nn.Module):
    """Hears every tone of its clips; a row of several clips hears them in order."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def generate(
        self, input_ids: torch.Tensor, input_features: torch.Tensor, feature_lengths: torch.Tensor, **generation: Any
    ) -> torch.Tensor:
        assert not self.training and torch.is_inference_mode_enabled()
        assert generation["max_new_tokens"] > 0
        self.batches.append(len(input_ids))
        heard = [_hear(row[:length].numpy()) for row, length in zip(input_features, feature_lengths.tolist(), strict=True)]
        rows, at = [], 0
        for clips in input_ids[:, 0].tolist():
            rows.append([token for tokens in heard[at : at + clips] for token in tokens][: generation["max_new_tokens"]])
            at += clips
        longest = max(1, *(len(row) for row in rows)) if len(rows) > 1 else max(1, len(rows[0]))
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def _hear(samples: np.ndarray, rate: int = 16000) -> list[int]:
    frame = rate // 50
    loud = np.abs(samples[: len(samples) // frame * frame].reshape(-1, frame)).max(axis=1) > 0.05
    edges = np.flatnonzero(np.diff(np.concatenate([[False], loud, [False]]).astype(int)))
    tokens = []
    for begin, end in edges.reshape(-1, 2) * frame:
        spectrum = np.abs(np.fft.rfft(samples[begin:end] * np.hanning(end - begin), 1 << 16))
        tokens.append(round((np.argmax(spectrum) * rate / (1 << 16) - LOWEST) / STEP))
    return tokens
