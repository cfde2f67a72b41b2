"""Error rates of transcripts: word and character, raw and normalised, with where the errors are and how sure the rate is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

# Written without spaces between words: characters are the unit, and spaces are none of them.
UNSPACED_LANGUAGES = frozenset({"zh", "yue", "ja", "th", "lo", "my", "km", "bo"})
_CODE = re.compile(r"[a-z]{2,3}")

RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class ErrorRate:
    """Errors over the whole corpus divided by the reference's length, in ``unit`` "word" or "character".

    ``counts`` (utterances, 4) int64 holds each utterance's hits, substitutions, deletions and insertions; ``interval`` is the percentile
    bootstrap's over utterances, 95%. ``rate`` may pass 1; it is inf where there are insertions and no reference at all.
    """

    unit: str
    counts: np.ndarray
    interval: tuple[float, float]

    @property
    def hits(self) -> int:
        return int(self.counts[:, 0].sum())

    @property
    def substitutions(self) -> int:
        return int(self.counts[:, 1].sum())

    @property
    def deletions(self) -> int:
        return int(self.counts[:, 2].sum())

    @property
    def insertions(self) -> int:
        return int(self.counts[:, 3].sum())

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def reference_length(self) -> int:
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float:
        return _ratio(self.errors, self.reference_length)

    def utterance(self, index: int) -> dict[str, int]:
        """The counts of one utterance, by name."""
        return dict(zip(("hits", "substitutions", "deletions", "insertions"), self.counts[index].tolist(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; None for a rate that is not a finite number."""
        return {
            "unit": self.unit,
            "rate": _finite(self.rate),
            "interval": [_finite(bound) for bound in self.interval],
            "hits": self.hits,
            "substitutions": self.substitutions,
            "deletions": self.deletions,
            "insertions": self.insertions,
            "reference_length": self.reference_length,
        }


@dataclass(frozen=True)
class WordErrors:
    """Word and character error rates of a corpus: ``wer`` and ``cer`` of normalised texts, ``raw_wer`` and ``raw_cer`` as they came."""

    language: str
    utterances: int
    wer: ErrorRate
    cer: ErrorRate
    raw_wer: ErrorRate
    raw_cer: ErrorRate

    @property
    def primary(self) -> ErrorRate:
        """The rate the language is judged by: characters where words are written without spaces, else words; normalised."""
        return self.cer if self.language in UNSPACED_LANGUAGES else self.wer

    def to_dict(self) -> dict[str, Any]:
        rates = {name: getattr(self, name).to_dict() for name in ("wer", "cer", "raw_wer", "raw_cer")}
        return {"language": self.language, "utterances": self.utterances, **rates}


def word_errors(
    references: Sequence[str], hypotheses: Sequence[str], language: str = "en", *, normalization: str | None = None, seed: int = 0
) -> WordErrors:
    """Corpus error rates by jiwer, as the texts came and after openai-whisper's normaliser for the language, or ``normalization``'s.

    Empty references and hypotheses count: all insertions, all deletions. Characters include the single spaces between words, except in
    languages written without them. ``seed`` is the bootstrap's. ValueError for lists of different or no length
    and for an unknown language.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"references and hypotheses must be as many, got {len(references)} and {len(hypotheses)}")
    if not len(references):
        raise ValueError("references must hold at least one utterance, got none")
    code = language_code(language)
    clean = normalizer(code, normalization)
    raw = [_collapse(text) for text in references], [_collapse(text) for text in hypotheses]
    normalised = [clean(text) for text in references], [clean(text) for text in hypotheses]
    unspaced = code in UNSPACED_LANGUAGES

    def rate(unit: str, texts: tuple[list[str], list[str]]) -> ErrorRate:
        if unit == "character" and unspaced:
            texts = [text.replace(" ", "") for text in texts[0]], [text.replace(" ", "") for text in texts[1]]
        counts = _counts(unit, *texts)
        return ErrorRate(unit, counts, bootstrap(counts[:, 1:].sum(axis=1), counts[:, :3].sum(axis=1), seed))

    return WordErrors(
        code, len(references), rate("word", normalised), rate("character", normalised), rate("word", raw), rate("character", raw)
    )


def bootstrap(errors: np.ndarray, lengths: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of sum(errors) / sum(lengths), (utterances,) each, drawing utterances with replacement.

    Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation" (2004).
    """
    rng = np.random.default_rng(seed)
    rates = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(0, len(errors), len(errors))
        rates.append(_ratio(int(errors[drawn].sum()), int(lengths[drawn].sum())))
    # A quantile that is one of the values: between two, inf would become nan.
    low, high = np.quantile(rates, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], method="nearest")
    return float(low), float(high)


def normalizer(language: str, normalization: str | None = None) -> Callable[[str], str]:
    """openai-whisper's normaliser: ``EnglishTextNormalizer`` for English, else ``BasicTextNormalizer``; one space between words.

    ``normalization`` "english" or "basic" takes that one whatever the language. The English one writes numbers as figures and joins
    successive digits: "one two three" is the single word 123, so strings of spoken digits are to be scored by "basic". ValueError for
    another ``normalization``; ImportError where openai-whisper is not installed.
    """
    if normalization not in (None, "english", "basic"):
        raise ValueError(f"normalization must be english, basic or None (by language), got {normalization!r}")
    whisper = _whisper_normalizer(normalization == "english" or (normalization is None and language_code(language) == "en"))
    return lambda text: _collapse(whisper(text))


def language_code(language: str) -> str:
    """ "English", "en" and "en-US" are "en". ValueError for what is neither a code of two or three letters nor a name Whisper has."""
    # Here, not above: it brings transformers' tokenizers along.
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    name = language.strip().lower()
    code = TO_LANGUAGE_CODE.get(name, re.split(r"[-_]", name)[0])
    if not _CODE.fullmatch(code):
        raise ValueError(f"language must be a code like en, zh or yue, or an English name like German, got {language!r}")
    return code


@cache
def _whisper_normalizer(english: bool) -> Callable[[str], str]:
    try:
        # Here, not above: the package loads numba, which takes seconds.
        from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer
    except ImportError as error:
        raise ImportError("scoring needs openai-whisper's normalisers: pip install openai-whisper") from error
    return EnglishTextNormalizer() if english else BasicTextNormalizer()


def _counts(unit: str, references: list[str], hypotheses: list[str]) -> np.ndarray:
    """(utterances, 4) int64: hits, substitutions, deletions, insertions."""
    try:
        import jiwer
    except ImportError as error:
        raise ImportError("scoring needs jiwer: pip install jiwer") from error
    process = jiwer.process_words if unit == "word" else jiwer.process_characters
    counts = np.zeros((len(references), 4), dtype=np.int64)
    columns = {"equal": 0, "substitute": 1, "delete": 2, "insert": 3}
    for row, chunks in zip(counts, process(references, hypotheses).alignments, strict=True):
        for chunk in chunks:
            in_hypothesis = chunk.type == "insert"
            row[columns[chunk.type]] += (
                chunk.hyp_end_idx - chunk.hyp_start_idx if in_hypothesis else chunk.ref_end_idx - chunk.ref_start_idx
            )
    return counts


def _collapse(text: str) -> str:
    return " ".join(text.split())


def _ratio(errors: int, length: int) -> float:
    if length == 0:
        return math.inf if errors else 0.0
    return errors / length


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
