"""What is wrong with a corpus, before a night is spent training on it: every file is decoded from end to end."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.progress import track
from rich.table import Table
from rich.text import Text

from ..config import AUDIO_TOKEN
from . import Specification, load
from .audio import AudioError, Loudness, blocks_of, duration_of, split_at_quiet
from .collator import chat, text_fault
from .corpus import Example, Problem

# Declared and real durations may differ by this much, or by this share, before the row is named.
DURATION_SECONDS = 0.1
DURATION_SHARE = 0.02
# Upper ends of the histogram's bins, in seconds; the last bin is open.
BINS = (1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0)
# How many rows of each finding a table shows; `Report.to_dict` has them all.
SHOWN = 10


@dataclass(frozen=True)
class Finding:
    """One kind of fault: what it is called, whether it loses rows (``severity`` "error") or not ("warning"), and the rows."""

    name: str
    severity: str
    rows: list[Problem]


@dataclass(frozen=True)
class Report:
    """What `check` found. Print it with rich, or as JSON from `to_dict`.

    ``rows`` counts every row of the source; ``seconds`` (usable rows,) are the real durations; ``rates`` and ``channels`` count files.
    """

    name: str
    rows: int
    seconds: np.ndarray
    rates: Counter[int]
    channels: Counter[int]
    findings: list[Finding] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """0: every row can be learnt from, warnings or not. 1: some cannot."""
        return int(any(finding.rows and finding.severity == "error" for finding in self.findings))

    def finding(self, name: str) -> list[Problem]:
        """The rows of the finding called ``name``. KeyError for a name that no finding has."""
        return {finding.name: finding.rows for finding in self.findings}[name]

    def histogram(self) -> list[tuple[str, int]]:
        """Rows by duration: "under 1 s", "1 to 2 s", ..., "60 s and more"."""
        counts = np.histogram(self.seconds, [0.0, *BINS, np.inf])[0].tolist()
        between = [f"{low:g} to {high:g} s" for low, high in pairwise(BINS)]
        return list(zip([f"under {BINS[0]:g} s", *between, f"{BINS[-1]:g} s and more"], counts, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        return {
            "name": self.name,
            "rows": self.rows,
            "usable": len(self.seconds),
            "hours": float(self.seconds.sum()) / 3600,
            "durations": {**self._summary(), "histogram": dict(self.histogram())},
            "sampling_rates": {str(rate): count for rate, count in sorted(self.rates.items())},
            "channels": {str(number): count for number, count in sorted(self.channels.items())},
            "findings": {
                finding.name: {
                    "severity": finding.severity,
                    "rows": [{"where": problem.where, "reason": problem.reason} for problem in finding.rows],
                }
                for finding in self.findings
            },
            "exit_status": self.exit_status,
        }

    def _summary(self) -> dict[str, float]:
        if not len(self.seconds):
            return {}
        marks = {"min": 0, "5%": 5, "median": 50, "95%": 95, "max": 100}
        return {name: float(np.percentile(self.seconds, mark)) for name, mark in marks.items()} | {"mean": float(self.seconds.mean())}

    def __rich__(self) -> RenderableType:
        return Group(*self._tables())

    def _tables(self) -> Iterator[RenderableType]:
        overview = Table(title=Text(self.name), title_justify="left", show_header=False)
        overview.add_row("rows", str(self.rows))
        overview.add_row("usable audio", f"{len(self.seconds)} rows, {self.seconds.sum() / 3600:.2f} h")
        overview.add_row("sampling rates", ", ".join(f"{rate} Hz: {count}" for rate, count in self.rates.most_common()))
        overview.add_row("channels", ", ".join(f"{number}: {count}" for number, count in self.channels.most_common()))
        overview.add_row("durations", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self._summary().items()))
        yield overview
        durations = Table("duration", "rows", "share", "", title="durations", title_justify="left")
        histogram = self.histogram()
        most = max((count for _, count in histogram), default=0)
        for name, count in histogram:
            share = count / max(len(self.seconds), 1)
            durations.add_row(name, str(count), f"{share:.1%}", "█" * math.ceil(20 * count / max(most, 1)))
        yield durations
        findings = Table("finding", "severity", "rows", title="findings", title_justify="left")
        for finding in self.findings:
            findings.add_row(finding.name, finding.severity if finding.rows else "none", str(len(finding.rows)))
        yield findings
        for finding in self.findings:
            if finding.rows:
                rows = Table("row", "what was found", title=f"{finding.name} ({len(finding.rows)})", title_justify="left")
                for problem in finding.rows[:SHOWN]:
                    rows.add_row(Text(problem.where, overflow="fold"), Text(problem.reason, overflow="fold"))
                if len(finding.rows) > SHOWN:
                    rows.add_row("...", f"and {len(finding.rows) - SHOWN} more")
                yield rows


@dataclass(frozen=True)
class _Decoded:
    """One row and what its audio turned out to be; the audio itself, which may be bytes, is let go. ``file`` is its path, if it has one."""

    row: Example
    file: str | None
    digest: str = ""
    seconds: float = 0.0
    file_seconds: float = 0.0
    rate: int = 0
    channels: int = 0
    warnings: tuple[str, ...] = ()
    error: str | None = None
    fault: str | None = None

    @property
    def where(self) -> str:
        return self.row.name


def check(spec: Specification, *, sampling_rate: int = 16000, max_seconds: float = 30.0, progress: bool = False) -> Report:
    """Decode every row of the corpus and report what is wrong, nothing being changed.

    Errors, which lose rows: rows that could not be read, audio that cannot be decoded, empty texts, texts and
    prompts that no processor takes (half a character, <|audio|> in a text or more than once in a prompt). Warnings: sampling rates below
    ``sampling_rate`` (what the encoder could hear above half of them is missing), ids that occur twice, the same audio in several rows
    (by its decoded samples), declared durations that are not the real ones, silent and clipped audio, clips over ``max_seconds`` (they
    will be split). ``progress`` shows a bar on the error stream. Raises as `load` where there is no corpus at all; ValueError for a
    ``max_seconds`` that is not finite and above 0.
    """
    if not 0 < max_seconds < math.inf:
        raise ValueError(f"max_seconds must be finite and above 0, got {max_seconds:g}")
    corpus = load(spec, allow_empty=True)
    # soundfile and hashlib release the interpreter lock while they work.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        results: Iterator[_Decoded] = pool.map(partial(_decode, max_seconds=max_seconds), corpus)
        if progress:
            results = iter(track(results, "decoding", total=len(corpus), console=Console(stderr=True), transient=True))
        decoded = list(results)
    readable = [clip for clip in decoded if clip.error is None]
    return Report(
        name=corpus.name,
        rows=len(corpus) + len(corpus.problems),
        seconds=np.array([clip.seconds for clip in readable], dtype=np.float64),
        rates=Counter(clip.rate for clip in readable),
        channels=Counter(clip.channels for clip in readable),
        findings=_findings(corpus.problems, decoded, sampling_rate, max_seconds),
    )


def _findings(problems: list[Problem], decoded: Sequence[_Decoded], sampling_rate: int, max_seconds: float) -> list[Finding]:
    readable = [clip for clip in decoded if clip.error is None]
    low = [Problem(clip.where, f"{clip.rate} Hz, the encoder's is {sampling_rate} Hz") for clip in readable if clip.rate < sampling_rate]
    long = [Problem(clip.where, f"{clip.seconds:.1f} s, over {max_seconds:g} s") for clip in readable if clip.seconds > max_seconds]
    empty = [Problem(clip.where, f"text is {clip.row.text!r}") for clip in decoded if not (clip.row.text and clip.row.text.strip())]
    loudness = {
        kind: [Problem(clip.where, warning) for clip in readable for warning in clip.warnings if warning.startswith(kind)]
        for kind in ("silent", "clipped")
    }
    return [
        Finding("bad rows", "error", problems),
        Finding("unreadable audio", "error", [Problem(clip.where, clip.error) for clip in decoded if clip.error is not None]),
        Finding("empty texts", "error", empty),
        Finding("unusable texts", "error", [Problem(clip.where, clip.fault) for clip in decoded if clip.fault is not None]),
        Finding("duplicate ids", "warning", _repeated([(clip.row.id, clip.where) for clip in decoded if clip.row.id], "id")),
        Finding("duplicate audio", "warning", _repeated([(clip.digest, clip.where) for clip in readable], "audio")),
        Finding("low sampling rates", "warning", low),
        Finding("wrong durations", "warning", _misdeclared(readable)),
        Finding("long clips", "warning", long),
        *(Finding(kind, "warning", rows) for kind, rows in loudness.items()),
    ]


def _decode(row: Example, max_seconds: float) -> _Decoded:
    bare = replace(row, audio=b"", where=row.name)
    file = os.fspath(row.audio) if isinstance(row.audio, str | os.PathLike) else None
    fault = text_fault(row)
    digest = hashlib.sha256()
    loudness: list[Loudness] = []
    try:
        for block in blocks_of(row.audio, 30.0, row.offset, row.duration):
            # A WAV file and the FLAC made of it are the same audio: samples are hashed, in 16 bits, not files.
            digest.update(np.clip(np.round(block.samples * 32768), -32768, 32767).astype("<i2").tobytes())
            loudness.append(block.loudness)
        file_seconds = duration_of(row.audio)
        if fault is None and row.prompt is not None and row.prompt.count(AUDIO_TOKEN) > 1:
            fault = _prompt_fault(row, row.prompt, max_seconds)
    except AudioError as error:
        return _Decoded(bare, file, error=str(error), fault=fault)
    whole = Loudness.joined(loudness)
    rate = block.source_rate
    key = f"{rate} {digest.hexdigest()}"
    return _Decoded(bare, file, key, whole.frames / rate, file_seconds, rate, block.channels, tuple(whole.warnings), fault=fault)


def _prompt_fault(row: Example, prompt: str, max_seconds: float) -> str | None:
    """What is wrong with a prompt of several placeholders; nothing where the recording is split into just as many clips."""
    try:
        chat(prompt, len(split_at_quiet(row.audio, max_seconds, row.offset, row.duration)))
    except AudioError:
        raise
    except ValueError as error:
        return str(error)
    return None


def _misdeclared(readable: Sequence[_Decoded]) -> list[Problem]:
    """Rows whose declared duration is not the audio's. Where several rows share a file each is a section of it, and may end before it."""
    sharing = Counter(clip.file for clip in readable)
    found = []
    for clip in readable:
        declared = clip.row.duration
        if declared is None:
            continue
        whole = clip.row.offset == 0 and (clip.file is None or sharing[clip.file] == 1)
        seconds = clip.file_seconds if whole else clip.seconds
        if abs(declared - seconds) > max(DURATION_SECONDS, DURATION_SHARE * declared):
            found.append(Problem(clip.where, f"declared {declared:.2f} s, really {seconds:.2f} s"))
    return found


def _repeated(keys: Sequence[tuple[str, str]], what: str) -> list[Problem]:
    """Every row that has a key an earlier row had, with that row's name."""
    first: dict[str, str] = {}
    again: defaultdict[str, list[Problem]] = defaultdict(list)
    for key, where in keys:
        if key in first:
            shown = f" {key!r}" if what == "id" else ""
            again[key].append(Problem(where, f"the same {what}{shown} as {first[key]}"))
        else:
            first[key] = where
    return [problem for problems in again.values() for problem in problems]
