"""Steering an encoder in place: `steer_encoder`, `unsteer_encoder`, `describe_encoder`, and `patch_steermoe`.

Kinds of encoder are modules in this folder, one each, found by what they define:

``PRIORITY: int`` and ``takes(encoder) -> bool``
    Of the modules that take an encoder, the one with the highest priority steers it. ``takes`` must not import the encoder's library: an
    encoder of it can only exist where it is imported already.
``layers(encoder) -> list[nn.Module]``
    The layers after which the stream is steered, in order. ValueError if they cannot be told. Changes nothing: `describe_encoder` asks,
    too.
``width(encoder) -> int``
    Optional: the stream's width D, where `layered.width_of` does not find it in the encoder's config or its layers' norms, or finds
    another.
``steer(encoder, steering) -> None``
    Everything has been checked, and the aligner is ``encoder.steering`` already; ``steering``, a `steering.Steering`, says at each pass
    which it is by then, and what to pool. Exchanges the classes of modules for `stream.Steered` ones (`class_swap.swap`) or registers
    hooks of classes defined in this folder; `unsteer_encoder` undoes both without being told, and so does `steer_encoder` if this raises.
    A kind that differs only in where its layers are ends in ``layered.steer(encoder, steering, members=layers(encoder))``, by hooks on
    every layer, the last of which pools.

The fused path, ``add -> steer -> norm`` in one pass, is for pre-norm encoders whose forward the file knows: a `stream.SteeredLayer` whose
forward ends in ``self.steer(x, residual, encoder_pass)``; `stream.place_layers` with the norm that reads the stream after each layer; and
in ``takes``, which must be exact, `stream.fusible_norm` for each norm and `stream.all_distinct`. An encoder with a class of its own begins
with `stream.begin_pass`, whose result it hands to every layer, and `stream.enter_checkpoints`, if it is transformers'. What else it returns
for each frame, such as a mask, is its file's to pool as the stream is pooled. `openai_whisper.py` is the shortest example.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from ..checks import check_pool
from ..modules import FusedSteerMoE
from .class_swap import changed_since, unswap
from .layered import compiled_around, width_of
from .patching import patch_steermoe
from .steering import Steering
from .stream import Steered

__all__ = ["EncoderShape", "describe_encoder", "patch_steermoe", "steer_encoder", "unsteer_encoder"]


class EncoderShape(NamedTuple):
    """What an aligner has to know of an encoder. ``dtype`` is the parameters': they stay in float32 under a half-precision encoder."""

    feature_dim: int
    num_layers: int
    device: torch.device
    dtype: torch.dtype


def steer_encoder(encoder: nn.Module, aligner: FusedSteerMoE, *, pool: str | None = None, pool_size: int = 1) -> nn.Module:
    """Steer the output of every layer of this encoder, in place, and return it.

    The aligner becomes the submodule ``encoder.steering``, so ``parameters()``, ``to()``, ``state_dict()`` and copies include it. Each
    pass asks for it anew: another of the same width and number of layers may be assigned, or a wrapper that forwards its attributes.
    transformers' ``WhisperEncoder`` and openai-whisper's ``AudioEncoder`` run ``add -> steer -> norm`` as one pass a layer and take inputs
    of any length up to the model's maximum; any other encoder whose layers sit in one ``nn.ModuleList`` is steered after each layer, by
    hooks. With ``pool`` "max" or "mean" the stream is pooled over ``pool_size`` frames after the last layer's steering, before whatever
    norm follows: (B, T, D) becomes (B, ceil(T / pool_size), D).

    Raises, before anything is changed: TypeError for arguments of another kind; ValueError for a bad ``pool`` or ``pool_size``, an
    encoder without layers to steer or with layers of several widths, an aligner with another width or number of layers or on another
    device, pooling where the layers take (T, B, D), steering by hooks what ``compile()`` has compiled already; RuntimeError for an encoder
    that is steered already, as a whole or in part.
    """
    _check_module(encoder)
    if not isinstance(aligner, FusedSteerMoE):
        raise TypeError(f"aligner must be a FusedSteerMoE, got {type(aligner).__name__}")
    check_pool(pool, pool_size)
    if any(True for _ in _traces(encoder)):
        raise RuntimeError(f"{type(encoder).__name__} is steered already: call unsteer_encoder on it first")
    if hasattr(encoder, "steering"):
        raise ValueError(f"{type(encoder).__name__} has an attribute called steering, the name under which the aligner would be registered")
    kind = _kind(encoder)
    layers = kind.layers(encoder)
    if not layers:
        raise ValueError(f"{type(encoder).__name__} has no layers to steer")
    _check_fits(encoder, layers, _width(kind, encoder, layers), aligner)
    encoder.add_module("steering", aligner)
    encoder.__dict__[_MARK] = True
    try:
        kind.steer(encoder, Steering(encoder, aligner, pool, pool_size))
    except BaseException:
        _undo(encoder)
        raise
    return encoder


