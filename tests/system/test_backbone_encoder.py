"""The tiny encoder that is shipped, and the script that trained it."""

from __future__ import annotations

import json
import random
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoFeatureExtractor, AutoModel, WhisperFeatureExtractor, WhisperModel

pytest.importorskip("espeakng_loader", reason="the encoder's training and its measurement need the espeakng-loader wheel")

from steermoe.backbones import encoder_path, train_encoder
from steermoe.backbones.accents import NEAR, Accent
from steermoe.backbones.train_encoder import CHARACTERS, PHONEMES, Clip, _stretched, collate, encode, load, measure, spell, text
from steermoe.demo.phrases import LEXICON, sentences, split_of
from steermoe.demo.speech import HELD_OUT_VOICES, SAMPLING_RATE, TRAINING_VOICES, Voice, utter

SENTENCES = ("anna found the red book", "three zero nine")


@pytest.fixture(scope="module")
def shipped() -> WhisperModel:
    return AutoModel.from_pretrained(encoder_path()).eval()


@pytest.fixture(scope="module")
def spelling() -> nn.Linear:
    heads = train_encoder.Heads(192)
    load(train_encoder.build(0), heads, encoder_path())
    return heads.spelling


# --- what is shipped ---------------------------------------------------------------------------------------------------------------------


def test_the_shipped_encoder_loads_as_a_whisper_model_of_the_agreed_size(shipped: WhisperModel) -> None:
    config = shipped.config
    assert isinstance(shipped, WhisperModel) and config.model_type == "whisper"
    assert (config.d_model, config.encoder_layers, config.encoder_attention_heads, config.encoder_ffn_dim) == (192, 4, 4, 768)
    assert (config.num_mel_bins, config.max_source_positions, config.decoder_layers) == (80, 1500, 0)
    assert all(parameter.isfinite().all() for parameter in shipped.parameters())
    extractor = AutoFeatureExtractor.from_pretrained(encoder_path())
    assert (extractor.feature_size, extractor.sampling_rate) == (80, SAMPLING_RATE)


def test_the_shipped_files_are_small_and_half_precision() -> None:
    assert sum(file.stat().st_size for file in encoder_path().iterdir()) < 5e6
    assert _dtypes(encoder_path()) == {"F16"}


def test_hidden_states_spell_what_voices_never_heard_say(shipped: WhisperModel, spelling: nn.Linear) -> None:
    """The figures of training.json again; a voice of an accent that was in training is spelt nearly without error."""
    told = json.loads((encoder_path() / "training.json").read_text())["greedy CTC on held-out voices and sentences"]
    found = measure(shipped.encoder, spelling)
    assert found["all"]["cer"] == pytest.approx(told["all"]["cer"], abs=0.01)
    known = {voice.accent for voice in TRAINING_VOICES}
    assert all(found[str(voice)]["cer"] < 0.04 for voice in HELD_OUT_VOICES if voice.accent in known)


def test_hidden_states_do_not_depend_on_what_else_is_in_the_batch(shipped: WhisperModel) -> None:
    alone, batch = _batch(SENTENCES[1:]), _batch(SENTENCES)
    assert batch.features.shape[2] > alone.features.shape[2]
    with torch.no_grad():
        single = encode(shipped.encoder, alone.features, alone.frames)[1][0]
        among = encode(shipped.encoder, batch.features, batch.frames)[1][1]
    torch.testing.assert_close(among[: len(single)], single, rtol=1e-4, atol=1e-4)


