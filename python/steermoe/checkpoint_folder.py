"""A model's folder on disk: the trained weights, the config, the backbones' fingerprints and a card; whole or not there.

Everything is written into a new folder beside the one wanted, flushed, and put in place by renaming. Where a model is saved over an
earlier one, the earlier folder is moved aside for the moment between two renames, and `read` finds it there should that moment be its
last: a save that is cut off, by a crash or a full disk, leaves the previous model.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import cached_file

from .checkpoints import CheckpointError
from .config import SteerMoEConfig
from .fingerprint import Fingerprint
from .model_card import model_card

__all__ = ["SavedModel", "read", "write"]

CONFIG_NAME, WEIGHTS_NAME, FINGERPRINTS_NAME, CARD_NAME = "config.json", "model.safetensors", "fingerprints.json", "README.md"


@dataclass(frozen=True)
class SavedModel:
    """What `read` found: ``folder`` is what was asked for, ``fingerprints`` are by "audio" and "text"."""

    folder: str
    config: SteerMoEConfig
    weights: dict[str, Tensor]
    fingerprints: dict[str, Fingerprint]


def write(
    folder: str | os.PathLike[str], config: SteerMoEConfig, weights: Mapping[str, Tensor], fingerprints: Mapping[str, Fingerprint]
) -> None:
    """Save a model in ``folder``; other files in it stay. OSError, with the previous model in place, if that is not possible."""
    target = Path(os.path.abspath(folder))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file: give a folder to save to")
    target.parent.mkdir(parents=True, exist_ok=True)
    _put_back(target)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.unfinished-", dir=target.parent))
    try:
        staging.chmod(0o777 & ~_umask())
        _write_files(staging, config, weights, fingerprints)
        _put_in_place(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read(name: str | os.PathLike[str], *, revision: str | None = None, **hub: Any) -> SavedModel:
    """A saved model, from a folder or a hub's repository. CheckpointError, naming the file, if any of it is missing, cut off or damaged."""
    where = os.fspath(name)
    if os.path.isabs(where) or os.path.exists(where) or where.startswith("."):
        _put_back(Path(os.path.abspath(where)))
        if not os.path.isdir(where):
            raise CheckpointError(f"there is no checkpoint at {where}")
    config_path, weights_path = (_file(where, part, revision, hub) for part in (CONFIG_NAME, WEIGHTS_NAME))
    settings = _json(config_path)
    if settings.get("model_type") != SteerMoEConfig.model_type:
        raise CheckpointError(f"{config_path} is of a {settings.get('model_type')!r} model, not of a 'steermoe' one")
    recorded = _json(_file(where, FINGERPRINTS_NAME, revision, hub))
    try:
        weights = load_file(weights_path)
    except (SafetensorError, OSError, ValueError) as error:
        size = os.path.getsize(weights_path)
        raise CheckpointError(f"{weights_path} ({size} bytes) is cut off or damaged: {error}") from error
    try:
        fingerprints = {kind: Fingerprint.from_dict(recorded[kind]) for kind in ("audio", "text")}
        config = SteerMoEConfig.from_dict(settings)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where} is damaged, its {CONFIG_NAME} or {FINGERPRINTS_NAME} is not what was saved: {error}") from error
    return SavedModel(where, config, weights, fingerprints)


def _write_files(folder: Path, config: SteerMoEConfig, weights: Mapping[str, Tensor], fingerprints: Mapping[str, Fingerprint]) -> None:
    plain = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in weights.items()}
    save_file(plain, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    settings = SteerMoEConfig.from_dict(config.to_dict())
    settings.architectures = ["SteerMoEForConditionalGeneration"]
    settings.to_json_file(folder / CONFIG_NAME)
    recorded = {kind: fingerprint.to_dict() for kind, fingerprint in fingerprints.items()}
    (folder / FINGERPRINTS_NAME).write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    (folder / CARD_NAME).write_text(model_card(config, plain), encoding="utf-8")
    for path in [*folder.iterdir(), folder]:
        _to_disk(path)


def _put_in_place(staging: Path, target: Path) -> None:
    if not target.exists():
        os.rename(staging, target)
    elif not (target / WEIGHTS_NAME).exists() or not _can_be_moved(target):
        # Nothing to lose, and others may be writing here; the weights come last, without which it is no model.
        for name in (CARD_NAME, FINGERPRINTS_NAME, CONFIG_NAME, WEIGHTS_NAME):
            os.replace(staging / name, target / name)
        _to_disk(target)
    else:
        for path in target.iterdir():
            if not (staging / path.name).exists():
                _link(path, staging / path.name)
        aside = _aside(target)
        os.rename(target, aside)
        try:
            os.rename(staging, target)
        except OSError:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    _to_disk(target.parent)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def _put_back(target: Path) -> None:
    """Undo a save that was cut off between its two renames."""
    aside = _aside(target)
    if not aside.is_dir():
        return
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(aside, target)


def _can_be_moved(target: Path) -> bool:
    here = Path.cwd()
    return not (target.is_symlink() or os.path.ismount(target) or target == here or target in here.parents)


def _link(source: Path, copy: Path) -> None:
    """The same file, or folder of files, under a second name; a copy where the file system has no such thing."""

    def link_or_copy(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copy2(one, other)

    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, copy, symlinks=True, copy_function=link_or_copy)
    elif source.is_symlink():
        os.symlink(os.readlink(source), copy)
    else:
        link_or_copy(str(source), str(copy))


def _file(where: str, name: str, revision: str | None, hub: Mapping[str, Any]) -> str:
    taken = ("cache_dir", "force_download", "local_files_only", "proxies", "subfolder", "token")
    try:
        found = cached_file(where, name, revision=revision, **{key: hub[key] for key in taken if key in hub})
    except OSError as error:
        raise CheckpointError(f"{where} is no SteerMoE checkpoint, or an unfinished one: it has no {name}") from error
    if found is None:
        raise CheckpointError(f"{where} is no SteerMoE checkpoint, or an unfinished one: it has no {name}")
    return str(found)


def _json(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is cut off or damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds no mapping")
    return content


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