def unsteer_encoder(encoder: nn.Module) -> nn.Module:
    """Undo `steer_encoder`, in place: classes, hooks, ``state_dict`` and outputs are again what they were. Returns the encoder.

    RuntimeError, before anything is changed, if this encoder is not steered, or if others have since changed the class of one of its
    modules, wrapped a forward, or compiled what is steered by hooks.
    """
    if not isinstance(encoder, nn.Module) or _MARK not in encoder.__dict__:
        raise RuntimeError(f"{type(encoder).__name__} is not steered")
    _check_undoable(encoder)
    _undo(encoder)
    return encoder


def _check_undoable(encoder: nn.Module) -> None:
    """RuntimeError for what stands on the steering, and would be left without it."""
    for name, module in encoder.named_modules():
        if isinstance(module, Steered) and (change := changed_since(module)):
            raise RuntimeError(
                f"{type(encoder).__name__} cannot be unsteered: {change}, of {name or 'the encoder itself'}, since it was steered; undo "
                "that first (as by remove_parametrizations or remove_hook_from_module), or unsteer before it is done"
            )
    hooked = [module for module, hooks, _ in _traces(encoder) if hooks is module.__dict__.get("_forward_hooks") and module is not encoder]
    if (compiled := compiled_around(encoder, hooked)) is not None:
        raise RuntimeError(
            f"{type(compiled).__name__} was compiled in place, with the hooks that steer it: set its _compiled_call_impl to None and call "
            "torch._dynamo.reset() first"
        )


def _undo(encoder: nn.Module) -> None:
    for module, hooks, key in list(_traces(encoder)):
        if hooks is None:
            unswap(module)
        else:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)
    encoder._modules.pop("steering", None)
    encoder.__dict__.pop(_MARK, None)


# Tells the module that was steered from those around and inside it, whose traces are the same; also where somebody has deleted the aligner.
_MARK = "_was_steered"


def describe_encoder(encoder: nn.Module) -> EncoderShape:
    """Width, number of layers, device and parameter dtype of an aligner for ``encoder``.

    TypeError for anything but a module; ValueError where the layers or their width cannot be told.
    """
    _check_module(encoder)
    kind = _kind(encoder)
    layers = kind.layers(encoder)
    if not layers:
        raise ValueError(f"{type(encoder).__name__} has no layers to steer")
    width = _width(kind, encoder, layers)
    if width is None:
        raise ValueError(
            f"the width of {type(encoder).__name__} cannot be told from its config or its layers' norms: give feature_dim to FusedSteerMoE"
        )
    first = next((p for p in layers[0].parameters() if p.is_floating_point()), torch.empty(0))
    dtype = first.dtype if first.dtype in (torch.float32, torch.float64) else torch.float32
    return EncoderShape(width, len(layers), first.device, dtype)


def _check_module(encoder: nn.Module) -> None:
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"encoder must be a torch.nn module, got {type(encoder).__name__}")
    for wrapper, inside in _WRAPPERS.items():
        if type(encoder).__name__ == wrapper and hasattr(encoder, inside):
            raise ValueError(f"{wrapper} wraps an encoder: pass what it wraps, its .{inside}, and wrap that again once it is steered")


_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}


def _width(kind: ModuleType, encoder: nn.Module, layers: list[nn.Module]) -> int | None:
    """None where it cannot be told."""
    return kind.width(encoder) if hasattr(kind, "width") else width_of(encoder, layers)


def _check_fits(encoder: nn.Module, layers: list[nn.Module], width: int | None, aligner: FusedSteerMoE) -> None:
    name = type(encoder).__name__
    if aligner.num_layers != len(layers):
        raise ValueError(f"{name} has {len(layers)} layers, the aligner has {aligner.num_layers}")
    if width is not None and aligner.feature_dim != width:
        raise ValueError(f"{name} has width {width}, the aligner has {aligner.feature_dim}")
    device = aligner.steering_vectors.device
    for key, parameter in aligner.named_parameters():
        if parameter.device != device:
            raise ValueError(f"the aligner's {key} is on {parameter.device}, its steering_vectors on {device}: move one to the other")
    for layer in layers:
        for parameter in layer.parameters():
            if parameter.device != device:
                raise ValueError(f"{name} is on {parameter.device}, the aligner on {device}: move one to the other")


@cache
def _kinds() -> tuple[ModuleType, ...]:
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return tuple(sorted((module for module in modules if hasattr(module, "takes")), key=lambda module: -module.PRIORITY))


def _kind(encoder: nn.Module) -> ModuleType:
    return next(kind for kind in _kinds() if kind.takes(encoder))


def _traces(encoder: nn.Module) -> Iterator[tuple[Any, Any, Any]]:
    """What `steer_encoder` left in ``encoder``: (module, None, None) for an exchanged class, (module, hooks, key) for a hook."""
    for module in encoder.modules():
        if isinstance(module, Steered):
            yield module, None, None
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in hooks.items():
                if type(hook).__module__.startswith(__name__ + "."):
                    yield module, hooks, key
