"""A seeded generator of short English sentences: what the demo's voices say and what its language model was taught on.

Sentences have three to eight words from a lexicon of about 300, put together by templates, so that a few megabytes of weights can know
all of it and a sentence never heard before is still made of known words. Every sentence knows its own facts, from which come questions
whose answer is a span of it. Held-out sentences are told by a hash of their text: no seed and no count can put one into training.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "heldout"]

LEXICON: dict[str, tuple[str, ...]] = {
    slot: tuple(line.split())
    for slot, line in {
        "name": "anna tom mary john peter sarah david emma jack lucy paul kate henry julia sam alice",
        "role": "doctor teacher farmer baker driver singer painter nurse sailor king queen boy girl man woman child",
        "relative": "brother sister mother father uncle friend",
        "owner": "my your his her our",
        "animal": "cat dog horse cow bird fish mouse lion tiger bear sheep goat duck rabbit fox monkey elephant snake frog pig",
        "colour": "red blue green yellow black white brown orange pink purple grey",
        "size": "big small old new little long heavy clean broken cheap",
        "mood": "happy sad tired quiet hungry young clever angry late busy lucky ready",
        "object": "book ball car boat hat coat bag box chair table lamp clock key letter cup plate bottle phone bike shirt ring knife "
        "piano mirror ticket blanket basket candle camera hammer",
        "many": "books balls cars boats hats coats bags boxes chairs lamps keys letters cups plates bottles birds horses dogs",
        "food": "bread milk cake soup rice cheese tea coffee sugar honey butter meat fruit salad",
        "fruit": "apples eggs lemons potatoes carrots cookies nuts grapes",
        "place": "house garden kitchen school park river forest market station church hospital library beach mountain bridge city village "
        "farm street office hotel harbour museum window door",
        "preposition": "in near behind at by under",
        "found": "found lost bought sold saw took made broke carried painted washed opened closed dropped hid forgot",
        "wants": "wants needs likes has",
        "stayed": "sat slept walked waited stood played worked lived danced sang",
        "moved": "ran went came drove swam jumped",
        "cooked": "cooked made bought wanted brought",
        "weather": "cold warm windy sunny dark rainy",
        "digit": "zero one two three four five six seven eight nine",
        "number": "two three four five six seven eight nine ten eleven twelve thirteen fifteen twenty thirty fifty",
        "day": "monday tuesday wednesday thursday friday saturday sunday",
        "adverb": "today yesterday tomorrow again slowly",
        "part": "morning evening afternoon winter summer",
    }.items()
}
"""Words by the slot of a template they fill."""

# {who}, {where} and {when} are phrases made below; every other slot is a kind of word of the lexicon.
TEMPLATES: tuple[str, ...] = (
    "{who} {found} the {colour} {object}",
    "{who} {found} a {size} {object} {when}",
    "{who} {found} {number} {many}",
    "{who} {found} {number} {colour} {many}",
    "{who} {wants} a {colour} {object}",
    "{who} {wants} {number} {fruit}",
    "{who} {wants} a {size} {colour} {object}",
    "{who} {stayed} {where}",
    "{who} {stayed} {where} {when}",
    "{who} {moved} to the {place}",
    "{who} {moved} to the {place} {when}",
    "{who} is {mood} {when}",
    "{who} is {mood} and {mood}",
    "{who} {cooked} {food} and {food}",
    "{who} {cooked} the {food} {when}",
    "{who} ate {number} {fruit} {when}",
    "{who} saw a {colour} {animal}",
    "{who} saw {number} {many} {where}",
    "the {colour} {animal} {stayed} {where}",
    "the {size} {animal} {moved} to the {place}",
    "the {animal} and the {animal} {stayed} {where}",
    "the {animal} is {mood} and {colour}",
    "the {colour} {object} is {where}",
    "the {object} is {size} and {colour}",
    "the {size} {object} was {where}",
    "there are {number} {many} {where}",
    "there is a {colour} {animal} {where}",
    "it was {weather} {when}",
    "it is {weather} and {weather} {where}",
    "we will meet {where} {when}",
    "please bring me the {colour} {object}",
    "please open the {colour} {object}",
    "they sold {number} {many} {when}",
    "i need {food} and {number} {fruit}",
    "where is the {size} {colour} {object}",
    "do you like {food} or {food}",
)

HELDOUT_SHARE = 0.1


@dataclass(frozen=True)
class Phrase:
    """A sentence and what can be asked about it.

    Args:
        text: three to eight lower-case words with single spaces between them, no punctuation.
        questions: (question, answer) pairs; every answer is a run of whole words of `text`, and no question has two right answers.
    """

    text: str
    questions: tuple[tuple[str, str], ...] = ()


def words() -> list[str]:
    """Every word that can occur in a sentence, sorted, each once."""
    fixed = {word for template in TEMPLATES for word in re.sub(r"\{\w+\}", " ", template).split()}
    fixed |= {"an", "the", "on", "in", "at", "night", "noon"}
    return sorted(fixed.union(*LEXICON.values()))


def split_of(text: str) -> Split:
    """The split a sentence belongs to, by a hash of its text alone: about one sentence in ten is held out."""
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
    return "heldout" if int.from_bytes(digest, "big") < HELDOUT_SHARE * 2**32 else "train"


def phrases(seed: int, count: int, split: Split = "train") -> list[Phrase]:
    """`count` different sentences of one split with their questions, the same for the same seed; about one in eight is a string of digits.

    Raises:
        ValueError: `split` is neither "train" nor "heldout", or count is negative.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', got {split!r}")
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    seen: set[str] = set()
    found: list[Phrase] = []
    for phrase in _endless(random.Random(f"phrases-{seed}")):
        if len(found) >= count:
            break
        if phrase.text not in seen and split_of(phrase.text) == split:
            seen.add(phrase.text)
            found.append(phrase)
    return found


