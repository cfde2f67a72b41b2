"""Any encoder whose layers sit in one ``nn.ModuleList``: steered after each layer, by hooks.

The layers are the members of the encoder's only list (lists inside a member of a list do not count). Where an encoder holds several, they
are the list whose members are all of one class and each hold a norm and a Linear of the encoder's width; convolutions of a feature
extractor do not, and two such lists, as of an encoder and a decoder, are an error that names them. So is a list of lists: only
the encoder knows what runs between their members.

Pooling needs an encoder that runs its last layer once, on (B, T, D), and leaves time alone afterwards. Where only a pass can tell, as of
layers used in a loop, the pass ends in an error; under torch.compile this check is left out.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_stream
from .class_swap import swap
from .steering import Steering
from .stream import Steered, pooled

PRIORITY = 0

_WIDTHS = ("hidden_size", "d_model", "encoder_embed_dim", "embed_dim", "n_embd", "dim")
_LAYERDROPS = ("speech_encoder_layerdrop", "layerdrop", "encoder_layerdrop")  # the first one that a config has is this encoder's


@dataclass(eq=False)
class Pass:
    """A steered encoder that is running, by its steering, and the frames that its last layer returned and was pooled to, if it has."""

    steering: weakref.ref[Steering]
    returned: int = 0
    pooled: int | None = None


_passes: ContextVar[tuple[Pass, ...]] = ContextVar("_passes", default=())  # of this thread, the innermost last


def _pass_of(steering: Steering) -> Pass | None:
    return next((each for each in reversed(_passes.get()) if each.steering() is steering), None)


def _end_pass(steering: Steering) -> None:
    """Forgets the passes of this encoder, one that an interrupt has left behind among them, and those whose encoders are gone."""
    _passes.set(tuple(each for each in _passes.get() if each.steering() not in (steering, None)))


def takes(encoder: nn.Module) -> bool:
    return True


def layers(encoder: nn.Module) -> list[nn.Module]:
    """The layers to steer. ValueError if there are none, if it is not clear which they are, or if they return streams of several widths."""
    members = _find_layers(encoder)[1]
    _check_one_width(encoder, members)
    return members


def steer(
    encoder: nn.Module,
    steering: Steering,
    *,
    members: list[nn.Module] | None = None,
    written: int | None = None,
) -> None:
    """For kinds that know more: ``members`` are the layers, in order; ``written`` is the one into whose output the encoder writes."""
    owner, pool = encoder, steering.pool
    if members is None:
        owner, members = _find_layers(encoder)
    if (compiled := compiled_around(encoder, members)) is not None:
        raise ValueError(
            f"{type(compiled).__name__} was compiled in place, without the hooks that are to steer it: set its _compiled_call_impl to None "
            "and call torch._dynamo.reset(), and compile it again once it is steered"
        )
    if pool is not None and any(_is_time_first(member) for member in members):
        raise ValueError(
            f"the layers of {type(encoder).__name__} take (time, batch, width), by their nn.MultiheadAttention, and pooling needs "
            "(batch, time, width): make them with batch_first=True, or pool what the encoder returns"
        )
    for index, member in enumerate(members):
        pools = pool is not None and index == len(members) - 1
        # Before the hooks that are there already, so that they see the steered stream.
        member.register_forward_hook(SteerAfter(steering, index, pools, index == written), prepend=True)
    encoder.register_forward_pre_hook(TellsTheEncoder(steering))
    if pool is not None:
        encoder.register_forward_pre_hook(NeedsEveryLayer(steering, owner))
        encoder.register_forward_hook(PooledOnce(steering), prepend=True, always_call=True)  # before hooks that change the output
    if isinstance(owner, nn.TransformerEncoder):
        swap(owner, KeepsPadding)


def compiled_around(encoder: nn.Module, members: list[nn.Module]) -> nn.Module | None:
    """A part of ``encoder``, or the whole, that ``module.compile()`` compiled together with some of the ``members`` that it runs.

    Its graph goes on as it is: torch does not look for hooks that come to the modules inside it, or go.
    """
    layers = set(map(id, members))
    for module in encoder.modules():
        if module._compiled_call_impl is not None and any(id(part) in layers for part in module.modules() if part is not module):
            return module
    return None


def width_of(encoder: nn.Module, members: list[nn.Module]) -> int | None:
    """The width of the stream: what the encoder's config says, or the one width that the norms of all layers have in common."""
    config = getattr(encoder, "config", None)
    for name in _WIDTHS:
        width = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if isinstance(width, int):
            return width
    widths = [_norm_widths(member) for member in members]
    shared = set.intersection(*widths) if widths else set()
    return shared.pop() if len(shared) == 1 else None


