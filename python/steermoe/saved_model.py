"""A model's folder on disk: the trained weights, the configs, the backbones' fingerprints and a card; whole or not there.

Everything is written into a new folder beside the one wanted, flushed, and put in place by renaming. Where a model is saved over an
earlier one, the earlier folder is moved aside for the moment between two renames, and `read` finds it there should that moment be its
last: a save that is cut off, by a crash or a full disk, leaves the previous model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import cached_file

from .config import SteerMoEConfig
from .fingerprint import Fingerprint
from .model_card import model_card
from .run_checkpoints import CONFIG_NAME, SEAL, CheckpointError, check_settings, to_disk

__all__ = ["SavedModel", "check_seal", "drop_stale_seal", "read", "read_weights", "write"]

WEIGHTS_NAME, FINGERPRINTS_NAME, CARD_NAME = "model.safetensors", "fingerprints.json", "README.md"
GENERATION_NAME = "generation_config.json"
PROCESSOR_NAME, TOKENIZER_NAME = "processor_config.json", "tokenizer.json"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "subfolder", "token")


@dataclass(frozen=True)
class SavedModel:
    """What `read` found: ``folder`` is what was asked for, ``fingerprints`` are by "audio" and "text".

    ``generation_config`` is None for a model that was saved without.
    """

    folder: str
    config: SteerMoEConfig
    weights: dict[str, Tensor]
    fingerprints: dict[str, Fingerprint]
    generation_config: GenerationConfig | None = None


def write(
    folder: str | os.PathLike[str],
    config: SteerMoEConfig,
    weights: Mapping[str, Tensor],
    fingerprints: Mapping[str, Fingerprint],
    generation_config: GenerationConfig | None = None,
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
        if generation_config is not None:
            # Without transformers' own checks, which refuse settings that it only warns of when they are used.
            generation_config.to_json_file(staging / GENERATION_NAME)
        for path in [*staging.iterdir(), staging]:
            to_disk(path)
        _put_in_place(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read(name: str | os.PathLike[str], *, revision: str | None = None, **hub: Any) -> SavedModel:
    """A saved model, from a folder or a hub's repository.

    CheckpointError, naming the file, if any of it is missing, cut off or damaged, is not what the seal of a training run's checkpoint
    says, or does not go with the processor beside it.
    """
    where = os.fspath(name)
    if os.path.isabs(where) or os.path.exists(where) or where.startswith("."):
        _put_back(Path(os.path.abspath(where)))
        if not os.path.isdir(where):
            raise CheckpointError(f"there is no checkpoint at {where}")
    config_path, weights_path = (_file(where, part, revision, hub) for part in (CONFIG_NAME, WEIGHTS_NAME))
    settings = _json(config_path)
    if settings.get("model_type") != SteerMoEConfig.model_type:
        raise CheckpointError(f"{config_path} is of a {settings.get('model_type')!r} model, not of a 'steermoe' one")
    fingerprints_path = _file(where, FINGERPRINTS_NAME, revision, hub)
    recorded = _json(fingerprints_path)
    weights = read_weights(weights_path)
    try:
        fingerprints = {kind: Fingerprint.from_dict(recorded[kind]) for kind in ("audio", "text")}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{fingerprints_path} is damaged, it is not what was saved: {error}") from error
    try:
        config = SteerMoEConfig.from_dict(settings)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{config_path} is damaged: {error}") from error
    check_seal(Path(config_path).parent, [CONFIG_NAME, FINGERPRINTS_NAME])
    _check_processor(Path(config_path), config)
    return SavedModel(where, config, weights, fingerprints, _generation_config(where, revision, hub))


def _generation_config(where: str, revision: str | None, hub: Mapping[str, Any]) -> GenerationConfig | None:
    try:
        path = _file(where, GENERATION_NAME, revision, hub)
    except CheckpointError:  # a model need not have one
        return None
    settings = _json(path)
    check_seal(Path(path).parent, [GENERATION_NAME])
    try:
        return GenerationConfig.from_dict(settings)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The trained weights in ``path``, by name. CheckpointError if they are cut off, damaged or not what the seal beside them says."""
    try:
        weights = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        size = os.path.getsize(path) if os.path.exists(path) else 0
        raise CheckpointError(f"{path} ({size} bytes) is cut off or damaged: {error}") from error
    check_seal(Path(path).parent, [Path(path).name])
    return weights