def sentences(seed: int, count: int, split: Split = "train") -> list[str]:
    """The texts of `phrases(seed, count, split)`."""
    return [phrase.text for phrase in phrases(seed, count, split)]


def digit_strings(seed: int, count: int, split: Split = "train", *, shortest: int = 3, longest: int = 8) -> list[str]:
    """`count` strings of spoken digits ("three zero nine") of `shortest` to `longest` words, of one split; short ones may repeat."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', got {split!r}")
    if not 1 <= shortest <= longest:
        raise ValueError(f"shortest must be between 1 and longest ({longest}), got {shortest}")
    rng = random.Random(f"digits-{seed}")
    found: list[str] = []
    while len(found) < count:
        text = " ".join(rng.choices(LEXICON["digit"], k=rng.randint(shortest, longest)))
        if split_of(text) == split:
            found.append(text)
    return found


def _endless(rng: random.Random) -> Iterator[Phrase]:
    """Sentences of both splits without end, repeats included."""
    while True:
        if rng.random() < 0.125:
            digits = rng.choices(LEXICON["digit"], k=rng.randint(3, 8))
            yield Phrase(" ".join(digits))
            continue
        phrase = _fill(rng.choice(TEMPLATES), rng)
        if 3 <= len(phrase.text.split()) <= 8:
            yield phrase


def _fill(template: str, rng: random.Random) -> Phrase:
    """One sentence of a template. A slot that occurs twice gets two different words and no question."""
    values: dict[str, list[str]] = {}

    def fill(match: re.Match[str]) -> str:
        slot = match.group(1)
        used = values.setdefault(slot, [])
        if slot == "who":
            value = _who(rng)
        elif slot == "where":
            value = f"{rng.choice(LEXICON['preposition'])} the {rng.choice(LEXICON['place'])}"
        elif slot == "when":
            value = _when(rng)
        else:
            value = rng.choice([word for word in LEXICON[slot] if word not in used])
        used.append(value)
        return value

    text = re.sub(r"\{(\w+)\}", fill, template)
    text = re.sub(r"\ba (?=[aeiou])", "an ", text)
    return Phrase(text, tuple(_questions(values)))


def _who(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(LEXICON["name"])
    if kind < 0.75:
        return f"the {rng.choice(LEXICON['role'])}"
    return f"{rng.choice(LEXICON['owner'])} {rng.choice(LEXICON['relative'])}"


def _when(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(LEXICON["adverb"][:3] if rng.random() < 0.9 else LEXICON["adverb"])
    if kind < 0.65:
        return f"on {rng.choice(LEXICON['day'])}"
    if kind < 0.85:
        return f"in the {rng.choice(LEXICON['part'])}"
    return rng.choice(("at night", "at noon"))


QUESTIONS: dict[str, str] = {
    "who": "who is it about?",
    "where": "where?",
    "place": "which place?",
    "when": "when?",
    "colour": "what colour?",
    "number": "how many?",
    "animal": "which animal?",
    "object": "which object?",
    "weather": "how is the weather?",
}
"""The question that a slot of a template answers."""


def _questions(values: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    """Questions for the slots that were filled exactly once. "slowly" and "again" are no times."""
    for slot, question in QUESTIONS.items():
        filled = values.get(slot, [])
        if len(filled) == 1 and filled[0] not in ("again", "slowly"):
            yield question, filled[0]
