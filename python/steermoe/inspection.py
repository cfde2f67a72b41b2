"""What a trained aligner is made of: parameters by part, how its experts were used in training, how far each layer steers."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .run_checkpoints import CONFIG_NAME, SEAL, verify
from .saved_model import WEIGHTS_NAME
from .statistics import STATISTICS_NAME, RouterStatistics, read_statistics

__all__ = ["Inspection", "inspect"]

PARTS = {
    "steering vectors": "steering_vectors",
    "router": "router.",
    "layer scales": "layer_scales",
    "projection": "prompt_proj.",
}
"""The parts of an aligner, with what their parameters' names hold."""


@dataclass(frozen=True)
class Inspection:
    """``parameters`` by part; ``vector_norms`` (L, E), ``layer_scales`` (L,); ``usage`` as logged last, or None."""

    name: str
    backbones: dict[str, str]
    parameters: dict[str, int]
    layer_scales: Tensor
    vector_norms: Tensor
    usage: RouterStatistics | None

    @property
    def total(self) -> int:
        return sum(self.parameters.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "name": self.name,
            "backbones": self.backbones,
            "parameters": self.parameters | {"total": self.total},
            "layer_scales": self.layer_scales.tolist(),
            "vector_norms": self.vector_norms.tolist(),
            "usage": self.usage.to_dict() if self.usage else None,
        }

    def __rich__(self) -> RenderableType:
        sizes = Table("part", "parameters", "share", title=Text(self.name), title_justify="left")
        for part, count in self.parameters.items():
            sizes.add_row(part, f"{count:,}", f"{count / self.total:.1%}")
        sizes.add_row("all", f"{self.total:,}", "")
        for what, backbone in self.backbones.items():
            sizes.add_row(what, Text(backbone), "frozen")
        experts = self.vector_norms.shape[1]
        load = [f"load {expert}" for expert in range(experts)] if self.usage else []
        layers = Table("layer", "scale", "norm of its vectors", *(["entropy"] if self.usage else []), *load)
        for layer, scale in enumerate(self.layer_scales.tolist()):
            norms = self.vector_norms[layer]
            row = [str(layer), f"{scale:.4f}", f"{norms.min():.3f} to {norms.max():.3f}"]
            if self.usage:
                row += [f"{self.usage.entropy[layer]:.2f}", *(f"{share:.2f}" for share in self.usage.load[layer].tolist())]
            layers.add_row(*row)
        note = "" if self.usage else "expert usage: no router statistics up to here, training writes them every training.logging_steps"
        return Group(sizes, layers, note)

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Save a PNG: expert usage by layer, or the vectors' norms where there is no usage, and the layer scales."""
        from matplotlib.figure import Figure

        layers, experts = self.vector_norms.shape
        figure = Figure(figsize=(4 + 0.35 * experts, 1.5 + 0.3 * max(layers, 6)), layout="constrained")
        heat, scales = figure.subplots(1, 2, width_ratios=[2, 1])
        shown, title = (self.usage.load, "load by expert") if self.usage else (self.vector_norms, "norm of the steering vectors")
        image = heat.imshow(shown.float().numpy(), aspect="auto", cmap="viridis", vmin=0)
        heat.set(xlabel="expert", ylabel="layer", title=title, xticks=range(experts) if experts <= 16 else [], yticks=range(layers))
        figure.colorbar(image, ax=heat)
        scales.barh(range(layers), self.layer_scales.tolist())
        scales.invert_yaxis()
        scales.set(xlabel="layer scale", yticks=[])
        figure.savefig(path, dpi=110)


def inspect(checkpoint: str | os.PathLike[str]) -> Inspection:
    """Read a checkpoint's trained weights and, from the run's folder around it, the router statistics up to its step.

    FileNotFoundError for a folder without trained weights; ValueError for a file that is damaged or of another model; CheckpointError,
    naming the file, for a checkpoint of a training run of which a file is not what was written.
    """
    folder = Path(checkpoint)
    file = folder / WEIGHTS_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint of an aligner: it has no {WEIGHTS_NAME}")
    if (folder / SEAL).is_file():  # models saved outside a run have none
        verify(folder)
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    parts = {part: {name: tensor for name, tensor in weights.items() if mark in name} for part, mark in PARTS.items()}
    if not parts["steering vectors"] or not parts["layer scales"]:
        raise ValueError(f"{file} holds no steering vectors and layer scales: it is not an aligner's")
    (vectors,), (scales,) = parts["steering vectors"].values(), parts["layer scales"].values()
    return Inspection(
        name=folder.name,
        backbones=_backbones(folder),
        parameters={part: sum(tensor.numel() for tensor in tensors.values()) for part, tensors in parts.items()},
        layer_scales=scales.float(),
        vector_norms=torch.linalg.vector_norm(vectors.float(), dim=-1),
        usage=_usage(folder),
    )


def _backbones(folder: Path) -> dict[str, str]:
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {what: str(config[key]) for what, key in (("audio encoder", "audio_model"), ("language model", "text_model")) if config.get(key)}


def _usage(folder: Path) -> RouterStatistics | None:
    """The latest statistics up to the checkpoint's step; the latest of all for a folder that is not named after a step."""
    step = folder.name.removeprefix("checkpoint-")
    for place in (folder, folder.parent):
        if (place / STATISTICS_NAME).is_file():
            found = [usage for at, usage in read_statistics(place / STATISTICS_NAME) if not step.isdigit() or at <= int(step)]
            return found[-1] if found else None
    return None