class KeepsPadding(Steered):
    """torch's ``TransformerEncoder``, steered. In evaluation it would take the padding out, and give its layers nested tensors."""

    @property
    def use_nested_tensor(self) -> bool:
        return False

    @use_nested_tensor.setter
    def use_nested_tensor(self, value: bool) -> None:
        self.__dict__["use_nested_tensor"] = value  # for when it is no longer steered


class SteerAfter:
    """Forward hook: steers a layer's output, or the first of several outputs, and where it ``pools``, after the last layer, pools it.

    ``written`` tells that the encoder writes into the output: it gets a copy then, where the backward needs the steered stream.
    """

    def __init__(self, steering: Steering, layer: int, pools: bool, written: bool) -> None:
        self.steering, self.layer, self.pools, self.written = steering, layer, pools, written

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self._steer(output)
        if isinstance(output, (tuple, list)) and output:
            outputs = (self._steer(output[0]), *output[1:])
            return type(output)(*outputs) if hasattr(output, "_fields") else type(output)(outputs)
        if isinstance(output, Mapping) and output:
            first = next(iter(output))
            return type(output)(**{**output, first: self._steer(output[first])})
        raise TypeError(f"a steered layer must return a tensor, or several in a tuple, list or mapping, got {type(output).__name__}")

    def _steer(self, h: Tensor) -> Tensor:
        y = self.steering.aligner(h, self.layer)
        if self.written and y.requires_grad:
            y = y.clone()
        pool = self.steering.pool
        if not self.pools or pool is None:
            return y
        check_stream("the last layer's output", y, rank=3)
        returned, y = y.shape[1], pooled(y, pool, self.steering.pool_size)
        if not torch.compiler.is_compiling() and (running := _pass_of(self.steering)) is not None:
            if running.pooled is not None:
                raise RuntimeError(
                    "the last layer has run more than once in one pass of the encoder, and pooling is for encoders that run it once, on "
                    "whole clips: steer without pooling, and pool what the encoder returns"
                )
            running.returned, running.pooled = returned, y.shape[1]
        return y


class TellsTheEncoder:
    """Forward pre-hook: an encoder that is a copy lets its layers know, which then ask it for the aligner."""

    def __init__(self, steering: Steering) -> None:
        self.steering = steering

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self.steering.aligner_of(module)


class NeedsEveryLayer:
    """Forward pre-hook: pooling comes after the last layer, so a step that may leave that layer out would not be pooled."""

    def __init__(self, steering: Steering, owner: nn.Module) -> None:
        self.steering, self.owner = steering, owner

    def __call__(self, module: Any, args: Any) -> None:
        if module.training and (name := self._layerdrop(module)):
            raise RuntimeError(f"pooling after the last layer needs every layer to run: set {name} to 0 to train this encoder")
        if not torch.compiler.is_compiling():
            _end_pass(self.steering)
            _passes.set((*_passes.get(), Pass(weakref.ref(self.steering))))

    def _layerdrop(self, module: nn.Module) -> str | None:
        """The name of a setting that is not zero: the modules' own, or their configs' where they have none."""
        holders = (module, self.owner)
        for holder in (*holders, *(getattr(holder, "config", None) for holder in holders)):
            for name in _LAYERDROPS:
                if (share := getattr(holder, name, None)) is not None:
                    return name if share else None
        return None


