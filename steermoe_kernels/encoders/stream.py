"""The stream between the layers of a steered encoder: add, steer and normalise in one pass, and hand the normalised frames over.

A pre-norm encoder adds each layer's last product to the stream, and the next layer begins by normalising that sum. The pass after layer
``l`` computes both, ``y = u + s (g V)`` with ``u = x + r``, and ``n = norm(y)`` with the norm of layer ``l + 1`` (the encoder's final
one after the last layer). The layer returns ``y``, as it must for hooks and collected hidden states, with ``n`` tied to it; that norm,
given ``y``, returns ``n``. It computes for itself whenever its input is another tensor, or ``y`` has been written to since, or ``n`` was
made under another autograd mode: so a hook that replaces the hidden states, a skipped layer and a layer called alone are all right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..modules import FusedSteerMoE, LayerParameters
from ..reference import compute_dtype, pool_frames
from .class_swap import Swapped, swap
from .steering import Steering

__all__ = [
    "EncoderPass",
    "Steered",
    "SteeredLayer",
    "SteeredNorm",
    "all_distinct",
    "begin_pass",
    "enter_checkpoints",
    "fusible_norm",
    "in_rows",
    "place_layers",
    "pooled",
    "release",
]


class EncoderPass(NamedTuple):
    """What an encoder gives its layers for one forward."""

    aligner: FusedSteerMoE
    parameters: list[LayerParameters]  # cut once, so that autograd stacks the gradients of the slices once
    unobserved: bool  # no hook sees the stream between layers


@dataclass(eq=False)
class Place:
    """Where a layer stands: its number, and the norm that reads the stream after it. Not a module, so nothing is registered twice."""

    steering: Steering
    layer: int
    norm: nn.Module
    pool: str | None
    pool_size: int


@dataclass(eq=False)
class Handover:
    """The normalised frames tied to a stream, whom they are for, and what must not have changed since."""

    norm: nn.Module
    normed: Tensor
    version: int | None  # of the stream; None for inference tensors, which count no writes
    grad_enabled: bool
    requires_grad: bool

    def __reduce__(self) -> Any:
        return _nothing, ()  # a stream that is saved or copied takes none of this along


def _nothing() -> None:
    return None


def _writes_go_unnoticed() -> bool:
    """In inference mode tensors do not count the writes to them, and a graph that is being compiled cannot branch on the count."""
    return torch.compiler.is_compiling() or torch.is_inference_mode_enabled()


class Steered(Swapped):
    """Any module of an encoder whose class `steer_encoder` exchanged."""


class SteeredLayer(Steered):
    """A layer that ends in `steer` instead of adding its last product to the residual stream."""

    _added: ClassVar[tuple[str, ...]] = ("_place",)

    def steer(self, x: Tensor, residual: Tensor | None, encoder_pass: EncoderPass | None) -> Tensor:
        """The layer's output: ``x + residual``, steered, with the next norm's result tied to it where that is safe.

        ``encoder_pass`` is None for a layer that is called by itself.
        """
        place: Place = self._place
        aligner = place.steering.aligner if encoder_pass is None else encoder_pass.aligner
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        if not self._may_hand_over(x.device, dtype, encoder_pass):
            return aligner(x if residual is None else residual + x, place.layer)
        y, normed = aligner.steer_norm(
            x,
            place.layer,
            place.norm,
            parameters=None if encoder_pass is None else encoder_pass.parameters[place.layer],
            residual=residual,
            pool=place.pool,
            pool_size=place.pool_size,
        )
        if torch.compiler.is_compiling():
            y = y.view(y.shape)  # one of several results of an operator takes no attributes there
        version = None if _writes_go_unnoticed() else y._version
        y._steered = Handover(place.norm, normed, version, torch.is_grad_enabled(), y.requires_grad)  # type: ignore[attr-defined]
        return y

    def _may_hand_over(self, device: torch.device, dtype: torch.dtype, encoder_pass: EncoderPass | None) -> bool:
        if self.training and getattr(self, "gradient_checkpointing", False):
            return False  # a checkpoint keeps what enters it, and with the stream it would keep what is tied to it
        if _writes_go_unnoticed() and (encoder_pass is None or not encoder_pass.unobserved):
            return False  # a write to the stream would go unnoticed
        # Autocast may widen what a norm returns for a half-precision stream, differently from device to device.
        return dtype.itemsize >= 4 or not torch.is_autocast_enabled(device.type)


class SteeredNorm(Steered):
    """A LayerNorm that returns what the pass before it computed; the final one also pools, after the last layer's steering."""

    _added: ClassVar[tuple[str, ...]] = ("_pool", "_pool_size")

    def forward(self, x: Tensor) -> Tensor:
        handover = getattr(x, "_steered", None)
        if handover is not None:
            if self._accepts(handover, x):
                return handover.normed
            x._steered = None  # type: ignore[attr-defined]
        return super().forward(x if self._pool is None else pooled(x, self._pool, self._pool_size))  # type: ignore[misc]

    def _accepts(self, handover: Handover, x: Tensor) -> bool:
        if handover.norm is not self or handover.grad_enabled != torch.is_grad_enabled() or handover.requires_grad != x.requires_grad:
            return False
        if _writes_go_unnoticed():
            return handover.version is None and not self._forward_pre_hooks
        return handover.version is not None and handover.version == x._version


