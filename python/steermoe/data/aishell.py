"""An AISHELL folder: one transcript file for the whole corpus and a tree of WAV files, as AISHELL-1 and AISHELL-2 have it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .corpus import Corpus, Example, Problem, decoded, numbered_lines

PRIORITY = 20
LOOKED_FOR = "a folder with wav/ and transcript/aishell_transcript*.txt (AISHELL-1) or trans.txt (AISHELL-2)"

# AISHELL-1 separates words by spaces, which written Chinese does not have; spaces between Latin words stay.
_HAN = r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
_SPACE_BESIDE_HAN = re.compile(rf"(?<={_HAN})\s+|\s+(?={_HAN})")


def takes(path: Path) -> bool:
    return path.is_dir() and _transcript(path) is not None and (path / "wav").is_dir()


def read(path: str | os.PathLike[str], *, split: str | None = None) -> Corpus:
    """Every WAV file under ``wav``, in the order of their names, with its line of the transcript, spaces between Chinese words removed.

    ``split`` reads ``wav/train``, ``wav/dev`` or ``wav/test`` alone. Audio without a transcript line, or with one that is not UTF-8, is
    a problem; so is a second file or line of an utterance, and, where the whole corpus is read, a line without audio. FileNotFoundError
    for a split that is not there and for speakers still packed as archives.
    """
    root = Path(path)
    transcript = _transcript(root)
    if transcript is None:
        raise FileNotFoundError(f"{root} has neither transcript/aishell_transcript*.txt nor trans.txt")
    folder = root / "wav" / split if split is not None else root / "wav"
    if not folder.is_dir():
        here = ", ".join(sorted(p.name for p in (root / "wav").iterdir() if p.is_dir())) if (root / "wav").is_dir() else "no wav folder"
        raise FileNotFoundError(f"{folder} is not there; {root} has {here}")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".wav", ".flac"))
    if not files and any(folder.rglob("*.tar.gz")):
        raise FileNotFoundError(f"{folder} has speakers packed as .tar.gz and no WAV file: unpack them where they are")
    texts = _texts(transcript)
    rows: list[Example] = []
    problems: list[Problem] = []
    read_from: dict[str, Path] = {}
    for file in files:
        if (first := read_from.setdefault(file.stem, file)) != file:
            problems.append(Problem(str(file), f"the same utterance as {first}"))
            continue
        lines = texts.pop(file.stem, None)
        if lines is None:
            problems.append(Problem(str(file), f"no line in {transcript.name}"))
            continue
        (number, content), *again = lines
        where = f"{transcript}:{number}"
        problems += [Problem(f"{transcript}:{later}", f"the same utterance as line {number}") for later, _ in again]
        try:
            text = _SPACE_BESIDE_HAN.sub("", _fields(decoded(content))[1])
        except ValueError as error:
            problems.append(Problem(where, str(error)))
        else:
            rows.append(Example(str(file), text, id=file.stem, extra={"speaker": file.parent.name}, where=where))
    if split is None:
        problems += [
            Problem(f"{transcript}:{number}", f"no audio {name}.wav under {folder}") for name, lines in texts.items() for number, _ in lines
        ]
    return Corpus(rows, problems, str(folder))


def _transcript(root: Path) -> Path | None:
    found = [*sorted((root / "transcript").glob("aishell_transcript*.txt")), root / "trans.txt"]
    return next((file for file in found if file.is_file()), None)


def _texts(transcript: Path) -> dict[str, list[tuple[int, bytes]]]:
    """Line numbers and lines by utterance, undecoded: one that is not UTF-8 is a fault of its own row."""
    texts: dict[str, list[tuple[int, bytes]]] = {}
    for number, line in numbered_lines(transcript):
        name, _ = _fields(line.decode("utf-8", errors="replace"))
        if name:  # else an ideographic space
            texts.setdefault(name, []).append((number, line))
    return texts


def _fields(line: str) -> tuple[str, str]:
    """Utterance and text."""
    name, _, text = line.strip().replace("\t", " ").partition(" ")
    return name, text.strip()
