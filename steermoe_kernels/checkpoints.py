"""Checkpoints: which of their keys are the aligner's, which sizes they tell, and what does not fit.

The public implementation saves the aligner among the backbones' own weights, in ``pytorch_model.bin``, as
``{whisper_encoder|conformer_encoder}.{steering_vectors, layer_scales, router.weight, router.bias}`` and ``prompt_proj.{weight, bias}``.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from .checks import not_dense

__all__ = ["aligner_state", "check_fits", "read", "sizes"]

_STEERING = ("steering_vectors", "layer_scales", "router.weight", "router.bias")
_PROJECTION = ("prompt_proj.weight", "prompt_proj.bias")
_PUBLIC_PREFIXES = ("whisper_encoder.", "conformer_encoder.")


def read(checkpoint: str | os.PathLike[str] | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state dict from a ``.bin``/``.pt`` file (weights only), a ``.safetensors`` file, or a folder holding one of either name.

    OSError where there is none, RuntimeError for a file that is something else, TypeError for what is neither path nor state dict.
    """
    if isinstance(checkpoint, Mapping):
        return checkpoint
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise TypeError(f"checkpoint must be a path or a state dict, got {type(checkpoint).__name__}")
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
        raise RuntimeError(f"{path} cannot be read as a checkpoint: {type(error).__name__}: {error}") from error
    if not isinstance(state, Mapping):
        raise RuntimeError(f"{path} must hold a state dict, it holds a {type(state).__name__}")
    return state


def aligner_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The aligner's part of a checkpoint, under our names. A state dict that holds nothing of the public layout is returned as it is.

    TypeError for anything but a mapping, RuntimeError for more than one aligner.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state_dict must be a mapping of names to tensors, got {type(state).__name__}")
    prefixes = [prefix for prefix in _PUBLIC_PREFIXES if any(prefix + key in state for key in _STEERING)]
    if len(prefixes) > 1:
        raise RuntimeError(f"the checkpoint holds more than one aligner, under {' and '.join(prefixes)}: keep one of them")
    if prefixes:
        found = {key: state[prefixes[0] + key] for key in _STEERING if prefixes[0] + key in state}
        return found | {key: state[key] for key in _PROJECTION if key in state}
    return dict(state)


def sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """The constructor's sizes, read off an aligner's state. RuntimeError naming every key that is missing or cannot be an aligner's."""
    vectors, projection = state.get("steering_vectors"), state.get("prompt_proj.weight")
    shapes: dict[str, tuple[int | str, ...]] = {"steering_vectors": ("layers", "experts", "width")}
    found: dict[str, int] = {}
    if isinstance(vectors, Tensor) and vectors.dim() == 3 and vectors.numel() > 0:
        shapes["steering_vectors"] = tuple(vectors.shape)
        found = dict(zip(("num_layers", "num_experts", "feature_dim"), vectors.shape, strict=True))
    num_layers, _, width = shapes["steering_vectors"]
    logits = found["num_layers"] * found["num_experts"] if found else "layers * experts"
    shapes |= {"layer_scales": (num_layers,), "router.weight": (logits, width), "router.bias": (logits,)}
    if any(key in state for key in _PROJECTION):
        output_dim: int | str = "output_dim"
        if isinstance(projection, Tensor) and projection.dim() == 2 and projection.shape[0] > 0:
            output_dim = found["output_dim"] = projection.shape[0]
        shapes |= {"prompt_proj.weight": (output_dim, width), "prompt_proj.bias": (output_dim,)}
    if faults := _faults(state, shapes):
        raise RuntimeError("the checkpoint holds no aligner that can be loaded: " + "; ".join(faults))
    return found


def check_fits(state: Mapping[str, Tensor], own: Mapping[str, Tensor], assign: bool = False) -> None:
    """RuntimeError, naming every key that is missing, unknown or of another form, if ``state`` cannot be copied to ``own``.

    With ``assign`` it may hold meta tensors, which take the others' places.
    """
    faults = _faults(state, {key: tuple(tensor.shape) for key, tensor in own.items()}, {key for key in own if assign or own[key].is_meta})
    faults += [f"unknown {key}" for key in state if key not in own]
    if faults:
        raise RuntimeError("the checkpoint does not fit this aligner, nothing was loaded: " + "; ".join(faults))


def _faults(state: Mapping[str, Any], shapes: Mapping[str, tuple[int | str, ...]], without_data: Collection[str] = ()) -> list[str]:
    """What keeps ``state`` from holding numbers of these shapes; a size that is a name may be any but zero."""
    faults = [f"missing {key} {_written(shape)}" for key, shape in shapes.items() if key not in state]
    for key, shape in shapes.items():
        if key not in state:
            continue
        value = state[key]
        if _has_shape(value, shape) and _kind(value) in (("", "meta") if key in without_data else ("",)):
            continue
        faults.append(f"{key} must be {_written(shape)}, the checkpoint's is {_form(value)}")
    return faults


def _has_shape(value: Any, shape: tuple[int | str, ...]) -> bool:
    if not isinstance(value, Tensor) or value.dim() != len(shape):
        return False
    return all(have > 0 if isinstance(want, str) else have == want for have, want in zip(value.shape, shape, strict=True))


def _kind(tensor: Tensor) -> str:
    """What keeps a tensor's numbers from being copied into a parameter, "" if nothing does."""
    if kind := not_dense(tensor):
        return kind
    kinds = {"quantized": tensor.is_quantized, "complex": tensor.is_complex(), "meta": tensor.is_meta}
    return next((kind for kind, found in kinds.items() if found), "")


def _form(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"no tensor but a {type(value).__name__}"
    return " ".join(filter(None, (_written("?" if value.is_nested else tuple(value.shape)), _kind(value))))


def _written(shape: tuple[int | str, ...] | str) -> str:
    return "(" + ", ".join(map(str, shape)) + "," * (len(shape) == 1) + ")"
