"""What a router does with its experts: load, entropy and layer scales, over the valid frames of what was heard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["STATISTICS_NAME", "RouterCounts", "RouterStatistics", "append_statistics", "drop_statistics_after", "read_statistics"]

STATISTICS_NAME = "router_statistics.jsonl"  # in a run's folder


@dataclass(frozen=True)
class RouterStatistics:
    """Means over frames, a row a layer: CPU tensors in float64.

    ``load`` (L, E): mean gate of each expert, rows sum to the mean sum of gates, 1 for dense and renormalised routing. ``selected`` (L, E):
    share of frames in which the expert's gate is the largest. ``entropy`` (L,): of each frame's gates, in units of log E: 0 where one
    expert takes a frame whole, 1 where all share it alike. ``layer_scales`` (L,). ``frames``: how many were counted.
    """

    load: Tensor
    selected: Tensor
    entropy: Tensor
    layer_scales: Tensor
    frames: int

    def summary(self) -> dict[str, float]:
        """A few numbers for a log: mean entropy, the heaviest and the lightest load of any layer's expert, mean and largest scale."""
        return {
            "router_entropy": float(self.entropy.mean()),
            "router_max_load": float(self.load.max()),
            "router_min_load": float(self.load.min()),
            "layer_scale_mean": float(self.layer_scales.mean()),
            "layer_scale_max": float(self.layer_scales.abs().max()),
        }

    def scalars(self) -> dict[str, float]:
        """Every value by name, ``router_load/layer_03/expert_1`` and so on, as TensorBoard takes them."""
        named: dict[str, float] = {}
        for layer, loads in enumerate(self.load.tolist()):
            named[f"router_entropy/layer_{layer:02d}"] = float(self.entropy[layer])
            named[f"layer_scale/layer_{layer:02d}"] = float(self.layer_scales[layer])
            named |= {f"router_load/layer_{layer:02d}/expert_{expert}": load for expert, load in enumerate(loads)}
        return named

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "frames": self.frames,
            "load": self.load.tolist(),
            "selected": self.selected.tolist(),
            "entropy": self.entropy.tolist(),
            "layer_scales": self.layer_scales.tolist(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RouterStatistics:
        """The inverse of `to_dict`."""
        tensors = {name: torch.tensor(values[name], dtype=torch.float64) for name in ("load", "selected", "entropy", "layer_scales")}
        return cls(**tensors, frames=int(values["frames"]))


class RouterCounts:
    """Sums over frames, from which `RouterStatistics` are made; kept where the gates are, so that counting waits for no device."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (L, 2 E + 1): gates, selections, entropy
        self._frames: Tensor | None = None  # ()

    def add(self, gates: Mapping[int, Tensor], frame_mask: Tensor | None = None) -> None:
        """Count a pass: ``gates`` layer -> (clips, frames, E), as a model's output has them, ``frame_mask`` (clips, frames) or None.

        ValueError for gates of no layer and for a mask of another shape.
        """
        if not gates:
            raise ValueError("gates must have at least one layer, got none")
        shape = next(iter(gates.values())).shape
        if frame_mask is not None and frame_mask.shape != shape[:-1]:
            raise ValueError(f"frame_mask must be {tuple(shape[:-1])} as the gates are, got {tuple(frame_mask.shape)}")
        with torch.no_grad():
            sums = torch.stack([_sums(gates[layer], frame_mask) for layer in sorted(gates)])
            frames = frame_mask.sum() if frame_mask is not None else torch.tensor(math.prod(shape[:-1]), device=sums.device)
            self._sums = sums if self._sums is None else self._sums + sums
            self._frames = frames if self._frames is None else self._frames + frames

    def reset(self) -> None:
        """Forget what was counted."""
        self._sums = self._frames = None

    def statistics(self, layer_scales: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> RouterStatistics | None:
        """The means, None if nothing was counted. ``reduce`` sums a tensor over the processes of a distributed run."""
        if self._sums is None or self._frames is None:
            return None
        sums, frames = self._sums, self._frames
        if reduce is not None:
            sums, frames = reduce(sums), reduce(frames)
        # To the CPU first: not every device has float64.
        means = sums.cpu().double() / max(1, int(frames))
        num_experts = (means.shape[1] - 1) // 2
        return RouterStatistics(
            load=means[:, :num_experts],
            selected=means[:, num_experts:-1],
            entropy=means[:, -1] / math.log(num_experts) if num_experts > 1 else torch.zeros(len(means), dtype=torch.float64),
            layer_scales=layer_scales.detach().cpu().double(),
            frames=int(frames),
        )


def append_statistics(path: str | os.PathLike[str], step: int, statistics: RouterStatistics) -> None:
    """Add a line to a JSONL file: the statistics with their ``step``."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **statistics.to_dict()}) + "\n")


def read_statistics(path: str | os.PathLike[str]) -> list[tuple[int, RouterStatistics]]:
    """(step, statistics) of every line that `append_statistics` wrote; a last line that was cut off is left out."""
    entries = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            break
        entries.append((int(values["step"]), RouterStatistics.from_dict(values)))
    return entries


def drop_statistics_after(path: str | os.PathLike[str], step: int) -> None:
    """Take out what was written after ``step``: a run that is resumed there writes it again."""
    file = Path(path)
    if not file.exists():
        return
    kept = [entry for entry in read_statistics(file) if entry[0] <= step]
    partial = file.with_name(file.name + ".partial")
    partial.write_text("".join(json.dumps({"step": at, **values.to_dict()}) + "\n" for at, values in kept), encoding="utf-8")
    os.replace(partial, file)


def _sums(gates: Tensor, frame_mask: Tensor | None) -> Tensor:
    """(2 E + 1,): over valid frames, the sum of gates, the count of largest gates, the sum of entropies in nats."""
    num_experts = gates.shape[-1]
    valid = gates.detach().reshape(-1, num_experts) if frame_mask is None else gates.detach()[frame_mask]
    valid = valid.float()
    largest = torch.bincount(valid.argmax(dim=-1), minlength=num_experts)
    # Top-k gates that are not renormalised do not sum to 1: the entropy is that of the shares among the selected.
    shares = valid / valid.sum(dim=-1, keepdim=True)
    entropy = torch.special.entr(shares).sum()
    return torch.cat([valid.sum(dim=0), largest.float(), entropy[None]])
