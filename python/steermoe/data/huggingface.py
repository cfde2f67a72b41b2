"""Hugging Face ``datasets`` with an audio column: a folder written by ``save_to_disk``, or a hub name with ``kind: huggingface``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from .audio import HeldAudio
from .corpus import Corpus, Example, Problem
from .manifest import stated

PRIORITY = 30
REMOTE = True
LOOKED_FOR = "a folder that datasets' save_to_disk wrote (dataset_info.json or dataset_dict.json)"

_TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript", "normalized_text", "raw_transcription")
_AUDIO_COLUMNS = ("audio", "speech", "audio_filepath", "file", "path")
_FACTS = ("prompt", "answers", "offset", "duration", "id")


def takes(path: Path) -> bool:
    return path.is_dir() and (
        (path / "dataset_dict.json").is_file() or ((path / "dataset_info.json").is_file() and (path / "state.json").is_file())
    )


def read(
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    audio_column: str | None = None,
    text_column: str | None = None,
    data_dir: str | None = None,
) -> Corpus:
    """The rows of a data set; audio is decoded by soundfile when a row is used, whether stored as path, bytes or array.

    ``split`` is needed where there are several. ``name``, ``revision`` and ``data_dir`` are ``load_dataset``'s, for data sets that are not
    folders of ``save_to_disk``. ``audio_column`` and ``text_column`` are told from types and usual names if not given. Columns ``prompt``,
    ``answers`` (as lists of strings, or as SQuAD has them), ``offset``, ``duration`` and ``id`` are used where they exist; of a text that
    is a class label, its name. Rows without audio, or with values that a manifest's rows may not have, are problems. ImportError without
    ``datasets``; ValueError for a split or column that is not there, and for a data set without rows.
    """
    dataset = _open(os.fspath(path), split, name, revision, data_dir)
    audio_column = _audio_column(dataset, audio_column)
    text_column = _text_column(dataset, text_column)
    rows = Rows(dataset, audio_column, text_column, os.fspath(path))
    _check_form(rows.audio, audio_column)
    reasons = rows.faults()
    for index in np.flatnonzero(_missing_audio(rows.audio, audio_column)).tolist():
        reasons[index] = f"no audio: column {audio_column!r} is null"
    kept = [index for index in range(len(rows)) if index not in reasons]
    problems = [Problem(f"{path}[{index}]", reason) for index, reason in sorted(reasons.items())]
    whole = Corpus(rows, (), f"{os.fspath(path)}{f' ({split})' if split else ''}")
    return whole.select(kept, problems) if problems else whole


class Rows(Sequence[Example]):
    """Examples built from a data set's rows when asked for; their audio is read when it is decoded."""

    def __init__(self, dataset: Any, audio_column: str, text_column: str | None, path: str) -> None:
        import datasets
        from datasets.features.features import require_decoding

        audio = dataset.select_columns([audio_column])
        if isinstance(dataset.features[audio_column], datasets.Audio):
            # Decoding through the library would need torchcodec.
            audio = audio.cast_column(audio_column, datasets.Audio(decode=False))
        self.audio = audio
        # Other audio, and images, are no facts: to decode them takes time, and packages that may not be there.
        media = [name for name, feature in dataset.features.items() if require_decoding(feature, ignore_decode_attribute=True)]
        self._facts = dataset.remove_columns([audio_column, *(name for name in media if name != audio_column)])
        self._length = len(dataset)
        self._audio_column = audio_column
        self._text_column = text_column
        self._labels = getattr(dataset.features.get(text_column), "names", None)
        self._path = path

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if not -self._length <= index < self._length:
            raise IndexError(f"row {index} of {self._length}")
        index = int(index) % self._length
        # Without another column the data set has forgotten how many rows it has.
        row = self._facts[index] if self._facts.column_names else {}
        fields = self._stated(row)
        fields["id"] = fields["id"] if fields["id"] is not None else f"{index}"
        where = f"{self._path}[{index}]"
        extra = {name: value for name, value in row.items() if name not in (*_FACTS, self._text_column)}
        return Example(audio=TableAudio(where, self.audio, index, self._audio_column), extra=extra, where=where, **fields)

    def faults(self) -> dict[int, str]:
        """Of the rows that say what a manifest's may not, by index, what is wrong. Only columns whose type allows it are read."""
        columns = [name for name in self._facts.column_names if name in (self._text_column, *_FACTS) and not self._is_sound(name)]
        found = {}
        for index, row in enumerate(self._facts.select_columns(columns)) if columns else ():
            try:
                self._stated(row)
            except ValueError as error:
                found[index] = str(error)
        return found

    def _stated(self, row: Mapping[str, Any]) -> dict[str, Any]:
        fields = {name: row[name] for name in _FACTS if name in row and name != self._text_column}
        answers = fields.get("answers")
        if isinstance(answers, str):
            fields["answers"] = [answers]
        elif isinstance(answers, Mapping) and "text" in answers:  # SQuAD's, with the places of the answers beside them
            fields["answers"] = answers["text"]
        text = None if self._text_column is None else row.get(self._text_column)
        if self._labels is not None and text in range(len(self._labels)):
            text = self._labels[text]
        return stated({**fields, "text": text}, self._text_column or "text")

    def _is_sound(self, column: str) -> bool:
        """Whether the type of a column leaves nothing to check."""
        kind = getattr(self._facts.features[column], "dtype", "")
        texts = ("string", "large_string", "null")
        return column in (self._text_column, "prompt", "id") and (kind in texts or (column == "id" and kind.startswith(("int", "uint"))))


