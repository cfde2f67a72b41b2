"""The tasks the shipped language model is taught and measured on: about one sentence, an instruction and the answer."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from ..demo.phrases import Phrase, words

TRANSCRIBE = "transcribe the audio."
"""The canonical instruction; it stands right after the content."""

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
WORDS = words()


@dataclass(frozen=True)
class Turn:
    """An instruction about a content and its answer; `task` names the kind."""

    task: str
    instruction: str
    answer: str


def transcribe(phrase: Phrase, rng: random.Random) -> Turn:
    other = ("write down what you hear.", "what is said?", "what did they say?", "write the sentence.", "please transcribe.", "transcribe:")
    return Turn("transcribe", TRANSCRIBE if rng.random() < 0.7 else rng.choice(other), phrase.text)


def repeat(phrase: Phrase, rng: random.Random) -> Turn:
    return Turn("repeat", rng.choice(("repeat.", "repeat the text.", "say it again.", "repeat the sentence.")), phrase.text)


def spell(phrase: Phrase, rng: random.Random) -> Turn:
    listed = phrase.text.split()
    if len(listed) == 1:
        return Turn("spell", rng.choice(("spell it.", "spell the word.")), " ".join(listed[0]))
    which, word = rng.choice((("first", listed[0]), ("last", listed[-1])))
    return Turn("spell", f"spell the {which} word.", " ".join(word))


def count_words(phrase: Phrase, rng: random.Random) -> Turn:
    return Turn("count", rng.choice(("count the words.", "how many words?")), NUMBER_WORDS[len(phrase.text.split())])


def first_word(phrase: Phrase, rng: random.Random) -> Turn:
    return Turn("first word", rng.choice(("what is the first word?", "first word?")), phrase.text.split()[0])


def last_word(phrase: Phrase, rng: random.Random) -> Turn:
    return Turn("last word", rng.choice(("what is the last word?", "last word?")), phrase.text.split()[-1])


def numbered_word(phrase: Phrase, rng: random.Random) -> Turn:
    """Counting that is answered with a word: where the one word "six" teaches little, this tells at which word the count went wrong."""
    listed = phrase.text.split()
    index = rng.randrange(len(listed))
    return Turn("numbered word", rng.choice(("what is the {} word?", "{} word?")).format(ORDINALS[index]), listed[index])


def next_word(phrase: Phrase, rng: random.Random) -> Turn:
    """The word behind a given one: to find a word is what yes or no asks for as well, and says next to nothing about how."""
    listed = phrase.text.split()
    places = [index for index in range(len(listed) - 1) if listed.count(listed[index]) == 1]
    if not places:
        return first_word(phrase, rng)
    index = rng.choice(places)
    return Turn("next word", rng.choice(("which word follows {}?", "what comes after {}?")).format(listed[index]), listed[index + 1])


def occurs(phrase: Phrase, rng: random.Random) -> Turn:
    listed = phrase.text.split()
    word = rng.choice(listed) if rng.random() < 0.5 else rng.choice(WORDS)
    instruction = rng.choice(("is the word {} in it?", "does it say {}?")).format(word)
    return Turn("yes or no", instruction, "yes" if word in listed else "no")


REWORDED: dict[str, tuple[str, ...]] = {
    "who is it about?": ("who is it about?", "who?", "who is it?"),
    "where?": ("where?", "where is it?", "where does it happen?"),
    "which place?": ("which place?", "to which place?"),
    "when?": ("when?", "when is it?"),
    "what colour?": ("what colour?", "what color?", "which colour is it?", "what colour is it?"),
    "how many?": ("how many?", "how many are there?"),
    "which animal?": ("which animal?", "what animal is it?"),
    "which object?": ("which object?", "what object is it?"),
    "how is the weather?": ("how is the weather?", "what is the weather like?"),
}
"""The wordings a question is asked in; the first is the sentence generator's own."""


def ask(phrase: Phrase, rng: random.Random) -> Turn:
    """A question about the sentence whose answer is a span of it; a sentence without questions is transcribed."""
    if not phrase.questions:
        return transcribe(phrase, rng)
    question, answer = rng.choice(phrase.questions)
    return Turn("question", rng.choice(REWORDED[question]), answer)


TASKS: dict[Callable[[Phrase, random.Random], Turn], float] = {
    transcribe: 0.4,
    ask: 0.12,
    spell: 0.07,
    count_words: 0.1,
    first_word: 0.03,
    last_word: 0.03,
    numbered_word: 0.07,
    next_word: 0.07,
    occurs: 0.11,
}
"""Every task with its share of training. `repeat` is for written content only, where it means letter by letter, lexicon or not."""


def sample_turn(phrase: Phrase, rng: random.Random) -> Turn:
    return rng.choices(list(TASKS), list(TASKS.values()))[0](phrase, rng)
