"""What a training run is: a YAML file of three sections, read into dataclasses, with every mistake named.

``model`` says which backbones are joined and by what aligner, ``data`` what is learnt from and scored on, ``training`` how. Values may be
overridden one by one, ``training.max_steps=100``; the value is YAML too. ``configs/reference.yaml`` has every key with its default.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from transformers.trainer_utils import SchedulerType

from .config import PADDINGS, POOLS, given_counts
from .error_rates import language_code
from .evaluation import TASKS
from .suggestions import did_you_mean

__all__ = ["DataConfig", "ModelConfig", "TrainingConfig", "TrainingSection", "load_config", "shipped_configs"]

TRAINING_CONFIG_NAME = "training_config.yaml"  # in a run's folder and its checkpoints
CONFIG_FOLDER = Path(__file__).parent / "configs"
DTYPES = ("float32", "bfloat16", "float16")
LARGEST_SEED = 2**32 - 1  # NumPy's
# Schedules that need nothing but the number of steps and of warm-up steps.
SCHEDULES = tuple(
    kind.value for kind in (SchedulerType.LINEAR, SchedulerType.COSINE, SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)
)

Section = TypeVar("Section")


@dataclass
class ModelConfig:
    """The backbones, by hub id or path, and the aligner between them.

    ``audio_model`` and ``text_model`` may also be ``shipped``: the small backbones inside this package. ``dtype`` is the backbones'; the
    aligner is always float32. ``pool`` None hands every frame to the language model; ``top_k`` None routes densely. ``frame_counts`` is a
    mapping of `FrameCounts`' fields, for encoders of families that `FrameCounts.of` does not know.
    """

    audio_model: str
    text_model: str
    audio_revision: str | None = None
    text_revision: str | None = None
    num_experts: int = 8
    top_k: int | None = None
    renormalize: bool = True
    steering_scale: float = 0.1
    pool: str | None = "max"
    pool_size: int = 4
    backend: str = "auto"
    audio_padding: str = "longest"
    frame_counts: Any = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("audio_model", "text_model"):
            _require(getattr(self, name) != "", f"model.{name}", "a hub id, a folder or 'shipped'", getattr(self, name))
        _at_least("model", self, 1, "num_experts", "top_k", "pool_size")
        _require(
            self.top_k is None or self.top_k <= self.num_experts, "model.top_k", f"at most num_experts ({self.num_experts})", self.top_k
        )
        _finite("model.steering_scale", self.steering_scale)
        _one_of("model.pool", self.pool, POOLS)
        _one_of("model.audio_padding", self.audio_padding, PADDINGS)
        if self.frame_counts is not None:
            try:
                given_counts(self.frame_counts)
            except ValueError as error:
                raise ValueError(f"model.{error}") from None
        _one_of("model.dtype", self.dtype, DTYPES)


@dataclass
class DataConfig:
    """The corpora, as `steermoe.data.load` takes them: a path, a mapping, or a list of those.

    ``eval`` None trains without scoring. ``task`` "question" scores exact match instead of error rates; None is told from the rows.
    ``prompt`` is what the user turn says for rows without their own. Rows longer than ``max_seconds`` are left out, as bad rows; more than
    ``max_bad_rows`` of these stop the run. ``num_workers`` processes decode audio, in each process that trains.
    """

    train: Any
    eval: Any = None
    prompt: str | None = None
    task: str | None = None
    language: str = "en"
    normalization: str | None = None
    max_seconds: float | None = None
    max_bad_rows: int = 100
    num_workers: int = 0
    eval_batch_size: int = 8
    max_new_tokens: int = 448

    def __post_init__(self) -> None:
        _one_of("data.task", self.task, (*TASKS, None))
        try:
            language_code(self.language)
        except ValueError as error:
            raise ValueError(f"data.{error}") from None
        _at_least("data", self, 0, "max_bad_rows", "num_workers")
        _at_least("data", self, 1, "eval_batch_size", "max_new_tokens")
        for name in ("train", "eval"):
            spec = getattr(self, name)
            fits = _is_corpus(spec) or (spec is None and name == "eval")
            _require(fits, f"data.{name}", "a path, a mapping with 'path', or a list of those", spec)
        most = self.max_seconds
        _require(most is None or 0 < most < math.inf, "data.max_seconds", "more than 0 seconds, or null", most)


@dataclass
class TrainingSection:
    """How the aligner is trained.

    ``batch_size`` clips a process and pass, ``accumulation_steps`` passes an optimizer step. Three learning rates, one a group of
    parameters: the steering vectors with the layer scales, the router, the projection. A rate of 0 freezes its group; projection alone is
    ``model.steering_scale: 0`` with the other two at 0. ``warmup_steps`` below 1 is a fraction of all steps. ``max_steps`` None: as many as
    ``epochs`` take. ``max_grad_norm`` 0 does not clip. ``bf16`` runs matrix products in bfloat16 by autocast, also over float32 backbones.

    Every ``eval_steps`` (None: once an epoch) the eval corpus is scored; the best score so far is kept as a checkpoint whatever
    ``save_total_limit`` says, and ``early_stopping_patience`` evaluations without a better one end the run. ``load_balancing_weight`` and
    ``z_loss_weight`` add the router's losses of `steermoe.router_losses`.
    """

    output_dir: str
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 8
    accumulation_steps: int = 1
    steering_learning_rate: float = 1e-2
    router_learning_rate: float = 1e-3
    projection_learning_rate: float = 1e-4
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup_steps: float = 0.05
    max_grad_norm: float = 1.0
    bf16: bool = False
    seed: int = 0
    logging_steps: int = 10
    eval_steps: int | None = None
    save_steps: int = 500
    save_total_limit: int | None = 2
    early_stopping_patience: int | None = None
    load_balancing_weight: float = 0.0
    z_loss_weight: float = 0.0
    tensorboard: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        _require(_may_be_folder(self.output_dir), "training.output_dir", "a folder", self.output_dir)
        counts = ("max_steps", "batch_size", "accumulation_steps", "logging_steps", "eval_steps", "save_steps", "save_total_limit")
        _at_least("training", self, 1, *counts, "early_stopping_patience")
        rates = ("steering_learning_rate", "router_learning_rate", "projection_learning_rate")
        others = ("weight_decay", "warmup_steps", "max_grad_norm", "load_balancing_weight", "z_loss_weight", "seed")
        _at_least("training", self, 0, *rates, *others)
        _require(0 < self.epochs < math.inf, "training.epochs", "a finite number above 0", self.epochs)
        _require(self.seed <= LARGEST_SEED, "training.seed", f"at most {LARGEST_SEED}", self.seed)
        _require(
            self.warmup_steps < 1 or self.warmup_steps == int(self.warmup_steps),
            "training.warmup_steps",
            "a whole number of steps, or a fraction of all steps below 1",
            self.warmup_steps,
        )
        _one_of("training.schedule", self.schedule, SCHEDULES)
        if not any(getattr(self, name) for name in rates):
            raise ValueError(f"nothing would be trained: {', '.join(f'training.{name}' for name in rates)} are all 0")
        if self.router_learning_rate == 0:
            for name in ("load_balancing_weight", "z_loss_weight"):
                _require(getattr(self, name) == 0, f"training.{name}", "0 where training.router_learning_rate is 0", getattr(self, name))


@dataclass
class TrainingConfig:
    """A training run, as in the file: the sections ``model``, ``data`` and ``training``."""

    model: ModelConfig
    data: DataConfig
    training: TrainingSection

    def __post_init__(self) -> None:
        patience = self.training.early_stopping_patience
        _require(patience is None or self.data.eval is not None, "training.early_stopping_patience", "null without data.eval", patience)
        # Autocast would round float16's weights to bfloat16, and leave all but matrix products in float16.
        fits = not self.training.bf16 or self.model.dtype != "float16"
        _require(fits, "training.bf16", "false where model.dtype is float16 (bfloat16 and float32 go with it)", self.training.bf16)

    @classmethod
    def from_dict(cls, sections: Mapping[str, Any]) -> TrainingConfig:
        """The configuration of nested dicts. ValueError, with the key's dotted name, for unknown, missing, mistyped and impossible ones."""
        known = {"model": ModelConfig, "data": DataConfig, "training": TrainingSection}
        for name, section in sections.items():
            if name not in known:
                where = [key for key, kind in known.items() if name in _fields(kind)]
                hint = f" (it belongs into the section {where[0]!r})" if where else did_you_mean(name, known)
                raise ValueError(f"unknown section {name!r}; a configuration has {', '.join(known)}{hint}")
            if not isinstance(section, Mapping):
                raise ValueError(f"{name} must be a section with keys of its own, got {section!r}")
        return cls(
            _section(ModelConfig, "model", sections.get("model", {})),
            _section(DataConfig, "data", sections.get("data", {})),
            _section(TrainingSection, "training", sections.get("training", {})),
        )

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of plain YAML types; `from_dict` of them is this configuration."""
        return _plain(dataclasses.asdict(self))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the configuration as YAML."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")

    def differences(self, other: TrainingConfig) -> dict[str, tuple[Any, Any]]:
        """Dotted key -> (this value, the other's) of every value that differs."""
        mine, others = self.to_dict(), other.to_dict()
        return {
            f"{name}.{key}": (mine[name][key], others[name][key])
            for name in mine
            for key in mine[name]
            if mine[name][key] != others[name][key]
        }


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainingConfig:
    """The configuration of a YAML file, or of one shipped with this package by its name, with ``overrides`` like ``training.seed=1``.

    FileNotFoundError if there is no such file or shipped name; ValueError for what is not YAML, and for unknown keys (with the nearest
    known one), missing ones, wrong types and impossible values, by dotted name.
    """
    file = _find(path)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no YAML file in UTF-8: its byte {error.start} cannot be decoded") from None
    sections = _read_yaml(text, str(file))
    if not isinstance(sections, dict):
        raise ValueError(f"{file} must hold the sections model, data and training, got {_shown(sections)}")
    for override in overrides:
        _override(sections, override)
    try:
        return TrainingConfig.from_dict(sections)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def shipped_configs() -> list[str]:
    """The names of the configurations in this package, which `load_config` takes in place of a path."""
    return sorted(file.stem for file in CONFIG_FOLDER.glob("*.yaml"))


def _find(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if file.is_file():
        return file
    shipped = CONFIG_FOLDER / f"{path}.yaml"
    if file.name == str(path) and shipped.is_file():
        return shipped
    what = "a folder, not a YAML file" if file.is_dir() else "not there"
    raise FileNotFoundError(f"{path} is {what}; the configurations shipped by name are {', '.join(shipped_configs())}")


class _StrictLoader(yaml.SafeLoader):
    """YAML in which the second of two equal keys does not silently win."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode | None:
        # As written: when values are made of it, the keys that a merge (<<) brings along are there as well, and may come twice.
        node: yaml.MappingNode | None = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value if node is not None else ():
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(None, None, f"the key {key.value!r} comes twice", key.start_mark)
            seen.add((key.tag, key.value))
        return node


def _read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"{where}{line} is not valid YAML: {problem}") from None
    except (ValueError, RecursionError) as error:  # a date that is none, brackets a thousand deep
        raise ValueError(f"{where} is not valid YAML: {error}") from None


def _override(sections: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ValueError(f"an override must be like training.max_steps=100, got {override!r}")
    parsed = _read_yaml(value, f"the value of {key}")
    at: Any = sections
    for depth, part in enumerate(parts[:-1]):
        if at.get(part) is None:
            at[part] = {}
        at = at[part]
        if not isinstance(at, dict):
            raise ValueError(f"{override!r} cannot be set: {'.'.join(parts[: depth + 1])} is {_shown(at)}, which has no keys")
    at[parts[-1]] = parsed


def _section(kind: type[Section], name: str, values: Mapping[str, Any]) -> Section:
    known = _fields(kind)
    for key in values:
        if key not in known:
            raise ValueError(f"unknown key {name}.{key}{did_you_mean(key, known)}; {name} has {', '.join(known)}")
    missing = [key for key, described in known.items() if key not in values and described.default is dataclasses.MISSING]
    if missing:
        raise ValueError(f"missing {', '.join(f'{name}.{key}' for key in missing)}")
    hints = get_type_hints(kind)
    return kind(**{key: _typed(f"{name}.{key}", value, hints[key]) for key, value in values.items()})


def _fields(kind: Any) -> dict[str, dataclasses.Field[Any]]:
    return {described.name: described for described in dataclasses.fields(kind)}


def _typed(key: str, value: Any, hint: Any) -> Any:
    """``value`` as the type of its field: an int is a float too, and so is 1e-3, which YAML 1.1 takes for a text."""
    if hint is Any:
        return value
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in choices:
        return None
    if float in choices and not isinstance(value, bool):
        if isinstance(value, int | float):
            try:
                return float(value)
            except OverflowError:
                return math.inf if value > 0 else -math.inf
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
    if int in choices and isinstance(value, float) and value.is_integer():
        return int(value)
    if any(type(value) is choice for choice in choices):
        return value
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    raise ValueError(f"{key} must be {' or '.join(names[choice] for choice in choices)}, got {_shown(value)}")


def _is_corpus(spec: Any) -> bool:
    """Whether `steermoe.data.load` could take this, by its form."""
    if isinstance(spec, Mapping):
        return isinstance(spec.get("path"), str | os.PathLike)
    if isinstance(spec, list | tuple):
        return bool(spec) and all(map(_is_corpus, spec))
    return isinstance(spec, str | os.PathLike) and spec != ""


def _may_be_folder(path: str) -> bool:
    """Whether this is a folder or could be made one: the nearest part of the path that is there must be a folder."""
    there = next((part for part in (Path(path), *Path(path).parents) if part.exists()), None)
    return path != "" and (there is None or there.is_dir())


def _require(condition: bool, key: str, would_do: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"{key} must be {would_do}, got {_shown(value)}")


def _one_of(key: str, value: Any, choices: Sequence[Any]) -> None:
    shown = ", ".join("null" if choice is None else str(choice) for choice in choices)
    _require(value in choices, key, f"one of {shown}", value)


def _at_least(section: str, config: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None:
            _require(least <= value < math.inf, f"{section}.{name}", f"at least {least}", value)


def _finite(key: str, value: float) -> None:
    _require(math.isfinite(value), key, "a finite number", value)


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value!r} ({type(value).__name__})"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value
