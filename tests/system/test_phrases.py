"""The generator of sentences: the same for the same seed, disjoint splits, and questions with one right answer in the sentence."""

import hashlib
import re

import pytest

from steermoe.demo.phrases import LEXICON, TEMPLATES, digit_strings, phrases, sentences, split_of, words

WORDS = words()[::20]


def test_same_seed_same_sentences():
    first = sentences(3, 200)
    assert first == sentences(3, 200)
    assert first[:50] == sentences(3, 50), "a longer list begins as a shorter one"
    assert first != sentences(4, 200)
    # Pinned, because shipped weights were trained on it: a change of the generator asks for new weights.
    assert hashlib.sha256("\n".join(first).encode()).hexdigest()[:16] == "4999f729cc852725"


def test_splits_are_disjoint_whatever_the_seed():
    train = {text for seed in range(3) for text in sentences(seed, 1000)}
    heldout = {text for seed in range(3) for text in sentences(seed, 100, "heldout")}
    assert not train & heldout
    assert all(split_of(text) == "train" for text in train) and all(split_of(text) == "heldout" for text in heldout)
    assert {word for text in heldout for word in text.split()} <= {word for text in train for word in text.split()}


def test_a_tenth_is_held_out():
    share = sum(split_of(f"{one} {two} {three}") == "heldout" for one in WORDS for two in WORDS for three in WORDS) / len(WORDS) ** 3
    assert 0.08 < share < 0.12


def test_sentences_are_short_varied_and_of_the_lexicon():
    texts = sentences(1, 5000)
    assert len(set(texts)) == 5000
    assert all(re.fullmatch(r"[a-z]+( [a-z]+){2,7}", text) for text in texts)
    spoken = {word for text in texts for word in text.split()}
    assert spoken <= set(words()) and len(spoken) > 290 and len(words()) <= 320
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]", text) for text in texts)
    digits = sum(set(text.split()) <= set(LEXICON["digit"]) for text in texts)
    assert 0.08 < digits / 5000 < 0.17


def test_every_slot_of_a_template_can_be_filled():
    slots = {slot for template in TEMPLATES for slot in re.findall(r"\{(\w+)\}", template)}
    assert slots <= set(LEXICON) | {"who", "where", "when"}


def test_answers_are_words_of_the_sentence():
    asked = [phrase for phrase in phrases(2, 2000) if phrase.questions]
    assert len(asked) > 1400
    for phrase in asked:
        questions = [question for question, _ in phrase.questions]
        assert len(questions) == len(set(questions))
        for _, answer in phrase.questions:
            assert f" {answer} " in f" {phrase.text} "


def test_digit_strings():
    texts = digit_strings(0, 200, shortest=2, longest=4)
    assert texts == digit_strings(0, 200, shortest=2, longest=4)
    assert {len(text.split()) for text in texts} == {2, 3, 4}
    assert {word for text in texts for word in text.split()} == set(LEXICON["digit"])
    assert all(split_of(text) == "heldout" for text in digit_strings(0, 20, "heldout"))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"split must be 'train' or 'heldout', got 'test'"):
        sentences(0, 1, "test")
    with pytest.raises(ValueError, match=r"count must not be negative, got -1"):
        sentences(0, -1)
    with pytest.raises(ValueError, match=r"shortest must be between 1 and longest \(2\), got 3"):
        digit_strings(0, 1, shortest=3, longest=2)
    assert sentences(0, 0) == []
