"""Runs small enough for a test: a corpus of tones, a configuration, and what two logs have to have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from transformers import TrainerCallback

from steermoe.training_config import TrainingConfig

TEXTS = ("one", "two", "three four", "five six seven eight", "nine ten one two", "yes", "no", "seven")
RATE = 16000
# What a log holds that no two runs share: the clock's.
CLOCK = ("real_time_factor", "runtime", "per_second", "train_")


def corpus(folder: Path, clips: int = 8, name: str = "clips.jsonl", texts: tuple[str, ...] = TEXTS) -> Path:
    """A manifest of tones, each text of its own pitch and each clip of its own length, 0.3 to 1.2 s."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(clips):
        seconds = 0.3 + 0.9 * ((7 * index) % clips) / clips
        time = np.arange(round(seconds * RATE)) / RATE
        pitch = 200 + 300 * (index % len(texts))
        soundfile.write(folder / f"{index}.wav", (0.3 * np.sin(2 * np.pi * pitch * time) * (1 + 0.3 * np.sin(9 * time))).astype("f4"), RATE)
        rows.append({"audio_filepath": f"{index}.wav", "text": texts[index % len(texts)]})
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def configuration(
    backbones: tuple[Path, Path],
    train: Path,
    output: Path,
    *,
    eval: Path | None = None,
    model: dict[str, Any] | None = None,
    **training: Any,
) -> TrainingConfig:
    """A configuration of the tiny backbones, an encoder's and a language model's folder; ``training`` changes that section."""
    return TrainingConfig.from_dict(
        {
            "model": {
                "audio_model": str(backbones[0]),
                "text_model": str(backbones[1]),
                "num_experts": 4,
                "pool_size": 4,
                **(model or {}),
            },
            "data": {"train": str(train), "eval": None if eval is None else str(eval), "max_new_tokens": 8},
            "training": {
                "output_dir": str(output),
                "batch_size": 2,
                "max_steps": 8,
                "logging_steps": 2,
                "save_steps": 100,
                "eval_steps": 100,
                "projection_learning_rate": 1e-2,
                "tensorboard": False,
                "progress": False,
                **training,
            },
        }
    )


def curve(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A run's log without what the clock put there."""
    entries = [{key: value for key, value in entry.items() if not any(part in key for part in CLOCK)} for entry in history]
    return [entry for entry in entries if entry.keys() - {"step", "epoch", "total_flos"}]


class Spy(TrainerCallback):
    """Keeps, of every optimizer step: gradients as they were applied, rates of the optimizer's groups."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.rates: list[dict[str, float]] = []
        self.norms: list[float] = []
        self.optimizer: Any = None
        self.modes: set[tuple[bool, bool]] = set()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        bare = getattr(model, "module", model)
        grads = {name: parameter.grad for name, parameter in bare.trained_parameters().items()}
        self.gradients.append({name: grad.clone() for name, grad in grads.items() if grad is not None})
        self.norms.append(float(torch.stack([grad.norm() for grad in self.gradients[-1].values()]).norm()))
        self.rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})
        self.optimizer = optimizer
        modules = [*bare.encoder.modules(), *bare.language_model.modules()]
        self.modes.add((bare.training, any(module.training for module in modules if module is not bare.aligner)))
