"""A LibriSpeech folder: chapters with a ``SPEAKER-CHAPTER.trans.txt`` of "ID TEXT" lines beside the ``ID.flac`` files."""

from __future__ import annotations

import os
from pathlib import Path

from .corpus import Corpus, Example, Problem, decoded, numbered_lines

PRIORITY = 20
LOOKED_FOR = "a folder with *.trans.txt files and their audio at most four folders down, as LibriSpeech's test-clean"

# Of an utterance in several formats the first of these is read.
_SUFFIXES = (".flac", ".wav", ".ogg", ".mp3", ".opus")


def takes(path: Path) -> bool:
    return path.is_dir() and any(any(path.glob("*/" * depth + "*.trans.txt")) for depth in range(5))


def read(path: str | os.PathLike[str], *, split: str | None = None) -> Corpus:
    """Every utterance under ``path``, in the order of the transcripts' names; ``split`` reads one folder of it, as "test-clean".

    A transcript line without audio or that is not UTF-8, audio without a transcript line, and a second file or line of an utterance is a
    problem. FileNotFoundError for a split that is not there.
    """
    root = Path(path)
    if split is not None:
        found = [folder for folder in (root / split, root / "LibriSpeech" / split) if folder.is_dir()]
        if not found:
            raise FileNotFoundError(
                f"{root} has no split {split!r}; it has {', '.join(sorted(p.name for p in root.iterdir() if p.is_dir()))}"
            )
        root = found[0]
    rows: list[Example] = []
    problems: list[Problem] = []
    for transcripts in sorted(root.rglob("*.trans.txt")):
        audio: dict[str, Path] = {}
        beside = [file for file in transcripts.parent.iterdir() if file.suffix.lower() in _SUFFIXES]
        for each in sorted(beside, key=lambda file: (_SUFFIXES.index(file.suffix.lower()), file.name)):
            if (first := audio.setdefault(each.stem, each)) != each:
                problems.append(Problem(str(each), f"the same utterance as {first.name}"))
        lines: dict[str, int] = {}
        for number, line in numbered_lines(transcripts):
            name = line.split()[0].decode("utf-8", errors="replace")
            where = f"{transcripts}:{number}"
            if (earlier := lines.setdefault(name, number)) != number:
                problems.append(Problem(where, f"the same utterance as line {earlier}"))
                continue
            file = audio.pop(name, None)
            try:
                text = decoded(line).partition(name)[2].strip()
            except ValueError as error:
                problems.append(Problem(where, str(error)))
                continue
            if file is None:
                problems.append(Problem(where, f"no audio file {name}{{{','.join(_SUFFIXES)}}} beside it"))
            else:
                speaker = transcripts.name.partition("-")[0]
                rows.append(Example(audio=str(file), text=text, id=name, extra={"speaker": speaker}, where=where))
        problems += [Problem(str(file), f"no line in {transcripts.name}") for _, file in sorted(audio.items())]
    return Corpus(rows, problems, str(root))