@dataclass
class TableAudio:
    """The audio of one row, as `audio.StoredAudio`; `_check_form` has seen to its form."""

    name: str
    dataset: Any
    index: int
    column: str

    def fetch(self) -> HeldAudio:
        audio = self.dataset[self.index][self.column]
        if isinstance(audio, str):
            return audio
        if audio.get("array") is not None:
            return np.asarray(audio["array"], dtype=np.float32), int(audio["sampling_rate"] or 0)
        if audio.get("bytes") is not None:
            return bytes(audio["bytes"])
        return str(audio["path"])


def _check_form(dataset: Any, column: str) -> None:
    import pyarrow as pa

    form = dataset.data.schema.field(column).type
    parts = {form.field(index).name for index in range(form.num_fields)} if pa.types.is_struct(form) else set()
    if not (pa.types.is_string(form) or pa.types.is_large_string(form) or {"bytes", "path"} & parts or {"array", "sampling_rate"} <= parts):
        raise ValueError(
            f"column {column!r} must hold audio as a path, or as a struct of bytes and path or of array and sampling_rate, got {form}"
        )


def _missing_audio(dataset: Any, column: str) -> np.ndarray:
    """(rows,) bool: which have none, told from the table's null bitmaps, without reading audio."""
    import pyarrow as pa
    import pyarrow.compute as pc

    missing = [np.zeros(0, dtype=bool)]
    for chunk in dataset.data.column(column).chunks:
        present = chunk.is_valid()
        if pa.types.is_struct(chunk.type):
            parts = [chunk.field(name).is_valid() for name in ("array", "bytes", "path") if chunk.type.get_field_index(name) >= 0]
            present = pc.and_(present, reduce(pc.or_, parts))
        missing.append(pc.invert(present).to_numpy(zero_copy_only=False))
    # A selection or a shuffle leaves the table as it is and lists the rows beside it.
    picked = dataset._indices
    every = np.concatenate(missing)
    return every if picked is None else every[picked.column(0).to_numpy()]


def _open(path: str, split: str | None, name: str | None, revision: str | None, data_dir: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("reading Hugging Face data sets needs the package 'datasets': pip install datasets") from error
    if takes(Path(path)):
        try:
            dataset = datasets.load_from_disk(path)
        except IndexError as error:  # how the library fails at a table without rows
            raise ValueError(f"{path} has no rows, or one of its splits has none") from error
    else:
        dataset = datasets.load_dataset(path, name, split=split, revision=revision, data_dir=data_dir)
        split = None
    if isinstance(dataset, datasets.DatasetDict):
        if split is None and len(dataset) == 1:
            split = next(iter(dataset))
        if split not in dataset:
            raise ValueError(f"split must be one of {', '.join(dataset)} for {path}, got {split!r}")
        dataset = dataset[split]
    elif split is not None and str(dataset.split) != split:
        raise ValueError(f"{path} is one split ({dataset.split}), got split={split!r}")
    # In a format it was saved with, such as torch's, numbers would be no numbers.
    return dataset.with_format(None)


def _audio_column(dataset: Any, given: str | None) -> str:
    import datasets

    names = dataset.column_names
    if given is not None:
        if given not in names:
            raise ValueError(f"audio_column must be one of {', '.join(names)}, got {given!r}")
        return given
    typed = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Audio)]
    found = typed or [name for name in _AUDIO_COLUMNS if name in names]
    if not found:
        raise ValueError(f"none of the columns {', '.join(names)} holds audio: name it with audio_column")
    return found[0]


def _text_column(dataset: Any, given: str | None) -> str | None:
    if given is not None and given not in dataset.column_names:
        raise ValueError(f"text_column must be one of {', '.join(dataset.column_names)}, got {given!r}")
    return given or next((name for name in _TEXT_COLUMNS if name in dataset.column_names), None)