class PooledOnce:
    """Forward hook: RuntimeError for an encoder that returns its stream in the length that it had before it was pooled, or longer."""

    def __init__(self, steering: Steering) -> None:
        self.steering = steering

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or (running := _pass_of(self.steering)) is None:
            return
        _end_pass(self.steering)
        if running.pooled in (None, running.returned):
            return
        if isinstance(output, Mapping):
            output = tuple(output.values())
        outputs = output if isinstance(output, (tuple, list)) else (output,)
        width = self.steering.feature_dim
        streams = [each for each in outputs if isinstance(each, Tensor) and each.dim() == 3 and each.shape[-1] == width]
        if streams and all(stream.shape[1] >= running.returned for stream in streams):
            raise RuntimeError(
                f"{type(module).__name__} returned {streams[0].shape[1]} frames after its last layer was pooled to {running.pooled}: what "
                "comes after the layers depends on the length before; steer without pooling, and pool what the encoder returns"
            )


def _find_layers(encoder: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """The module that holds the list of layers, and the layers."""
    lists = {name: (owner, list(members)) for name, owner, members in _outermost_lists(encoder) if len(members)}
    if not lists:
        raise ValueError(
            f"{type(encoder).__name__} has no layers to steer: it holds no nn.ModuleList with members (pass the module whose "
            "forward runs them)"
        )
    chosen = lists
    if len(lists) > 1:
        chosen = {name: (owner, members) for name, (owner, members) in lists.items() if _are_layers(encoder, members)}
    if len(chosen) != 1:
        raise ValueError(
            f"it is not clear which layers of {type(encoder).__name__} to steer: it holds the lists {', '.join(chosen or lists)}; "
            "pass the part of it that holds the right one; where the stream runs through several, they take a module of their own in "
            "steermoe_kernels/encoders"
        )
    owner, members = next(iter(chosen.values()))
    if any(type(member).forward is nn.Module.forward for member in members):
        raise ValueError(
            f"the layers of {type(encoder).__name__} are lists of modules, and what happens between those only its forward knows: pass a "
            "part of it whose list holds the layers themselves, or give it a module of its own in steermoe_kernels/encoders"
        )
    if len(set(map(id, members))) != len(members):
        raise ValueError(f"{type(encoder).__name__} uses one layer several times, and each layer can be steered once only")
    return owner, members


def _outermost_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, nn.ModuleList]]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield prefix + name, module, child
        else:
            yield from _outermost_lists(child, f"{prefix}{name}.")


def _are_layers(encoder: nn.Module, members: list[nn.Module]) -> bool:
    width = width_of(encoder, members)
    return len({type(member) for member in members}) == 1 and all(
        any(_norm_width(part) == width for part in member.modules())
        and any(isinstance(part, nn.Linear) and part.in_features == width for part in member.modules())
        for member in members
    )


def _check_one_width(encoder: nn.Module, members: list[nn.Module]) -> None:
    """ValueError for stages, as Swin's, of which some return another width than the encoder's.

    Their norms tell: where each layer has some, and not each has one of the encoder's width, a layer must end in a Linear of that width, as
    the stage before the last does, or have a square one.
    """
    width, norms = width_of(encoder, members), [_norm_widths(member) for member in members]
    if width is None or not all(norms) or all(width in widths for widths in norms):
        return
    for index, member in enumerate(members):
        linears = [(part.in_features, part.out_features) for part in member.modules() if isinstance(part, nn.Linear)]
        if linears and (width, width) not in linears and linears[-1][1] != width:
            raise ValueError(
                f"{type(encoder).__name__} has width {width}, but its layer {index} returns another ({linears[-1][1]}, it seems): "
                "an aligner has one width for all layers"
            )


def _is_time_first(layer: nn.Module) -> bool:
    """Whether the layer's frames are (T, B, D), as torch's attention and layers take them by default.

    Attention deeper inside may have its frames transposed on the way to it.
    """
    attention = [part for part in layer.children() if isinstance(part, nn.MultiheadAttention)]
    attention += [part.self_attn for part in layer.modules() if isinstance(part, nn.TransformerEncoderLayer)]
    return any(not part.batch_first for part in attention)


def _norm_widths(layer: nn.Module) -> set[int]:
    return {width for part in layer.modules() if (width := _norm_width(part))}


def _norm_width(module: nn.Module) -> int | None:
    """The width of a norm, told by its class's name: LayerNorm, RMSNorm and the many that libraries have of their own."""
    weight = getattr(module, "weight", None)
    named = type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
    return weight.shape[0] if named and isinstance(weight, Tensor) and weight.dim() == 1 else None