def place_layers(
    layers: Sequence[nn.Module],
    norms: Sequence[nn.Module],
    mixin: type[SteeredLayer],
    steering: Steering,
) -> None:
    """Exchange the classes of ``layers`` and of the ``norms`` that read the stream after each of them; the last norm pools."""
    for index, (layer, norm) in enumerate(zip(layers, norms, strict=True)):
        pool, pool_size = (steering.pool, steering.pool_size) if index == len(layers) - 1 else (None, 1)
        swap(layer, mixin, _place=Place(steering, index, norm, pool, pool_size))
        swap(norm, SteeredNorm, _pool=pool, _pool_size=pool_size)


def begin_pass(encoder: nn.Module, steering: Steering, layers: Iterable[nn.Module]) -> EncoderPass:
    """Cut the parameters for one forward of ``encoder`` through ``layers``. Raises as `Steering.aligner_of`."""
    aligner = steering.aligner_of(encoder)
    unobserved = not (_has_any_global_hook() or any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers))
    return EncoderPass(aligner, aligner.layer_parameters(), unobserved)


def enter_checkpoints(aligner: FusedSteerMoE, layers: Iterable[Any], x: Tensor) -> Tensor:
    """The encoder's input ``x``, requiring a gradient if ``layers`` are transformers' under reentrant checkpoints, else as it is.

    Such a checkpoint gives no gradient to what is inside it, the aligner, unless something that enters it requires one; and none to gates
    that leave it aside, so RuntimeError where they are being recorded.
    """
    if not torch.is_grad_enabled():
        return x
    active = (layer for layer in layers if layer.training and getattr(layer, "gradient_checkpointing", False))
    functions = [layer._gradient_checkpointing_func for layer in active]
    if all(getattr(function, "keywords", {}).get("use_reentrant", True) is False for function in functions):
        return x
    if aligner.is_recording:
        raise RuntimeError(
            "gates recorded in a reentrant checkpoint have no gradient, and a loss of them would do nothing: "
            "checkpoint with use_reentrant=False, or record them in a pass under torch.no_grad()"
        )
    return x if x.requires_grad else x.detach().requires_grad_()


def all_distinct(*modules: Iterable[nn.Module]) -> bool:
    """Whether no module stands in these lists, of layers and of norms, twice: only one class and one place can be given to each."""
    listed = [id(module) for several in modules for module in several]
    return len(set(listed)) == len(listed)


def fusible_norm(norm: nn.Module, plain: type[nn.LayerNorm], width: int) -> bool:
    """Whether `SteeredNorm` can stand for ``norm``: a LayerNorm of exactly the class ``plain``, with weights, over the last dimension."""
    return type(norm) is plain and norm.normalized_shape == (width,) and norm.weight is not None and "forward" not in norm.__dict__


def in_rows(h: Tensor) -> Tensor:
    """``h`` with each frame in one piece. A stream comes permuted from the convolutions; once it is contiguous, it stays so."""
    return h if h.is_contiguous() else h.contiguous()  # a compiled graph would lose what is tied to h in a copy of nothing


def pooled(y: Tensor, kind: str, size: int) -> Tensor:
    """Pool over time, (B, T, D) -> (B, ceil(T / size), D), rounded once."""
    return pool_frames(y.to(compute_dtype(y.dtype)), kind, size).to(y.dtype)


def release(output: Any) -> None:
    """Untie what collected hidden states would otherwise keep alive."""
    if isinstance(output, Tensor):
        if getattr(output, "_steered", None) is not None:
            output._steered = None  # type: ignore[attr-defined]
    elif isinstance(output, Mapping):
        for value in output.values():
            release(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            release(value)
