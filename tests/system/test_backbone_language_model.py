"""The tiny language model that is shipped: its tokenizer, its tasks, its reading of soft prompts; and the script that trained it."""

from __future__ import annotations

import json
import random
import re
from itertools import islice
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

pytest.importorskip("espeakng_loader", reason="the sounds of words, which soft prompts are made of, come from the espeakng-loader wheel")

from steermoe.backbones import chat_tasks, encoder_path, language_model_path, projection_probe, train_language_model
from steermoe.backbones.chat_tasks import TRANSCRIBE, Turn
from steermoe.backbones.lesson import BLENDED, CODED_LETTERS, CODED_SOUNDS, IGNORED, WRITTEN, Lesson, collate, place
from steermoe.backbones.pronunciation import phones
from steermoe.backbones.soft_prompts import (
    LETTER_BLANK,
    SOUND_BLANK,
    SimulatedEncoder,
    frame_weights,
    letter_rows,
    soften,
    sounded_rows,
    sounds,
)
from steermoe.backbones.tokenizer import build_tokenizer
from steermoe.demo.phrases import Phrase, phrases, sentences, split_of


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(language_model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(language_model_path())


def answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, content: str) -> str:
    chat = [{"role": "user", "content": content}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt)
    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


# --- the tokenizer -----------------------------------------------------------------------------------------------------------------------


