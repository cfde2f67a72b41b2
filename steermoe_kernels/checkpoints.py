"""Checkpoints: which of their keys are the aligner's, which sizes they tell, and what does not fit.

The public implementation saves the aligner among the backbones' own weights, in ``pytorch_model.bin``, as
``{whisper_encoder|conformer_encoder}.{steering_vectors, layer_scales, router.weight, router.bias}`` and ``prompt_proj.{weight, bias}``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["aligner_state", "check_fits", "read", "sizes"]

_STEERING = ("steering_vectors", "layer_scales", "router.weight", "router.bias")
_PROJECTION = ("prompt_proj.weight", "prompt_proj.bias")
_PUBLIC_PREFIXES = ("whisper_encoder.", "conformer_encoder.")


def read(checkpoint: str | os.PathLike[str] | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state dict from a ``.bin``/``.pt`` file (weights only), a ``.safetensors`` file, or a folder holding one of either name.

    OSError where there is none, RuntimeError for a file that is something else.
    """
    if isinstance(checkpoint, Mapping):
        return checkpoint
    path = os.fspath(checkpoint)
    if os.path.isdir(path):
        names = ("model.safetensors", "pytorch_model.bin")
        found = [os.path.join(path, name) for name in names if os.path.isfile(os.path.join(path, name))]
        if not found:
            raise FileNotFoundError(f"{path} holds neither {' nor '.join(names)}")
        path = found[0]
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ImportError):
        raise
    except Exception as error:  # of a damaged file torch says that a list index is out of range
        raise RuntimeError(f"{path} cannot be read as a checkpoint: {error}") from error
    if not isinstance(state, Mapping):
        raise RuntimeError(f"{path} must hold a state dict, it holds a {type(state).__name__}")
    return state


def aligner_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The aligner's part of a checkpoint, under our names. A state dict that holds nothing of the public layout is returned as it is."""
    prefixes = [prefix for prefix in _PUBLIC_PREFIXES if any(prefix + key in state for key in _STEERING)]
    if len(prefixes) > 1:
        raise RuntimeError(f"the checkpoint holds more than one aligner, under {' and '.join(prefixes)}: keep one of them")
    if prefixes:
        found = {key: state[prefixes[0] + key] for key in _STEERING if prefixes[0] + key in state}
        return found | {key: state[key] for key in _PROJECTION if key in state}
    return dict(state)


def sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """The constructor's sizes, read off an aligner's state. RuntimeError naming the keys that are missing."""
    if missing := [key for key in _STEERING if key not in state]:
        raise RuntimeError(f"the checkpoint holds no aligner: missing {', '.join(missing)}")
    vectors = state["steering_vectors"]
    if not isinstance(vectors, Tensor) or vectors.dim() != 3:
        raise RuntimeError(f"steering_vectors must be (layers, experts, width), the checkpoint's is {_form(vectors)}")
    num_layers, num_experts, feature_dim = vectors.shape
    found = {"feature_dim": feature_dim, "num_experts": num_experts, "num_layers": num_layers}
    if "prompt_proj.weight" in state:
        projection = state["prompt_proj.weight"]
        if not isinstance(projection, Tensor) or projection.dim() != 2:
            raise RuntimeError(f"prompt_proj.weight must be (output_dim, width), the checkpoint's is {_form(projection)}")
        found["output_dim"] = projection.shape[0]
    return found


def check_fits(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """RuntimeError, naming every key that is missing, unknown or of another shape, if ``state`` does not fit ``own``."""
    faults = [f"missing {key} {tuple(tensor.shape)}" for key, tensor in own.items() if key not in state]
    faults += [f"unknown {key}" for key in state if key not in own]
    faults += [
        f"{key} must be {tuple(own[key].shape)}, the checkpoint's is {_form(tensor)}"
        for key, tensor in state.items()
        if key in own and not (isinstance(tensor, Tensor) and tensor.shape == own[key].shape)
    ]
    if faults:
        raise RuntimeError("the checkpoint does not fit this aligner, nothing was loaded: " + "; ".join(faults))


def _form(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"no tensor but a {type(value).__name__}"
