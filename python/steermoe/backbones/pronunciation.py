"""How the demo's words sound, as letters: what a speech encoder can know about spelling, and no more.

espeak-ng turns a word into phones, a table turns each phone into the letters it is commonly written with. "knight" becomes n-i-t,
"school" s-k-oo-l: the material from which a language model learns to spell what it hears.
"""

# ruff: noqa: RUF001 (the phonetic alphabet looks like the Latin one in places)

from __future__ import annotations

import ctypes
import re
from functools import lru_cache

_TABLE = """
tʃ=ch/tch/t  dʒ=j/g/ge  eɪ=a/ay/ai/ei  aɪ=i/y/igh/ie  ɔɪ=oy/oi  aʊ=ow/ou  oʊ=o/ow/oa  əʊ=o/ow/oa  iː=ee/e/ea/i
uː=oo/u/ou/ew  ɑː=a/o/ar/ah  ɔː=o/au/aw/or  ɜː=er/ir/ur/e  ɪə=ear/ee/ia  eə=air/e/ea  ʊə=oor/ou  p=p  b=b  t=t/tt  d=d
k=k/c/ck/q  ɡ=g  f=f/ph  v=v  θ=th/t  ð=th/d  s=s/c/ss  z=z/s  ʃ=sh/s  ʒ=s/zh/g  h=h  m=m  n=n  ŋ=ng/n  l=l  ɹ=r  r=r
w=w/u  j=y/i  ɾ=t/d  i=y/i/e  ɪ=i/e  ᵻ=i/e  ɛ=e/ea  e=e  æ=a  a=a  ɑ=o/a  ɒ=o/a  ɔ=o/au  o=o  ʊ=oo/u  u=u/oo  ʌ=u/o
ɚ=er/or/r  ə=a/e/o/u  ɐ=a/u  ɜ=er/ir
"""

LETTERS_OF_PHONE: dict[str, tuple[str, ...]] = {
    phone: tuple(letters.split("/")) for phone, letters in (entry.split("=") for entry in _TABLE.split())
}
"""Each phone in the international phonetic alphabet, with the letters it is written with, the commonest first."""
PHONES = tuple(LETTERS_OF_PHONE)
_PHONE = re.compile("|".join(sorted(PHONES, key=len, reverse=True)))
_IPA, _UTF8 = 2, 1


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    try:
        import espeakng_loader
    except ImportError as error:
        raise RuntimeError("the sounds of words need espeak-ng: pip install espeakng-loader (part of the extra `demo`)") from error
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    if library.espeak_Initialize(2, 0, str(espeakng_loader.get_data_path()).encode(), 0) < 0:
        raise RuntimeError(f"espeak-ng did not start with its data in {espeakng_loader.get_data_path()}")
    library.espeak_TextToPhonemes.restype = ctypes.c_char_p
    return library


@lru_cache(maxsize=4096)
def phones(word: str, voice: str = "en-us") -> tuple[str, ...]:
    """The phones of one word in an espeak-ng voice, without stress marks; phones that the table lacks are left out.

    Raises:
        RuntimeError: espeak-ng is not installed or does not start.
        ValueError: it has no such voice.
    """
    library = _library()
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise ValueError(f"voice must be one of espeak-ng's, such as 'en-us' or 'en-gb-x-rp', got {voice!r}")
    text = ctypes.c_char_p(word.encode())
    return tuple(_PHONE.findall(library.espeak_TextToPhonemes(ctypes.byref(text), _UTF8, _IPA).decode()))
