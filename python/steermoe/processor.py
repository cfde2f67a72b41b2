"""`SteerMoEProcessor`: chats and audio to what the model takes, and tokens back to text."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from .audio_frames import FrameCounts
from .config import AUDIO_TOKEN, check_audio_padding, given_counts
from .data.audio import LOUDEST_PEAK, wrong_scale
from .data.corpus import lone_surrogate
from .label_loss import IGNORED
from .loading import BackboneError, first_line, load_encoder_config, load_feature_extractor, load_tokenizer, with_audio_token
from .run_checkpoints import CONFIG_NAME, CheckpointError
from .saved_model import PROCESSOR_NAME, check_seal, drop_stale_seal

__all__ = ["SteerMoEProcessor"]

# Encoders without a limit of their own are trained on clips of about this length.
UNLIMITED_SECONDS = 30.0
# Less audio gives no filterbank frame that could be normalised; it is filled up with silence.
SHORTEST_SECONDS = 0.1
# Seconds that a frame of filterbanks covers, and from one to the next; feature extractors stack ``stride`` of them.
FILTERBANK_WINDOW, FILTERBANK_HOP = 0.025, 0.01

# What transformers writes of a processor. Of the vocabularies there is one, as the kind of tokenizer has it.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json")
_EXTRACTOR_NAME = "preprocessor_config.json"
_FILES = (PROCESSOR_NAME, "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", _EXTRACTOR_NAME, *_VOCABULARIES)

Chat = Sequence[Mapping[str, Any]]


class SteerMoEProcessor(ProcessorMixin):
    """A feature extractor and a tokenizer that has ``audio_token`` among its special tokens.

    ``frame_counts`` are the encoder's (`FrameCounts`, or its ``to_dict()``); ``pool_size`` and ``audio_padding`` are the model's. Public
    besides: ``sampling_rate``, ``max_seconds`` (the longest clip), ``audio_token_id``. Made by `from_backbones` or `from_pretrained`.
    """

    def __init__(
        self,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        frame_counts: Any = None,
        pool_size: int = 4,
        audio_padding: str = "longest",
        audio_token: str = AUDIO_TOKEN,
        chat_template: str | None = None,
    ) -> None:
        check_audio_padding(audio_padding)
        if not isinstance(pool_size, int) or pool_size < 1:
            raise ValueError(f"pool_size must be a whole number of at least 1, got {pool_size!r}")
        counts = given_counts(frame_counts)
        if audio_padding == "max_length" and counts.longest is None:
            raise ValueError(f"audio_padding 'max_length' needs an encoder with a longest input, and one of {counts.layout}s has none")
        with_audio_token(tokenizer, audio_token)
        self.frame_counts = counts.to_dict()
        self.pool_size = pool_size
        self.audio_padding = audio_padding
        self.audio_token = audio_token
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @classmethod
    def from_backbones(
        cls,
        audio_model: Any,
        text_model: Any,
        *,
        pool_size: int | None = 4,
        audio_padding: str = "longest",
        audio_token: str = AUDIO_TOKEN,
        audio_revision: str | None = None,
        text_revision: str | None = None,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        frame_counts: FrameCounts | Mapping[str, Any] | None = None,
    ) -> SteerMoEProcessor:
        """The processor for a model of these backbones: hub ids, paths, or modules loaded from there.

        ``feature_extractor`` and ``tokenizer`` stand in for the backbones' own, which modules of no known origin need; ``frame_counts`` for
        those of `FrameCounts.of`, which encoders of families not known there need. BackboneError where a tokenizer or feature extractor
        cannot be had or has no chat template.
        """
        if feature_extractor is None:
            feature_extractor = load_feature_extractor(_origin("audio_model", audio_model, "feature_extractor"), revision=audio_revision)
        if tokenizer is None:
            origin = _origin("text_model", text_model, "tokenizer")
            tokenizer = load_tokenizer(origin, revision=text_revision, audio_token=audio_token)
        return cls(
            feature_extractor,
            tokenizer,
            _frame_counts(audio_model, audio_revision) if frame_counts is None else frame_counts,
            pool_size=pool_size or 1,
            audio_padding=audio_padding,
            audio_token=audio_token,
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> SteerMoEProcessor:
        """The processor that `save_pretrained` left in a folder or hub repository; ``kwargs`` are transformers'.

        CheckpointError, naming the folder or file, if it is not there, cut off or damaged.
        """
        where = os.fspath(pretrained_model_name_or_path)
        if os.path.isdir(where):
            _check_files(Path(where) / (kwargs.get("subfolder") or ""))
        elif os.path.isabs(where) or where.startswith((".", "~")) or where.count("/") > 1:
            raise CheckpointError(f"there is no processor at {where}")
        try:
            processor: SteerMoEProcessor = super().from_pretrained(where, **kwargs)
        except Exception as error:  # each tokenizer and extractor fails in its own way
            raise CheckpointError(f"{where} holds no processor that can be loaded: {first_line(error)}") from error
        return processor

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Write the processor's files into ``save_directory``; the arguments are transformers'."""
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        drop_stale_seal(Path(save_directory), _FILES)
        return saved

    @property
    def counts(self) -> FrameCounts:
        """The arithmetic of the encoder."""
        return FrameCounts.from_dict(self.frame_counts)

    @property
    def sampling_rate(self) -> int:
        """Samples a second that audio must have."""
        return int(self.feature_extractor.sampling_rate)

    @property
    def max_seconds(self) -> float:
        """The longest clip, in seconds."""
        longest = self.counts.longest
        return UNLIMITED_SECONDS if longest is None else float(longest * self.feature_extractor.hop_length / self.sampling_rate)

    @property
    def audio_token_id(self) -> int:
        """The id of ``audio_token``, which need not be in the language model's table: the model replaces it."""
        return int(self.tokenizer.convert_tokens_to_ids(self.audio_token))

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "input_features", "feature_lengths"]

    def __call__(  # type: ignore[override]
        self,
        messages: Chat | Sequence[Chat],
        audio: Any = None,
        answers: str | Sequence[str] | None = None,
        *,
        sampling_rate: int | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """A batch from one chat, or a list of chats, and the clips for their placeholders.

        ``messages``: dicts with "role" and "content", a text in which each ``audio_token`` stands for one clip, or a list of texts,
        {"type": "text", "text": ...} and {"type": "audio"}. ``audio``: the clips of all chats in the order of their placeholders, mono
        float arrays at ``sampling_rate``, or mappings with "array" and "sampling_rate". Where no chat has a placeholder, each gets one
        clip, or a single chat all of them, before the text of its last user turn. ``answers``, one a chat, make a batch to learn from:
        padded on the right, with ``labels`` that are -100 everywhere but on the answer and the end of its turn. Without them each chat
        ends where the model answers, and the padding is on the left.

        Returns ``input_ids``, ``attention_mask`` (B, S); with audio ``input_features``, one row a clip, and ``feature_lengths`` (clips,).
        ValueError for a count of clips or answers that does not fit, for messages or answers that are not these, and for audio that is
        empty, too long, of another rate, not mono, not finite or far over full scale.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}")
        chats = self._chats(messages)
        clips = self._clips(audio, sampling_rate)
        if answers is not None:
            answers = [answers] if isinstance(answers, str) else list(answers)
            if len(answers) != len(chats):
                raise ValueError(f"answers must hold one text a chat, {len(chats)}, got {len(answers)}")
            for index, given in enumerate(answers):
                if not isinstance(given, str):
                    raise ValueError(f"answers[{index}] must be a text, got {given!r}")
        chats = self._with_placeholders(chats, len(clips))
        features, lengths = self._features(clips)
        soft = [int(self.counts.pooled(length, self.pool_size)) for length in lengths]

        rows, labels, at = [], [], 0
        for index, chat in enumerate(chats):
            prompt = self._prompt(chat)
            ids = self._encode(prompt)
            expanded: list[int] = []
            for token in ids:
                if token == self.audio_token_id:
                    expanded += [token] * soft[at]
                    at += 1
                else:
                    expanded.append(token)
            answer = [] if answers is None else self._answer(chat, prompt, answers[index])
            rows.append(expanded + answer)
            labels.append([IGNORED] * len(expanded) + answer)
            self._check_fits(f"chat {index}" if len(chats) > 1 else "the chat", len(rows[-1]))
        if at != len(clips):
            raise ValueError(f"the chat template must keep every {self.audio_token}: of {len(clips)} placeholders it kept {at}")

        left = answers is None
        pad = self.tokenizer.pad_token_id
        if pad is None:
            pad = self.tokenizer.eos_token_id
        batch: dict[str, Any] = {
            "input_ids": _padded(rows, 0 if pad is None else pad, left),
            "attention_mask": _padded([[1] * len(row) for row in rows], 0, left),
        }
        if clips:
            batch["input_features"] = features
            batch["feature_lengths"] = torch.tensor(lengths)
        if answers is not None:
            batch["labels"] = _padded(labels, IGNORED, left)
        return BatchFeature(batch)

    # Chats

    def _chats(self, messages: Chat | Sequence[Chat]) -> list[list[dict[str, str]]]:
        if not messages:
            raise ValueError("messages must hold at least one turn, got none")
        several = [messages] if isinstance(messages[0], Mapping) else messages
        return [[self._turn(turn) for turn in chat] for chat in several]  # type: ignore[union-attr]

    def _turn(self, turn: Any) -> dict[str, str]:
        if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
            raise ValueError(f"messages must be dicts with 'role' and 'content', got {turn!r}")
        content = turn["content"]
        if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
            # The other form in use: a list of parts.
            content = "".join(self._part(part) for part in content)
        if not isinstance(content, str):
            raise ValueError(f"messages' content must be a text or a list of parts, got {content!r}")
        return {**turn, "content": content}

    def _part(self, part: Any) -> str:
        """What stands for one part of a turn in its text."""
        if isinstance(part, str):
            return part
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "audio":
            return self.audio_token
        if kind == "text" and isinstance(part.get("text"), str):
            return str(part["text"])
        shown = f"type {kind!r}" if isinstance(kind, str) and kind != "text" else repr(part)
        raise ValueError(f"messages' parts must be texts, {{'type': 'text', 'text': ...}} or {{'type': 'audio'}}, got {shown}")

    def _with_placeholders(self, chats: list[list[dict[str, str]]], clips: int) -> list[list[dict[str, str]]]:
        counts = [sum(turn["content"].count(self.audio_token) for turn in chat) for chat in chats]
        if sum(counts) == 0 and clips and (len(chats) == 1 or len(chats) == clips):
            share = clips // len(chats)
            return [self._prefixed(chat, self.audio_token * share) for chat in chats]
        if sum(counts) != clips:
            shown = f"{sum(counts)} ({', '.join(map(str, counts))} in the chats)" if len(chats) > 1 else str(sum(counts))
            raise ValueError(f"audio must hold one clip for each {self.audio_token} placeholder, {shown}, got {clips}")
        return chats

    def _prefixed(self, chat: list[dict[str, str]], placeholders: str) -> list[dict[str, str]]:
        users = [index for index, turn in enumerate(chat) if turn["role"] == "user"]
        if not users:
            raise ValueError(f"messages have no user turn that {self.audio_token} could be put into")
        turns = [dict(turn) for turn in chat]
        turns[users[-1]]["content"] = placeholders + turns[users[-1]]["content"]
        return turns

    def _prompt(self, chat: list[dict[str, str]]) -> str:
        return self._render(chat, add_generation_prompt=True)

    def _render(self, chat: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            chat, chat_template=self.chat_template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return str(text)

    def _encode(self, text: str) -> list[int]:
        if fault := lone_surrogate(text):
            raise ValueError(f"messages and answers must be text, and one holds {fault}")
        # The template has written the beginning of the text, where the model has one.
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _answer(self, chat: list[dict[str, str]], prompt: str, answer: str) -> list[int]:
        """The answer's tokens and the end of its turn, as the template writes it."""
        if self.audio_token in answer:
            raise ValueError(f"answers must be text, and one holds {self.audio_token}: {answer!r}")
        whole = self._render([*chat, {"role": "assistant", "content": answer}], add_generation_prompt=False)
        end = self.tokenizer.eos_token_id
        if whole.startswith(prompt):
            ids = self._encode(whole[len(prompt) :])
            special = {id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
            ends = [place for place, token in enumerate(ids) if token in special]
            if ends:
                return ids[: ends[-1] + 1]
        else:
            # Templates that write a finished turn differently from the one they begin, with room to think for instance.
            ids = self._encode(answer)
        return ids if end is None else [*ids, end]

    def _check_fits(self, name: str, tokens: int) -> None:
        limit = self.tokenizer.model_max_length
        if tokens > limit:
            raise ValueError(f"{name} comes to {tokens} tokens with its audio, and the language model takes {limit}")

    # Audio

    def _clips(self, audio: Any, sampling_rate: int | None) -> list[np.ndarray]:
        if audio is None:
            return []
        if isinstance(audio, (np.ndarray, torch.Tensor, Mapping, str, bytes, os.PathLike)):
            audio = [audio]
        if not isinstance(audio, Iterable):
            raise ValueError(f"audio must be a clip or a list of clips, got {audio!r}")
        return [self._clip(index, clip, sampling_rate) for index, clip in enumerate(audio)]

    def _clip(self, index: int, clip: Any, sampling_rate: int | None) -> np.ndarray:
        name = f"audio[{index}]"
        rate = sampling_rate
        if isinstance(clip, Mapping):  # as datasets decode audio
            if "array" not in clip:
                raise ValueError(
                    f"{name} must have an 'array' and a 'sampling_rate', got a mapping with {', '.join(map(repr, clip)) or 'nothing'}"
                )
            rate, clip = clip.get("sampling_rate", rate), clip["array"]
        if rate is not None and rate != self.sampling_rate:
            raise ValueError(f"{name} has {rate} samples a second, and the encoder needs {self.sampling_rate}: resample it")
        if isinstance(clip, torch.Tensor):
            # NumPy has no bfloat16.
            samples = (clip.float() if clip.is_floating_point() else clip).detach().cpu().numpy()
        elif isinstance(clip, (str, bytes, os.PathLike)):
            shown = f"{len(clip)} bytes" if isinstance(clip, bytes) else f"the name {os.fspath(clip)!r}"
            raise ValueError(f"{name} must be an array of samples, got {shown}: decode it, as by steermoe.data.load_audio")
        elif clip is None or isinstance(clip, (bool, int, float, np.generic)):
            raise ValueError(
                f"{name} must be an array of samples, got {clip!r}: give a single clip as an array, or several as a list of arrays"
            )
        else:
            samples = np.asarray(clip)
        if samples.ndim != 1:
            raise ValueError(f"{name} must be mono, an array of one dimension, got shape {samples.shape}")
        if not np.issubdtype(samples.dtype, np.floating):
            raise ValueError(f"{name} must be floating point between -1 and 1, got {samples.dtype}")
        if not samples.size:
            raise ValueError(f"{name} is empty")
        samples = samples.astype(np.float32, copy=False)
        if not np.isfinite(samples).all():
            raise ValueError(f"{name} holds values that are not finite")
        if (peak := float(np.abs(samples).max())) > LOUDEST_PEAK:
            raise ValueError(f"{name} {wrong_scale(peak)}")
        # A resampler may leave a few samples more than asked for.
        if (seconds := samples.size / self.sampling_rate) > self.max_seconds + 0.01:
            raise ValueError(f"{name} is {seconds:.2f} s long, and the encoder takes {self.max_seconds:g} s: split it")
        return samples[: round(self.max_seconds * self.sampling_rate)]

    def _features(self, clips: list[np.ndarray]) -> tuple[torch.Tensor | None, list[int]]:
        """The features of all clips in one tensor, and how many feature frames of each are its own."""
        if not clips:
            return None, []
        make = {"mel": self._mel, "waveform": self._waveform, "filterbank": self._filterbank}[self.counts.layout]
        made = [make(clip) for clip in clips]
        lengths = [length for _, length in made]
        dim = self.counts.time_dim if self.counts.time_dim < 0 else self.counts.time_dim - 1  # of one clip, without the batch's
        longest = max(features.shape[dim] for features, _ in made)
        return torch.stack([_extended(features, longest, dim) for features, _ in made]), lengths

    def _mel(self, clip: np.ndarray) -> tuple[torch.Tensor, int]:
        """Log-mel features (bins, frames) of the clip, with silence up to whole windows, or to the encoder's longest input.

        Each clip by itself: the features' scale depends on the loudest frame, and so must not on other clips.
        """
        hop = self.feature_extractor.hop_length
        length = self.counts.whole_windows(-(-clip.size // hop), self.pool_size)
        filled = length if self.audio_padding == "longest" else self.counts.longest
        samples = np.pad(clip, (0, max(0, filled * hop - clip.size)))
        extracted = self.feature_extractor(
            samples, sampling_rate=self.sampling_rate, padding="longest", truncation=False, return_tensors="pt"
        )
        return extracted["input_features"][0], length

    def _waveform(self, clip: np.ndarray) -> tuple[torch.Tensor, int]:
        extracted = self.feature_extractor(clip, sampling_rate=self.sampling_rate, padding=False, return_tensors="np")
        samples = torch.from_numpy(np.asarray(extracted["input_values"][0], dtype=np.float32))
        length = self.counts.whole_windows(samples.shape[0], self.pool_size)
        return _extended(samples, length, -1), length

    def _filterbank(self, clip: np.ndarray) -> tuple[torch.Tensor, int]:
        samples = np.pad(clip, (0, max(0, round(SHORTEST_SECONDS * self.sampling_rate) - clip.size)))
        extracted = self.feature_extractor(samples, sampling_rate=self.sampling_rate, padding=True, return_tensors="np")
        features = torch.from_numpy(np.asarray(extracted["input_features"][0], dtype=np.float32))
        return features, features.shape[0]

    def audio_tokens(self, seconds: float) -> int:
        """How many tokens of a prompt a clip of so many ``seconds`` takes."""
        samples = math.ceil(seconds * self.sampling_rate)
        if self.counts.layout == "mel":
            features = -(-samples // self.feature_extractor.hop_length)
        elif self.counts.layout == "filterbank":
            window, hop, shortest = (round(time * self.sampling_rate) for time in (FILTERBANK_WINDOW, FILTERBANK_HOP, SHORTEST_SECONDS))
            frames = 1 + (max(samples, shortest) - window) // hop
            features = -(-frames // self.feature_extractor.stride)
        else:
            features = samples
        return int(self.counts.pooled(self.counts.whole_windows(features, self.pool_size), self.pool_size))

    # Text

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """The tokenizer's ``batch_decode``."""
        return list(self.tokenizer.batch_decode(*args, **kwargs))

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """The tokenizer's ``decode``."""
        return str(self.tokenizer.decode(*args, **kwargs))


def _check_files(folder: Path) -> None:
    """CheckpointError for a saved processor of which a file is missing, cut off, or not what the seal beside it says."""
    here = {name for name in (*_FILES, CONFIG_NAME) if (folder / name).is_file()}
    unfinished = f"{folder} holds no processor, or an unfinished one"
    for name in (PROCESSOR_NAME, "tokenizer_config.json"):
        if name not in here:
            raise CheckpointError(f"{unfinished}: it has no {name}")
    # Without this file the library makes some kinds of tokenizer up, with nothing in them.
    if not here.intersection(_VOCABULARIES):
        raise CheckpointError(f"{unfinished}: it has no {_VOCABULARIES[0]}")
    contents: dict[str, Any] = {}
    for name in sorted(here):
        if name.endswith(".json"):
            try:
                contents[name] = json.loads((folder / name).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{folder / name} is cut off or damaged: {error}") from error
    if _EXTRACTOR_NAME not in here and "feature_extractor" not in contents[PROCESSOR_NAME]:
        raise CheckpointError(f"{unfinished}: its {PROCESSOR_NAME} describes no feature extractor")
    check_seal(folder, _FILES)


def _origin(argument: str, model: Any, needed: str) -> str | os.PathLike[str]:
    if isinstance(model, (str, os.PathLike)):
        return model
    name = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    if not name:
        raise BackboneError(f"{argument} is a module of no known origin: give its {needed} along with it")
    return str(name)


def _frame_counts(audio_model: Any, revision: str | None) -> FrameCounts:
    if not isinstance(audio_model, (str, os.PathLike)):
        return FrameCounts.of(audio_model)
    return FrameCounts.of(load_encoder_config(audio_model, revision=revision))


def _padded(rows: list[list[int]], value: int, left: bool) -> torch.Tensor:
    longest = max(len(row) for row in rows)
    filled = ([value] * (longest - len(row)) + row if left else row + [value] * (longest - len(row)) for row in rows)
    return torch.tensor(list(filled), dtype=torch.long)


def _extended(x: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """``x`` with zeros up to ``length`` along ``dim``."""
    missing = length - x.shape[dim]
    if missing <= 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_zeros(shape)], dim)
