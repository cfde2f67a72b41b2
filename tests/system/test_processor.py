"""The processor: prompts, placeholders, labels, padding, features of each clip by itself, and audio that cannot be used."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_backbones
import torch
import transformers
from tiny_backbones import noise
from tiny_models import ALL_CLIPS, ANSWERS, MIXED, user

from steermoe import SteerMoEProcessor
from steermoe.loading import BackboneError

AUDIO = "<|audio|>"


@pytest.fixture(scope="module")
def processor(tiny_encoder: Path, tiny_language_model: Path) -> SteerMoEProcessor:
    return SteerMoEProcessor.from_backbones(tiny_encoder, tiny_language_model, pool_size=4)


def text_of(processor: SteerMoEProcessor, ids: torch.Tensor) -> str:
    """What a row says, each run of audio tokens as its number in braces."""
    text = processor.decode(ids[ids != 0])
    return re.sub(rf"(?:{re.escape(AUDIO)})+", lambda run: f"{{{len(run[0]) // len(AUDIO)}}}", text)


def test_what_is_told_of_the_encoder(processor: SteerMoEProcessor) -> None:
    assert processor.sampling_rate == 16000 and processor.max_seconds == 2.0
    assert processor.audio_token_id == processor.tokenizer.convert_tokens_to_ids(AUDIO)
    assert processor.tokenizer.encode(f"a{AUDIO}b", add_special_tokens=False)[1] == processor.audio_token_id


def test_prompts_end_where_the_model_answers_and_are_padded_on_the_left(processor: SteerMoEProcessor) -> None:
    batch = processor(MIXED, ALL_CLIPS)
    assert "labels" not in batch and batch["attention_mask"][:, -1].all()
    assert all((row.diff() >= 0).all() for row in batch["attention_mask"])
    texts = [text_of(processor, ids[mask == 1]) for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    # 0.53 s are 53 feature frames, in whole windows 56, which are 28 frames or 7 pooled.
    assert texts[0] == "<|im_start|>user\n{7}What is said?<|im_end|>\n<|im_start|>assistant\n"
    assert texts[2] == "<|im_start|>user\n{22}and {1} differ<|im_end|>\n<|im_start|>assistant\n"
    assert texts[3].startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHear {13}<|im_end|>\n<|im_start|>assistant\nI did."
    )
    assert batch["feature_lengths"].tolist() == [56, 176, 8, 104] and batch["input_features"].shape == (4, 16, 176)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == processor.tokenizer.pad_token_id).all()


def test_answers_are_labels_and_end_their_turn(processor: SteerMoEProcessor) -> None:
    batch = processor(MIXED, ALL_CLIPS, answers=ANSWERS)
    prompts = processor(MIXED, ALL_CLIPS)
    assert batch["attention_mask"][:, 0].all()
    assert all((row.diff() <= 0).all() for row in batch["attention_mask"])
    for index, answer in enumerate(ANSWERS):
        labels = batch["labels"][index]
        assert processor.decode(labels[labels != -100]) == f"{answer}<|im_end|>"
        places = (labels != -100).nonzero()[:, 0]
        assert places.diff().eq(1).all() and torch.equal(batch["input_ids"][index, places], labels[places])
        # What stands before the answer is, token by token, what generation is given.
        prompt = prompts["input_ids"][index][prompts["attention_mask"][index] == 1]
        assert torch.equal(batch["input_ids"][index, : places[0]], prompt)
        assert not batch["attention_mask"][index, places[-1] + 1 :].any()


@pytest.mark.parametrize(
    "template, end",
    [
        # Gemma's: the turn ends in a token that is not the tokenizer's end of text, and texts are trimmed.
        (
            "{% for m in messages %}{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) }}"
            "{{ '\n' + m.content | trim + '<|turn|>\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}",
            "<|turn|>",
        ),
        # Mistral's: nothing begins the answer.
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}{% else %}{{ m.content + eos_token }}"
            "{% endif %}{% endfor %}",
            "<|im_end|>",
        ),
        # One that lets the model think first: a finished turn is written otherwise than it begins.
        (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}",
            "<|im_end|>",
        ),
        # One whose turns have no end of their own.
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
            None,
        ),
    ],
    ids=["gemma", "mistral", "thinking", "plain"],
)
def test_templates_of_other_kinds(template: str, end: str | None, tiny_encoder: Path) -> None:
    tokenizer = tiny_backbones.build_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|im_start|>"]})
    processor = SteerMoEProcessor.from_backbones(tiny_encoder, None, tokenizer=tokenizer)
    batch = processor(user(f"{AUDIO}What?"), noise(0.5), answers="It is so.")
    labels = batch["labels"][0]
    said = processor.decode(labels[labels != -100])
    assert said == ("It is so.\n<|im_end|>" if end is None else f"It is so.{end}")


def test_placeholders_are_put_before_prompts_without(processor: SteerMoEProcessor) -> None:
    with_place = processor(user(f"{AUDIO}What?"), noise(1.0))
    without = processor(user("What?"), [noise(1.0)])
    assert torch.equal(with_place["input_ids"], without["input_ids"])
    several = processor([user("One?"), user("Two?")], [noise(1.0), noise(0.5)])
    assert [text_of(processor, ids).count("{") for ids in several["input_ids"]] == [1, 1]
    both = processor([{"role": "system", "content": "Hm."}, *user("What?")], [noise(1.0), noise(0.5)])
    assert "user\n{20}What?" in text_of(processor, both["input_ids"][0])
    parts = processor([{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "What?"}]}], noise(1.0))
    assert torch.equal(parts["input_ids"], with_place["input_ids"])


def test_a_clip_s_features_do_not_depend_on_others(processor: SteerMoEProcessor) -> None:
    batch = processor(MIXED, ALL_CLIPS)
    for index, clip in enumerate(ALL_CLIPS):
        alone = processor(user(AUDIO), [clip])
        length = int(alone["feature_lengths"][0])
        assert length == batch["feature_lengths"][index] == alone["input_features"].shape[2]
        assert torch.equal(batch["input_features"][index, :, :length], alone["input_features"][0])
        assert not batch["input_features"][index, :, length:].any()


def test_features_are_the_extractor_s(processor: SteerMoEProcessor, tiny_encoder: Path, tiny_language_model: Path) -> None:
    """Full clips get the very features the library makes; with ``max_length`` so do short ones."""
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tiny_encoder)
    full = noise(2.0)
    assert torch.equal(
        processor(user(AUDIO), full)["input_features"], extractor(full, sampling_rate=16000, return_tensors="pt").input_features
    )
    padded = SteerMoEProcessor.from_backbones(tiny_encoder, tiny_language_model, audio_padding="max_length")
    batch = padded(user(AUDIO), noise(0.5))
    assert torch.equal(batch["input_features"], extractor(noise(0.5), sampling_rate=16000, return_tensors="pt").input_features)
    assert batch["feature_lengths"].tolist() == [56] and int((batch["input_ids"] == padded.audio_token_id).sum()) == 7


@pytest.mark.parametrize("samples", [1, 2, 159, 160, 161, 399, 401, 31999, 32000])
@pytest.mark.parametrize("kind", ["whisper", "wav2vec2", "w2v_bert"])
def test_clips_of_any_length(kind: str, samples: int, encoder_folder: Callable[[str], Path], tiny_language_model: Path) -> None:
    processor = SteerMoEProcessor.from_backbones(encoder_folder(kind), tiny_language_model, pool_size=3)
    batch = processor(user(AUDIO), noise(2.0)[:samples])
    assert batch["input_features"].isfinite().all()
    length = int(batch["feature_lengths"][0])
    tokens = int((batch["input_ids"] == processor.audio_token_id).sum())
    assert tokens == processor.counts.pooled(length, 3) >= 1
    # No more sound is promised than a window beyond what there is, and every sample is in a frame.
    frames_a_second = {"whisper": 50, "wav2vec2": 50, "w2v_bert": 50}[kind]
    assert abs(processor.counts.frames(length) - samples / 16000 * frames_a_second) < 6.5


@pytest.mark.parametrize("pool_size", [1, 3, 4])
@pytest.mark.parametrize("kind", ["whisper", "wav2vec2", "w2v_bert"])
def test_tokens_of_a_clip_are_known_beforehand(
    kind: str, pool_size: int, encoder_folder: Callable[[str], Path], tiny_language_model: Path
) -> None:
    processor = SteerMoEProcessor.from_backbones(encoder_folder(kind), tiny_language_model, pool_size=pool_size)
    for samples in (1, 1599, 1600, 1601, 5119, 5120, 5121, 16000, 31999, 32000):
        batch = processor([user("Hear")], [noise(samples / 16000)])
        taken = int((batch["input_ids"] == processor.audio_token_id).sum())
        assert processor.audio_tokens(samples / 16000) == taken, samples


def test_saved_and_loaded(processor: SteerMoEProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    for kind in (SteerMoEProcessor, transformers.AutoProcessor):
        again = kind.from_pretrained(tmp_path)
        assert isinstance(again, SteerMoEProcessor)
        for key, value in processor(MIXED, ALL_CLIPS, answers=ANSWERS).items():
            assert torch.equal(again(MIXED, ALL_CLIPS, answers=ANSWERS)[key], value)


def test_an_audio_token_of_ones_own(tiny_encoder: Path, tiny_language_model: Path) -> None:
    processor = SteerMoEProcessor.from_backbones(tiny_encoder, tiny_language_model, audio_token="<sound>")
    assert int((processor(user("<sound>What?"), noise(1.0))["input_ids"] == processor.audio_token_id).sum()) == 13
    known = SteerMoEProcessor.from_backbones(tiny_encoder, tiny_language_model, audio_token="<|im_start|>")
    assert known.audio_token_id == 1 and AUDIO not in known.tokenizer.get_vocab()


ONE = user(f"{AUDIO}What?")


@pytest.mark.parametrize(
    "messages, audio, said",
    [
        (ONE, None, r"audio must hold one clip for each <\|audio\|> placeholder, 1, got 0"),
        (ONE, [noise(1.0)] * 2, "placeholder, 1, got 2"),
        ([ONE, user("a"), user(AUDIO * 2)], [noise(1.0)], r"placeholder, 3 \(1, 0, 2 in the chats\), got 1"),
        ([user("a"), user("b")], [noise(1.0)], r"placeholder, 0 \(0, 0 in the chats\), got 1"),
        ([{"role": "system", "content": "a"}], [noise(1.0)], "no user turn"),
        (ONE, [np.zeros(0, np.float32)], r"audio\[0\] is empty"),
        (ONE, [np.zeros((2, 16000), np.float32)], r"audio\[0\] must be mono, an array of one dimension, got shape \(2, 16000\)"),
        (ONE, [np.zeros(16000, np.int16)], r"audio\[0\] must be floating point between -1 and 1, got int16"),
        (ONE, [np.full(16000, np.nan, np.float32)], r"audio\[0\] holds values that are not finite"),
        (ONE, [noise(1.0) * 32768], r"audio\[0\] has a peak of \d{4,5}, and full scale is 1: divide it by 32768 if"),
        (ONE, [np.zeros(32800, np.float32)], r"audio\[0\] is 2.05 s long, and the encoder takes 2 s: split it"),
        (ONE, [{"array": noise(1.0), "sampling_rate": 8000}], r"audio\[0\] has 8000 samples a second, and the encoder needs 16000"),
        (ONE, ["a.wav"], r"audio\[0\] must be an array of samples, got the name 'a.wav': decode it, as by steermoe.data.load_audio"),
        (ONE, "a.wav", r"audio\[0\] must be an array of samples, got the name 'a.wav'"),
        (ONE, [Path("a.wav")], r"audio\[0\] must be an array of samples, got the name 'a.wav'"),
        (ONE, [b"RIFF"], r"audio\[0\] must be an array of samples, got 4 bytes"),
        (ONE, [None], r"audio\[0\] must be an array of samples, got None"),
        (ONE, [0.1, 0.2], r"audio\[0\] must be an array of samples, got 0.1: give a single clip as an array, or several as a list"),
        (ONE, 3, r"audio must be a clip or a list of clips, got 3"),
        (
            ONE,
            [{"path": "a.wav", "bytes": b""}],
            r"audio\[0\] must have an 'array' and a 'sampling_rate', got a mapping with 'path', 'bytes'",
        ),
        ([{"role": "user", "content": None}], None, "messages' content must be a text or a list of parts, got None"),
        ([{"role": "user", "content": [{"type": "image"}]}], None, r"messages' parts must be texts, .*, got type 'image'"),
        ([{"role": "user", "content": [{"type": "audio_url", "audio_url": "x"}]}], None, r"must be texts, .*, got type 'audio_url'"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], None, r"must be texts, .*, got \{'type': 'text', 'text': None\}"),
        ([{"role": "user", "content": ["a", 3]}], None, r"must be texts, .*, got 3"),
        ([], None, "messages must hold at least one turn"),
        ([{"role": "user"}], None, "messages must be dicts with 'role' and 'content'"),
    ],
)
def test_what_is_refused(messages: Any, audio: Any, said: str, processor: SteerMoEProcessor) -> None:
    with pytest.raises(ValueError, match=said):
        processor(messages, audio)


def test_bfloat16_audio(processor: SteerMoEProcessor) -> None:
    clip = torch.from_numpy(noise(1.0)).bfloat16()
    assert torch.equal(processor(ONE, clip)["input_features"], processor(ONE, clip.float().numpy())["input_features"])


def test_more_that_is_refused(processor: SteerMoEProcessor, tiny_encoder: Path, tiny_language_model: Path) -> None:
    with pytest.raises(ValueError, match="has 44100 samples a second"):
        processor(ONE, noise(1.0), sampling_rate=44100)
    with pytest.raises(ValueError, match="answers must hold one text a chat, 2, got 1"):
        processor([ONE, ONE], [noise(1.0)] * 2, answers=["yes"])
    with pytest.raises(ValueError, match=r"answers must be text, and one holds <\|audio\|>"):
        processor(ONE, noise(1.0), answers=[f"a{AUDIO}"])
    with pytest.raises(ValueError, match=r"answers\[1\] must be a text, got None"):
        processor([user("a"), user("b")], answers=["a", None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="return_tensors must be 'pt', got 'np'"):
        processor(ONE, noise(1.0), return_tensors="np")
    with pytest.raises(ValueError, match="audio_padding must be"):
        SteerMoEProcessor.from_backbones(tiny_encoder, tiny_language_model, audio_padding="both")
    with pytest.raises(ValueError, match="pool_size must be"):
        SteerMoEProcessor.from_backbones(tiny_encoder, tiny_language_model, pool_size=-1)
    short = SteerMoEProcessor.from_backbones(tiny_encoder, tiny_language_model)
    short.tokenizer.model_max_length = 40
    with pytest.raises(ValueError, match=r"^the chat comes to \d+ tokens with its audio, and the language model takes 40"):
        short(ONE, noise(2.0))
    with pytest.raises(ValueError, match=r"^chat 1 comes to \d+ tokens with its audio"):
        short([user("a"), ONE], noise(2.0))
    half = r"messages and answers must be text, and one holds a lone surrogate \('\\ud83d' at character \d+\): half of a character"
    with pytest.raises(ValueError, match=half):
        processor(user("smile \ud83d"))
    with pytest.raises(ValueError, match=half):
        processor(ONE, noise(1.0), answers=["smile \ud83d"])


def test_max_length_needs_a_longest_input(encoder_folder: Callable[[str], Path], tiny_language_model: Path) -> None:
    with pytest.raises(ValueError, match="audio_padding 'max_length' needs an encoder with a longest input, and one of waveforms has none"):
        SteerMoEProcessor.from_backbones(encoder_folder("wav2vec2"), tiny_language_model, audio_padding="max_length")


def test_backbones_that_cannot_be_had(tmp_path: Path, tiny_encoder: Path, tiny_language_model: Path) -> None:
    tiny_backbones.save_language_model(tmp_path / "mute", chat_template=None)
    with pytest.raises(BackboneError, match="has no chat template: use a language model tuned for chats, or set"):
        SteerMoEProcessor.from_backbones(tiny_encoder, tmp_path / "mute")
    with pytest.raises(BackboneError, match=r"text_model '.*nothing' does not exist: give the id of a hub"):
        SteerMoEProcessor.from_backbones(tiny_encoder, tmp_path / "nothing")
    with pytest.raises(BackboneError, match=r"audio_model '.*nothing' does not exist: give the id of a hub"):
        SteerMoEProcessor.from_backbones(tmp_path / "nothing", tiny_language_model)
    encoder = tiny_backbones.ENCODERS["whisper"][0]()
    with pytest.raises(BackboneError, match="audio_model is a module of no known origin: give its feature_extractor along with it"):
        SteerMoEProcessor.from_backbones(encoder, tiny_language_model)