def check_seal(folder: Path, names: Iterable[str]) -> None:
    """CheckpointError, naming the file, for one of ``names`` in ``folder`` that is not what the seal there says, if there is a seal.

    Of a model's config the settings count, where the seal has them, and not what may be changed.
    """
    if not (folder / SEAL).is_file():
        return
    content = _json(str(folder / SEAL))
    sealed = content.get("files")
    if not isinstance(sealed, dict):
        raise CheckpointError(f"{folder / SEAL} is damaged: it lists no files")
    for name in names:
        path, entry = folder / name, sealed.get(name)
        if entry is None:
            continue
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, and {SEAL} beside it lists it")
        if name == CONFIG_NAME:
            if (settings := content.get("settings")) is not None:  # else made before settings were sealed
                check_settings(path, settings)
        elif not isinstance(entry, dict) or hashlib.sha256(path.read_bytes()).hexdigest() != entry.get("sha256"):
            raise CheckpointError(f"{path} is damaged or was changed: its SHA-256 is not the one in {SEAL} beside it")


def drop_stale_seal(folder: Path, names: Iterable[str]) -> None:
    """Remove the seal of ``folder`` if ``names`` have been saved anew there, and are no longer what it says."""
    try:
        check_seal(folder, names)
    except CheckpointError:
        (folder / SEAL).unlink()


def _check_processor(config_path: Path, config: SteerMoEConfig) -> None:
    """CheckpointError where the processor in the same folder makes other audio tokens, or another number of them, than the model."""
    tokenizer = config_path.with_name(TOKENIZER_NAME)
    if tokenizer.is_file() and isinstance(tokens := _json(str(tokenizer)).get("added_tokens"), list):
        ids = {token.get("content"): token.get("id") for token in tokens if isinstance(token, dict)}
        mine, known = config.audio_token_id, ids.get(config.audio_token, config.audio_token_id)
        if known != mine:
            raise CheckpointError(
                f"{config_path} says audio_token_id {mine}, and {tokenizer.name} beside it {known}: one of them was altered"
            )
    beside = config_path.with_name(PROCESSOR_NAME)
    if not beside.is_file():
        return
    saved = _json(str(beside))
    for key in ("pool_size", "audio_padding"):
        if key in saved and saved[key] != getattr(config, key):
            raise CheckpointError(
                f"{config_path} says {key} {getattr(config, key)!r}, and {beside.name} beside it {saved[key]!r}: one of them was altered"
            )


def _write_files(folder: Path, config: SteerMoEConfig, weights: Mapping[str, Tensor], fingerprints: Mapping[str, Fingerprint]) -> None:
    plain = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in weights.items()}
    save_file(plain, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    settings = SteerMoEConfig.from_dict(config.to_dict())
    settings.architectures = ["SteerMoEForConditionalGeneration"]
    settings.to_json_file(folder / CONFIG_NAME)
    recorded = {kind: fingerprint.to_dict() for kind, fingerprint in fingerprints.items()}
    (folder / FINGERPRINTS_NAME).write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    (folder / CARD_NAME).write_text(model_card(config, plain), encoding="utf-8")


def _put_in_place(staging: Path, target: Path) -> None:
    if not target.exists():
        os.rename(staging, target)
    elif not (target / WEIGHTS_NAME).exists() or not _can_be_moved(target):
        # Nothing to lose, and others may be writing here; the weights come last, without which it is no model.
        (target / SEAL).unlink(missing_ok=True)
        for name in (CARD_NAME, GENERATION_NAME, FINGERPRINTS_NAME, CONFIG_NAME, WEIGHTS_NAME):
            if (staging / name).exists():
                os.replace(staging / name, target / name)
        to_disk(target)
    else:
        for path in target.iterdir():
            if not (staging / path.name).exists():
                _link(path, staging / path.name)
        drop_stale_seal(staging, (WEIGHTS_NAME, CONFIG_NAME, FINGERPRINTS_NAME, GENERATION_NAME))
        aside = _aside(target)
        os.rename(target, aside)
        try:
            os.rename(staging, target)
        except OSError:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    to_disk(target.parent)


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
    try:
        found = cached_file(where, name, revision=revision, **{key: hub[key] for key in HUB_ARGUMENTS if key in hub})
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