def test_one_token_a_character_and_back(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "it's 5 o'clock: (the) \"red\" cat-fish, isn't it?\nyes; no!  two spaces."
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.batch_decode([ids, ids[:4]]) == [text, "it's"]


def test_characters_are_normalised_or_unknown(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(tokenizer("Caf\u00e9 \u201cOK\u201d\tIt\u2019s \u2013 NO").input_ids) == 'cafe "ok" it\'s - no'
    ids = tokenizer("a\u4e2db").input_ids
    assert len(ids) == 3 and ids[1] == tokenizer.unk_token_id
    assert tokenizer("").input_ids == []


def test_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "count"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>Hi<|end|><|assistant|>yes<|end|><|user|>count<|end|><|assistant|>"
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert len(ids) == len("hi") + len("yes") + len("count") + 7
    assert tokenizer.eos_token == "<|end|>" and ids.count(tokenizer.eos_token_id) == 3
    with pytest.raises(jinja2.exceptions.TemplateError, match="role must be user or assistant, got system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "a"}])


def test_the_shipped_tokenizer_is_the_one_the_script_builds(tokenizer: PreTrainedTokenizerBase) -> None:
    built = build_tokenizer()
    assert built.get_vocab() == tokenizer.get_vocab() and built.chat_template == tokenizer.chat_template
    assert built("Sam's 3\u00e9 \u4e2d?").input_ids == tokenizer("Sam's 3\u00e9 \u4e2d?").input_ids


# --- the model ---------------------------------------------------------------------------------------------------------------------------


def test_the_shipped_files_are_small_and_half_precision(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    size = sum(file.stat().st_size for file in language_model_path().iterdir())
    assert size < 6e6
    assert size + sum(file.stat().st_size for file in encoder_path().iterdir()) <= 12e6
    with safe_open(language_model_path() / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F16"}  # noqa: SIM118 (not a dict)
    assert isinstance(model, LlamaForCausalLM)
    assert 1.7e6 < sum(parameter.numel() for parameter in model.parameters()) < 2.5e6
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.max_position_embeddings) == (192, 4, 512)
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.do_sample is False
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_every_task_on_heldout_sentences(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """The accuracies of training.json, measured again on 24 other sentences: so few may lie 0.15 below, and 0.25 where it errs often."""
    told = json.loads((language_model_path() / "training.json").read_text())["task_accuracies"]
    measured = train_language_model.task_accuracies(model, tokenizer, 24, seed=5)
    reliable = {"transcribe", "question", "spell", "first word", "last word", "next word", "repeat"}
    assert set(measured) == set(told) == reliable | {"count", "numbered word", "yes or no"}
    assert all(told[task] >= 0.95 for task in reliable)
    for task, accuracy in measured.items():
        assert accuracy >= told[task] - (0.15 if task in reliable else 0.25), f"{task}: {accuracy} of 24, {told[task]} in training.json"


def test_answers_through_generate_alone(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    text = next(text for text in sentences(21, 50, "heldout") if " red " in text)
    assert split_of(text) == "heldout"
    assert answer(model, tokenizer, f"{text}\n{TRANSCRIBE}") == text
    assert answer(model, tokenizer, f"{text.upper()}\nWhat is the first word?") == text.split()[0]


def test_a_projection_learns_to_speak_to_the_frozen_model(tokenizer: PreTrainedTokenizerBase) -> None:
    """Thirty steps of eight clips are enough for a linear map of features never seen; the model is as before, bit for bit."""
    model = AutoModelForCausalLM.from_pretrained(language_model_path(), dtype=torch.float32, attn_implementation="eager").eval()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    curve = projection_probe.probe(model, tokenizer, "letters", steps=30, clips=8, measure_at=(1, 30), heldout=12, noise=0.3)
    assert curve.word_error_rates[1] > 0.7
    assert curve.word_error_rates[30] < 0.4
    assert np.mean(curve.losses[-5:]) < 0.5 * np.mean(curve.losses[:2])
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


# --- what it was trained on --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_of", [letter_rows, sounded_rows, sounds])
def test_frames_hold_one_unit_of_weight_each(rows_of) -> None:
    rng = random.Random(0)
    blanks = []
    for text in sentences(0, 60):
        rows = rows_of(text, rng)
        weights = frame_weights(rows, rng)
        assert weights.shape[1] == rows.shape[1] and 1 <= len(weights) <= 120
        np.testing.assert_allclose(weights.sum(1), 1.0, atol=1e-5)
        assert weights.min() > -1e-6
        blanks.append(weights[:, -1].mean())
    assert min(blanks) < 0.02 and max(blanks) > 0.3, "both clips without silence and clips of spikes among blanks"


def test_softened_letters_stay_the_likeliest() -> None:
    rng = random.Random(1)
    weights = frame_weights(letter_rows("zero nine", rng), rng)
    for _ in range(20):
        np.testing.assert_allclose(soften(weights, rng).sum(1), 1.0, atol=1e-5)
        assert (soften(weights, rng).argmax(1) == weights.argmax(1)).mean() > 0.7


def test_sounds_know_no_spelling() -> None:
    assert phones("meat") == phones("meet")
    assert phones("knife")[0] == "n" and "k" not in phones("knife")
    with pytest.raises(ValueError, match="voice must be one of espeak-ng's"):
        phones("cat", "xx-nowhere")


def test_lessons_are_the_same_for_the_same_seed_and_keep_to_their_sentences(tokenizer: PreTrainedTokenizerBase) -> None:
    def drawn() -> list[torch.Tensor]:
        lesson = Lesson(tokenizer, phrases(0, 100), 3, dict(train_language_model.SHARES))
        return [batch.ids for batch in islice(lesson.batches(1024, pool=4), 12)]

    first, second = drawn(), drawn()
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert all(ids.shape[1] % 16 == 0 and ids.numel() <= 1024 for ids in first)


def test_an_example_is_the_chat_template_with_a_label_on_the_answer_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    lesson = Lesson(tokenizer, phrases(0, 10), 0, {})
    phrase = lesson.phrases[0]
    turns = [Turn("transcribe", TRANSCRIBE, phrase.text), Turn("first word", "first word?", phrase.text.split()[0])]
    example = lesson.example(phrase, turns, WRITTEN)
    content = tokenizer.decode(example.ids).removeprefix("<|user|>").split(TRANSCRIBE)[0]
    chat = [
        {"role": "user", "content": content + TRANSCRIBE},
        {"role": "assistant", "content": turns[0].answer},
        {"role": "user", "content": turns[1].instruction},
        {"role": "assistant", "content": turns[1].answer},
    ]
    assert example.ids == tokenizer.apply_chat_template(chat, return_dict=False)
    kept = [label for label in example.labels if label != IGNORED]
    assert tokenizer.decode(kept) == f"{turns[0].answer}<|end|>{turns[1].answer}<|end|>"
    assert all(label in (IGNORED, token) for token, label in zip(example.ids, example.labels, strict=True))


def test_soft_prompts_take_their_place_and_no_other(tokenizer: PreTrainedTokenizerBase) -> None:
    lesson = Lesson(tokenizer, phrases(0, 10), 0, {})
    turn = [Turn("transcribe", TRANSCRIBE, "a")]
    examples = [lesson.example(phrase, turn, kind) for phrase, kind in zip(lesson.phrases, (WRITTEN, BLENDED, BLENDED), strict=False)]
    batch = collate(examples, tokenizer.pad_token_id)
    rows, weights, lengths = batch.frames[BLENDED]
    assert rows.tolist() == [1, 2] and lengths == [len(example.weights) for example in examples[1:]]
    placed = place(torch.zeros(*batch.ids.shape, 4), rows, torch.ones(2, weights.shape[1], 4), lengths)
    assert placed.sum((1, 2)).tolist() == [0.0, *(4.0 * length for length in lengths)]
    assert all(placed[row, 1 : length + 1].all() for row, length in zip(rows.tolist(), lengths, strict=True))
    assert placed[:, 0].abs().sum() == 0
    assert (batch.ids[rows, 1] == tokenizer.pad_token_id).all()


def test_simulated_encoders_differ_by_seed_and_learn_only_their_projection() -> None:
    one, two = SimulatedEncoder(SOUND_BLANK + 1, 192, 0), SimulatedEncoder(SOUND_BLANK + 1, 192, 1)
    assert not torch.equal(one.code, two.code)
    assert {name for name, _ in one.named_parameters()} == {"prompt_proj.weight", "prompt_proj.bias"}
    features = one.features(torch.eye(SOUND_BLANK + 1)[None])
    assert features.shape == (1, SOUND_BLANK + 1, 192)
    torch.testing.assert_close(features.var(-1, unbiased=False), torch.ones(1, SOUND_BLANK + 1), rtol=1e-3, atol=1e-3)


def test_every_task_answers_about_the_sentence() -> None:
    rng = random.Random(0)
    phrase = next(phrase for phrase in phrases(0, 50) if len(phrase.questions) > 1)
    listed = phrase.text.split()
    assert chat_tasks.transcribe(phrase, rng).answer == chat_tasks.repeat(phrase, rng).answer == phrase.text
    assert chat_tasks.count_words(phrase, rng).answer == chat_tasks.NUMBER_WORDS[len(listed)]
    assert chat_tasks.next_word(Phrase("two two two"), rng).task == "first word", "no word has a place of its own"
    assert (chat_tasks.first_word(phrase, rng).answer, chat_tasks.last_word(phrase, rng).answer) == (listed[0], listed[-1])
    for _ in range(20):
        turn = chat_tasks.numbered_word(phrase, rng)
        ordinal = next(word for word in turn.instruction.split() if word in chat_tasks.ORDINALS)
        assert turn.answer == listed[chat_tasks.ORDINALS.index(ordinal)]
        turn = chat_tasks.next_word(phrase, rng)
        before = re.fullmatch(r"which word follows (\w+)\?|what comes after (\w+)\?", turn.instruction)
        assert listed[listed.index(before[1] or before[2]) + 1] == turn.answer
        turn = chat_tasks.occurs(phrase, rng)
        word = re.fullmatch(r"is the word (\w+) in it\?|does it say (\w+)\?", turn.instruction)
        assert turn.answer == ("yes" if (word[1] or word[2]) in listed else "no")
        assert chat_tasks.spell(phrase, rng).answer.replace(" ", "") in (listed[0], listed[-1])
        assert chat_tasks.ask(phrase, rng).answer in {answer for _, answer in phrase.questions}


def test_three_steps_of_training_write_a_loadable_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_language_model, "phrases", lambda seed, count, split="train": phrases(seed, min(count, 100), split))
    monkeypatch.setattr(train_language_model, "BEGINNING", dict(train_language_model.SHARES))
    for name in ("one", "two"):
        report = train_language_model.train(tmp_path / name, steps=3, tokens=768, compiled=False)
        assert report["steps"] == 3 and report["simulated_encoders"] >= 1
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert first == second, "the same seed gives the same weights"
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    untrained = train_language_model.build_model(tokenizer, 0)
    assert all(
        not torch.equal(parameter.half().float(), trained.get_parameter(name))
        for name, parameter in untrained.named_parameters()
        if parameter.ndim == 2
    )


def test_an_interrupted_training_goes_on_from_what_it_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_language_model, "phrases", lambda seed, count, split="train": phrases(seed, min(count, 100), split))

    def interrupt(self: train_language_model.Learners, kinds: list[str]) -> None:
        steps.append(kinds)
        if len(steps) == 3:
            raise KeyboardInterrupt

    steps: list[list[str]] = []
    with monkeypatch.context() as patch:
        patch.setattr(train_language_model.Learners, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_language_model.train(tmp_path, steps=4, tokens=512, compiled=False, save_every=2)
    assert json.loads((tmp_path / "training.json").read_text())["saved_at_step"] == 2
    report = train_language_model.train(tmp_path, steps=4, tokens=512, compiled=False, save_every=2, resume=True)
    assert (report["resumed_at"], report["saved_at_step"], report["seed"]) == (2, 4, 0)


def test_learners_are_replaced_after_their_lifetime() -> None:
    learners = train_language_model.Learners(192, 0)
    first = learners.of(CODED_LETTERS)
    assert first.code.shape[1] == LETTER_BLANK + 1 and learners.of(CODED_LETTERS) is first
    learners.left[CODED_LETTERS] = 1
    first(torch.eye(LETTER_BLANK + 1)[None]).sum().backward()
    weight = first.prompt_proj.weight.clone()
    learners.step([CODED_LETTERS])
    assert not torch.equal(first.prompt_proj.weight, weight)
    assert learners.of(CODED_LETTERS) is not first and learners.of(CODED_SOUNDS).code.shape[1] == SOUND_BLANK + 1
    assert learners.born == 3