def test_encode_is_the_librarys_own_forward_where_that_takes_the_input(shipped: WhisperModel) -> None:
    features = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = shipped.encoder(features, output_hidden_states=True)
        early, last = encode(shipped.encoder, features, torch.tensor([1500]))
    torch.testing.assert_close(last, expected.last_hidden_state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(early, expected.hidden_states[2], rtol=1e-4, atol=1e-4)


# --- what it is trained on ---------------------------------------------------------------------------------------------------------------


def test_nothing_held_out_is_ever_said_and_every_digit_is_said_alone() -> None:
    rng = random.Random(5)
    said = [text(rng) for _ in range(8000)]
    spelt = {sentence for sentence, heard in said if heard}
    assert not [sentence for sentence in spelt if len(sentence.split()) >= 3 and split_of(sentence) == "heldout"]
    assert set(LEXICON["digit"]) <= spelt
    assert set("".join(spelt)) <= set(CHARACTERS)
    assert 0.05 < np.mean([not heard for _, heard in said]) < 0.2


def test_a_batch_holds_each_clip_then_zeros() -> None:
    batch = _batch(SENTENCES)
    clips, bins, longest = batch.features.shape
    assert (clips, bins) == (2, 80) and longest == 2 * int(batch.frames.max())
    short = int(batch.frames[1])
    assert batch.features[1, :, 2 * short :].eq(0).all() and batch.features[1, :, : 2 * short].ne(0).any(0).all()
    assert batch.phonemes.shape == (2, longest // 2)
    assert batch.phonemes[1, short:].eq(-100).all() and batch.phonemes[1, :short].ge(0).all()
    assert "".join(CHARACTERS[index] for index in batch.spelt) == "".join(SENTENCES)
    assert batch.lengths.tolist() == [len(sentence) for sentence in SENTENCES]


def test_features_are_the_extractors_own() -> None:
    audio = utter(SENTENCES[0], Voice()).audio
    batch = _batch(SENTENCES[:1])
    whole = np.pad(audio, (0, int(batch.frames[0]) * 320 - len(audio)))
    expected = WhisperFeatureExtractor()(whole, sampling_rate=SAMPLING_RATE, padding=False, return_tensors="pt").input_features
    torch.testing.assert_close(batch.features, expected)


@pytest.mark.parametrize(("hertz", "factor"), [(800, 1.25), (2000, 1.3), (3000, 0.8), (7000, 0.8)])
def test_a_stretched_tone_is_the_tone_at_the_stretched_frequency(hertz: int, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def mel(frequency: float) -> Tensor:
        tone = np.sin(2 * np.pi * frequency * np.arange(SAMPLING_RATE) / SAMPLING_RATE).astype(np.float32)
        return WhisperFeatureExtractor()(tone, sampling_rate=SAMPLING_RATE, padding="do_not_pad", return_tensors="pt").input_features[0]

    rng = random.Random(0)
    monkeypatch.setattr(rng, "random", lambda: 0.9)
    monkeypatch.setattr(rng, "uniform", lambda low, high: np.log(factor))
    stretched = _stretched(mel(hertz), rng)
    assert stretched.shape == mel(hertz).shape
    assert abs(int(stretched[:, 50].argmax()) - int(mel(hertz * factor)[:, 50].argmax())) <= 1


def test_frames_are_labelled_with_the_phoneme_heard_there() -> None:
    labels = _batch(["seven"]).phonemes[0].tolist()
    order = [PHONEMES[now] for before, now in zip([None, *labels], labels, strict=False) if now != before and now != 0]
    assert order == ["s", "E", "v", "@", "n"]
    heard = {name.strip("',|%=") for voice in TRAINING_VOICES[::40] for name, _ in utter(SENTENCES[0], voice).phonemes}
    assert len(heard - set(PHONEMES) - {""}) <= 2


def test_greedy_spelling_drops_repeats_and_blanks_and_what_lies_behind_the_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    blank = len(CHARACTERS)
    path = [blank, *(CHARACTERS.index(character) for character in "bbo"), blank, CHARACTERS.index("o"), CHARACTERS.index("k"), blank]
    batch = _batch(SENTENCES[:1])._replace(frames=torch.tensor([6]))
    monkeypatch.setattr(train_encoder, "encode", lambda *_: (None, nn.functional.one_hot(torch.tensor([path]), blank + 1).float()))
    assert spell(None, nn.Identity(), batch) == ["boo"]  # type: ignore[arg-type]


# --- the training itself -----------------------------------------------------------------------------------------------------------------


def test_a_few_steps_lower_the_loss() -> None:
    model, heads = train_encoder.build(0), train_encoder.Heads(192)
    optimizer = torch.optim.AdamW([*model.encoder.parameters(), *heads.parameters()], lr=1e-3)
    batch = _batch(SENTENCES)
    losses = []
    for _ in range(12):
        loss, parts = train_encoder.loss_of(model.encoder, heads, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert set(parts) == {"phonemes", "spelling"}
    assert losses[-1] < 0.6 * losses[0]


def test_an_accent_exchanges_whole_sounds_and_always_the_same() -> None:
    accent = Accent(random.Random(0))
    accent.exchanged = {"a": "E", "3:": "V", "t": "?"}
    # Longer mnemonics are sounds of their own: "aI" holds no "a", "tS" no "t", "a#" no "a".
    assert accent("k'at tS'3:tS naIn bl'ak a#t") == "k'E? tS'VtS naIn bl'Ek a#?"
    drawn = [Accent(random.Random(seed)).exchanged for seed in range(200)]
    assert Accent(random.Random(3)).exchanged == drawn[3]
    assert all(said in NEAR[sound] for one in drawn for sound, said in one.items())
    assert {sound for one in drawn for sound in one} == set(NEAR)
    vowels = sum(sound in one for one in drawn for sound in ("a", "I", "oU")) / 600
    consonants = sum(sound in one for one in drawn for sound in ("t", "D", "l")) / 600
    assert 0.25 < vowels < 0.35 and 0.06 < consonants < 0.14


def test_what_voices_say_has_a_label() -> None:
    """Mnemonics that are not among the labels are taken for silence: none that is heard often."""
    rng, heard = random.Random(0), []
    for sentence in sentences(3, 150):
        heard += [name.strip("',|%=") for name, _ in utter(sentence, rng.choice(TRAINING_VOICES), Accent(rng)).phonemes]
    spoken = [name for name in heard if not name.startswith("_")]
    assert len(spoken) > 1500
    assert sum(name not in PHONEMES for name in spoken) < 0.01 * len(spoken)


def test_made_up_words_have_no_spelling_to_learn() -> None:
    model, heads = train_encoder.build(0), train_encoder.Heads(192)
    batch = collate([Clip(utter("blorp stint", Voice()), "")], WhisperFeatureExtractor())
    train_encoder.loss_of(model.encoder, heads, batch)[0].backward()
    assert heads.spelling.weight.grad is None or heads.spelling.weight.grad.eq(0).all()
    assert heads.phonemes.weight.grad.ne(0).any()


def test_training_saves_and_goes_on_from_what_it_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Tensor] = []

    def counted(encoder: Any, head: nn.Linear) -> dict[str, Any]:
        measured.append(encoder.conv1.weight.detach().clone())
        return {"all": {"wer": 1.0, "cer": 1.0}}

    monkeypatch.setattr(train_encoder, "measure", counted)
    given: dict[str, Any] = {"minutes": 0.03, "batch": 4, "rate": 1e-3, "threads": 1, "save_every": 5.0, "bf16": False}
    first, second = tmp_path / "first", tmp_path / "second"
    train_encoder.train(Namespace(**given, seed=0, start_from=None, output=first))
    assert AutoModel.from_pretrained(first).config.d_model == 192 and _dtypes(first) == {"F16"}
    train_encoder.train(Namespace(**given | {"minutes": 0.0}, seed=1, start_from=first, output=second))
    stages = json.loads((second / "training.json").read_text())["stages"]
    assert [stage["seed"] for stage in stages] == [0, 1] and stages[0]["steps"] > 0 and stages[1]["steps"] == 0
    torch.testing.assert_close(measured[1], measured[0], rtol=1e-3, atol=1e-4)  # but for the rounding to float16


def _batch(said: tuple[str, ...] | list[str]) -> train_encoder.Batch:
    return collate([Clip(utter(sentence, Voice()), sentence) for sentence in said], WhisperFeatureExtractor())


def _dtypes(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
        return {weights.get_slice(name).get_dtype() for name in names}
