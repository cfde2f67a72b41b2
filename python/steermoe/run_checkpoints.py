"""The checkpoints of a training run, folders that are whole or not there: written aside, sealed, renamed, and checked before they are read.

A checkpoint is a folder ``checkpoint-STEP`` in the run's folder. It is written as ``unfinished-checkpoint-STEP``; `seal` then records every
file's size and SHA-256 in `SEAL`, and the model's settings, forces all of it to the disk, and renames the folder. Whatever happens before
the rename, the checkpoints that were there are untouched; whatever happens to a file afterwards, `verify` names it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    "CheckpointError",
    "check_settings",
    "checkpoints_in",
    "locked",
    "newest_sound",
    "remove_old",
    "remove_unfinished",
    "seal",
    "sealed_settings",
    "staging_folder",
    "step_of",
    "to_disk",
    "verify",
]

SEAL, LOCK, CONFIG_NAME = "checkpoint.json", ".lock", "config.json"
# What may be changed in the config of a sealed model: where its backbones lie, and which kernels it is computed by.
MOVABLE = frozenset({"audio_model", "text_model", "audio_revision", "text_revision", "backend"})
UNFINISHED, REPLACED = "unfinished-", "replaced-"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is not what was written. The message names the folder or file."""


def checkpoints_in(run: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a run's folder, oldest step first, sound or not; none where the folder is not there."""
    folder = Path(run)
    found = [path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def step_of(checkpoint: str | os.PathLike[str]) -> int:
    """The optimizer step after which a checkpoint was made, by its name. ValueError for a folder that is not named like one."""
    match = _NAME.fullmatch(Path(checkpoint).name)
    if match is None:
        raise ValueError(f"a checkpoint is a folder called checkpoint-STEP, got {checkpoint}")
    return int(match[1])


def staging_folder(checkpoint: Path) -> Path:
    """Where a checkpoint is written before it is sealed: beside its place, so that the rename is one operation of one file system."""
    return checkpoint.with_name(UNFINISHED + checkpoint.name)


def seal(checkpoint: Path) -> None:
    """Make the staging folder of ``checkpoint`` that checkpoint, replacing one of the same step. OSError leaves what was there."""
    staging = staging_folder(checkpoint)
    files = sorted(path for path in staging.rglob("*") if path.is_file() and path.name != SEAL)
    entries = {str(path.relative_to(staging)): {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in files}
    content = {"step": step_of(checkpoint), "files": entries}
    if (staging / CONFIG_NAME).is_file():
        content["settings"] = sealed_settings(json.loads((staging / CONFIG_NAME).read_text(encoding="utf-8")))
    (staging / SEAL).write_text(json.dumps(content, indent=1), encoding="utf-8")
    for path in [*files, staging / SEAL, *{path.parent for path in files}, staging]:
        to_disk(path)
    aside = checkpoint.with_name(REPLACED + checkpoint.name)
    if checkpoint.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(checkpoint, aside)
    try:
        os.rename(staging, checkpoint)
    except OSError:
        if aside.exists():
            os.rename(aside, checkpoint)
        raise
    to_disk(checkpoint.parent)
    shutil.rmtree(aside, ignore_errors=True)


def sealed_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a seal records of a model's config: all but what is `MOVABLE`."""
    return {key: value for key, value in config.items() if key not in MOVABLE}


def check_settings(config: Path, sealed: Any) -> None:
    """CheckpointError, naming the setting, for a model's config that does not say what its seal recorded of it."""
    try:
        found = sealed_settings(json.loads(config.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{config} is damaged: {error}") from error
    if not isinstance(sealed, dict):
        raise CheckpointError(f"{config.with_name(SEAL)} is damaged: its settings are no mapping")
    for key in sorted({*sealed, *found}):
        if key not in sealed or key not in found or sealed[key] != found[key]:
            said, recorded = (repr(values[key]) if key in values else "nothing" for values in (found, sealed))
            raise CheckpointError(f"{config} says {key} {said}, and {SEAL} beside it {recorded}: one of them was altered")


def verify(checkpoint: str | os.PathLike[str]) -> None:
    """CheckpointError, naming the first file that is missing, cut off or altered, or saying that the folder was never finished."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint at {folder}")
    try:
        content = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        entries, settings = content["files"], content.get("settings")
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no checkpoint of a training run, or was never finished: it has no {SEAL}") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder / SEAL} is damaged") from None
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if name == CONFIG_NAME and settings is not None:
            check_settings(path, settings)
            continue
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{path} has {size} bytes, and {entry['bytes']} were written: it was cut off or changed")
        if _digest(path) != entry["sha256"]:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the recorded one")


def newest_sound(run: str | os.PathLike[str]) -> tuple[Path | None, list[CheckpointError]]:
    """The newest checkpoint that `verify` passes, None if there is none, and what is wrong with every newer one."""
    problems = []
    for checkpoint in reversed(checkpoints_in(run)):
        try:
            verify(checkpoint)
        except CheckpointError as error:
            problems.append(error)
        else:
            return checkpoint, problems
    return None, problems


def remove_old(run: Path, limit: int | None, keep: Collection[int | None]) -> None:
    """Keep the newest ``limit`` checkpoints (None: all) and those of the steps in ``keep``, and remove the others."""
    found = checkpoints_in(run)
    for checkpoint in found[: max(0, len(found) - limit)] if limit is not None else []:
        if step_of(checkpoint) not in keep:
            # Renamed first: a removal that is cut short must not leave something that looks like a checkpoint.
            doomed = checkpoint.with_name(REPLACED + checkpoint.name)
            os.rename(checkpoint, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run's folder for one process; the lock goes with the process, however it ends. FileExistsError if another one has it."""
    made = not run.exists()
    run.mkdir(parents=True, exist_ok=True)
    path = run / LOCK
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"another run is writing to {run}: wait for it, or choose another training.output_dir") from None
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if made and not any(run.iterdir()):  # a run that could not start leaves nothing behind
                run.rmdir()


def remove_unfinished(run: Path) -> None:
    """Clear away what a run that was cut off left behind, and put back a checkpoint that was being replaced then."""
    for path in list(run.iterdir()) if run.is_dir() else []:
        if path.name.startswith(REPLACED + "checkpoint-"):
            original = path.with_name(path.name.removeprefix(REPLACED))
            if not original.exists() and (path / SEAL).exists():
                try:
                    verify(path)
                    os.rename(path, original)
                    continue
                except CheckpointError:
                    pass
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.removeprefix(".").startswith(UNFINISHED + "checkpoint-"):
            # With a dot, the model's own staging folder of a save that was killed, beside the checkpoint's.
            shutil.rmtree(path, ignore_errors=True)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def to_disk(path: Path) -> None:
    """Flush a file or folder to the disk: a full one must show before the rename, not after."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
