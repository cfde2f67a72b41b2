"""Accents nobody has: an English one with some of its sounds exchanged for near ones, the same throughout a clip.

espeak-ng has eight English accents, and an encoder that has heard six of them takes the vowels of a seventh for other words. Whoever has
heard hundreds that differ sound by sound has to find the word by what stays.
"""

from __future__ import annotations

import random
import re

NEAR: dict[str, tuple[str, ...]] = {
    "a": ("E", "V", "A:"),
    "E": ("a", "I", "eI"),
    "I": ("i:", "E", "@"),
    "I2": ("i:", "@"),
    "i": ("I", "eI"),
    "i:": ("I", "eI"),
    "eI": ("aI", "E", "i:"),
    "aI": ("OI", "eI", "A:"),
    "OI": ("aI", "oU"),
    "oU": ("O:", "aU", "u:"),
    "aU": ("oU", "a", "A:"),
    "V": ("U", "a", "0"),
    "U": ("u:", "V"),
    "u:": ("U", "oU"),
    "0": ("A:", "O:", "V"),
    "A:": ("a", "O:", "0"),
    "O:": ("oU", "A:", "0"),
    "o@": ("oU", "O:"),
    "e@": ("E", "eI", "3:"),
    "i@3": ("i:", "e@"),
    "3:": ("E", "V", "o@"),
    "3": ("@", "a", "V"),
    "@": ("V", "a", "I"),
    "@2": ("V", "a", "i:"),
    "D": ("d", "z", "v"),
    "T": ("t", "s", "f"),
    "w": ("v",),
    "v": ("w", "f", "b"),
    "z": ("s",),
    "N": ("n",),
    "h": ("",),
    "dZ": ("Z", "j"),
    "tS": ("S",),
    "t": ("?", "d"),
    "r": ("w",),
    "l": ("w",),
}
"""Sounds by espeak-ng's mnemonics, and what speakers of other English, or other languages, say for them."""

_KEPT = "A@ IR O2 O@ U@ VR a# aI2 aI@ aU@ aa i@ r- t# t2 w# I# @# @L @-"
_SOUND = re.compile("|".join(re.escape(sound) for sound in sorted((*NEAR, *_KEPT.split()), key=len, reverse=True)))
_VOWELS = frozenset("aeiouAEIOUV0123@")


class Accent:
    """Exchanges each vowel with probability ``vowels`` and each consonant with ``consonants``, drawn once from ``rng``."""

    def __init__(self, rng: random.Random, vowels: float = 0.3, consonants: float = 0.1) -> None:
        self.exchanged = {
            sound: rng.choice(near) for sound, near in NEAR.items() if rng.random() < (vowels if sound[0] in _VOWELS else consonants)
        }

    def __call__(self, mnemonics: str) -> str:
        """``"D@2 k'at"`` -> ``"d@2 k'Et"``, say: stress, pauses and sounds that are not exchanged stay."""
        return _SOUND.sub(lambda found: self.exchanged.get(found[0], found[0]), mnemonics)
