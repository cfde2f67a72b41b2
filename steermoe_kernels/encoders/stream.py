"""The stream between the layers of a steered encoder: add, steer and normalise in one pass, and hand the normalised frames over.

A pre-norm encoder adds each layer's last product to the stream, and the next layer begins by normalising that sum. The pass after layer
``l`` computes both, ``y = u + s (g V)`` with ``u = x + r``, and ``n = norm(y)`` with the norm of layer ``l + 1`` (the encoder's final
one after the last layer). The layer returns ``y`` with ``n`` tied to it; that norm, given ``y``, returns ``n``. It computes for itself
whenever its input is another tensor, as after a skipped layer, or ``y`` has been written to since, or ``n`` was made under another
autograd mode.

``n`` is a result of the pass and not of ``y``: no gradient goes from it to ``y``, and what is written to ``y`` past autograd, through
``.data`` or numpy, does not reach it. So frames are handed over only where nobody outside sees ``y``, which `begin_pass` decides for the
whole pass: with a hook on a layer or on a norm that reads the stream, with collected hidden states, or for a layer that is called by
hand, the stream is steered alone and each norm computes for itself, as in the unsteered encoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..modules import FusedSteerMoE, LayerParameters
from ..reference import compute_dtype, pool_frames
from .class_swap import Swapped, has_forward_of_its_own, swap
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
]


class EncoderPass(NamedTuple):
    """What an encoder gives its layers for one forward."""

    aligner: FusedSteerMoE
    parameters: list[LayerParameters]  # cut once, so that autograd stacks the gradients of the slices once
    hands_over: bool  # nobody outside sees the stream between layers


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


def _writes_go_unnoticed() -> bool:
    """In inference mode tensors do not count the writes to them, and a graph that is being compiled cannot branch on the count."""
    return torch.compiler.is_compiling() or torch.is_inference_mode_enabled()


class Steered(Swapped):
    """Any module of an encoder whose class `steer_encoder` exchanged."""


class SteeredLayer(Steered):
    """A layer that ends in `steer` instead of adding its last product to the residual stream."""

    _added: ClassVar[tuple[str, ...]] = ("_place",)

    def steer(self, x: Tensor, residual: Tensor | None, encoder_pass: EncoderPass | None) -> Tensor:
        """The layer's output: ``x + residual``, steered, with the next norm's result tied to it where nobody outside sees it.

        ``encoder_pass`` is None for a layer that is called by itself.
        """
        place: Place = self._place
        if encoder_pass is None:
            return place.steering.aligner(x if residual is None else residual + x, place.layer)
        aligner, parameters = encoder_pass.aligner, encoder_pass.parameters[place.layer]
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        # Autocast may widen what a norm returns for a half-precision stream, differently from device to device.
        if not encoder_pass.hands_over or (dtype.itemsize < 4 and torch.is_autocast_enabled(x.device.type)):
            u = x if residual is None else residual + x
            if type(aligner).forward is not FusedSteerMoE.forward:
                return aligner(u, place.layer)  # a subclass's, which need not take slices
            return aligner(u, place.layer, parameters=parameters)
        y, normed = aligner.steer_norm(
            x,
            place.layer,
            place.norm,
            parameters=parameters,
            residual=residual,
            pool=place.pool,
            pool_size=place.pool_size,
        )
        if torch.compiler.is_compiling():
            y = y.view(y.shape)  # one of several results of an operator takes no attributes there
        version = None if _writes_go_unnoticed() else y._version
        y._steered = Handover(place.norm, normed, version, torch.is_grad_enabled(), y.requires_grad)  # type: ignore[attr-defined]
        return y


class SteeredNorm(Steered):
    """A LayerNorm that returns what the pass before it computed; the final one also pools, after the last layer's steering."""

    _added: ClassVar[tuple[str, ...]] = ("_pool", "_pool_size")

    def forward(self, x: Tensor) -> Tensor:
        handover = getattr(x, "_steered", None)
        if handover is not None:
            x._steered = None  # type: ignore[attr-defined]  # the stream lives on, as the next residual and for the backward
            if self._accepts(handover, x):
                return handover.normed
        return super().forward(x if self._pool is None else pooled(x, self._pool, self._pool_size))  # type: ignore[misc]

    def _accepts(self, handover: Handover, x: Tensor) -> bool:
        if handover.norm is not self or handover.grad_enabled != torch.is_grad_enabled() or handover.requires_grad != x.requires_grad:
            return False
        if _writes_go_unnoticed():
            return handover.version is None
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


def begin_pass(
    encoder: nn.Module, steering: Steering, layers: Sequence[nn.Module], norms: Sequence[Any], *, collected: bool = False
) -> EncoderPass:
    """Cut the parameters for one forward of ``encoder`` through ``layers``, and decide whether they hand the norms' results over.

    ``norms`` read the stream after each layer, as they are now. ``collected``: the encoder returns what its layers return. RuntimeError
    where the last norm pooled and is no longer there; as `Steering.aligner_of` for an aligner that was replaced.
    """
    aligner = steering.aligner_of(encoder)
    if steering.pool is not None and not (_pools(norms[-1]) or any(map(_pools, norms[-1].modules()))):
        raise RuntimeError(
            f"the last norm of {type(encoder).__name__} was replaced since it was steered, and the pooling with it, which comes before it: "
            "put the norm back, or call unsteer_encoder and steer_encoder again"
        )
    hands_over = not (collected or _has_any_global_hook()) and all(map(_is_unseen, layers, norms))
    return EncoderPass(aligner, aligner.layer_parameters(), hands_over)


def _pools(module: Any) -> bool:
    """Whether this is the last norm as `place_layers` left it; a wrapper may hold a copy of it."""
    return isinstance(module, SteeredNorm) and module._pool is not None


def _is_unseen(layer: Any, norm: nn.Module) -> bool:
    """Whether ``norm`` stands where `place_layers` put it after ``layer``, and nobody sees what passes between the two.

    A checkpoint keeps what enters it, and with the stream it would keep what is tied to it.
    """
    if not isinstance(layer, SteeredLayer) or layer._place.norm is not norm:
        return False
    if layer.training and getattr(layer, "gradient_checkpointing", False) and torch.is_grad_enabled():
        return False
    return not (_is_watched(layer) or _is_watched(norm))


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody's hooks, or a forward put around the module's or its class's, see what the module takes and returns."""
    swapped = next((kind for kind in type(module).__mro__ if "_plain" in vars(kind)), None)
    if swapped is None or type(module).forward is not swapped.forward:  # type: ignore[attr-defined]
        return True
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks or has_forward_of_its_own(module):
        return True
    return any(getattr(hook, "__module__", None) != _RECORDER for hook in module._forward_hooks.values())


# Leaves its hooks on the layers for good; they look on only where hidden states are asked for, which the encoder is told.
_RECORDER = "transformers.utils.output_capturing"


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
