"""One layer's steering pass as the benchmarks time it: its sizes and tensors, its variants, and the proof that they compute the same."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import pytest
import torch
from baselines import eager_steer, eager_steer_norm, public_steer, public_steer_norm
from machine import DEVICE
from proof import errors, fault
from timing import Preparation, Thunk
from torch import Tensor

from steermoe_kernels import functional as SF
from steermoe_kernels import reference
from steermoe_kernels.backends import select_backend
from steermoe_kernels.choice import Shape

__all__ = ["CALLS", "DIRECTIONS", "GEOMETRY", "UNCOMPILED", "VARIANTS", "Case", "Pass", "comparisons", "prepared", "suitable", "unsuitable"]

VARIANTS = ("public", "eager", "compiled", "ours")
UNCOMPILED = ("public", "eager", "ours")
DIRECTIONS = ("forward", "backward", "forward+backward")
GEOMETRY = {"tiny": (384, 4), "base": (512, 6), "small": (768, 12), "medium": (1024, 24), "large-v3": (1280, 32)}
"""Width and encoder layers of the Whisper sizes."""
CALLS = 1 if DEVICE.type == "cuda" else 5
"""Of a variant's turn: as in a loop of its own, but for the first, which comes after other work. GPUs' streams never lie in a cache."""

Formula = Callable[..., Tensor | tuple[Tensor, Tensor]]
"""The stream in, ``y`` out, or with a norm ``y`` and the normalised frames."""

_L2_TIMES_FOUR = 2**28  # no GPU has more than a quarter of this


@dataclass(frozen=True)
class Case:
    """The sizes of one comparison. ``norm``: add the residual, steer, LayerNorm; otherwise steer alone."""

    model: str
    norm: bool = False
    frames: int = 1500
    num_experts: int = 8
    top_k: int | None = None
    dtype: torch.dtype = torch.float32

    @property
    def width(self) -> int:
        return GEOMETRY[self.model][0]

    @property
    def num_layers(self) -> int:
        return GEOMETRY[self.model][1]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        words = [self.model, f"N{self.frames}", f"E{self.num_experts}", self.dtype_name]
        return "-".join(words if self.top_k is None else [*words[:3], f"k{self.top_k}", words[3]])

    def bytes_to_move(self, direction: str) -> int:
        """Bytes of the stream that have to be read or written whatever the program."""
        forward = 4 if self.norm else 2  # x (and r) in, y (and n) out
        backward = 4 if self.norm else 3  # dy (and dn) and y in, du out
        units = {"forward": forward, "backward": backward, "forward+backward": forward + backward}[direction]
        return units * self.frames * self.width * self.dtype.itemsize

    def info(self, direction: str, variant: str) -> dict[str, object]:
        """What a benchmark's ``extra_info`` says of the work."""
        return {
            "variant": variant,
            "direction": direction,
            "dtype": self.dtype_name,
            "model": self.model,
            "N": self.frames,
            "D": self.width,
            "E": self.num_experts,
            "L": self.num_layers,
            "top_k": self.top_k,
            "device": DEVICE.type,
            "bytes_to_move": self.bytes_to_move(direction),
        } | ({"backend": self._backend()} if variant == "ours" else {})

    def _backend(self) -> str:
        shape = Shape(self.num_experts, self.frames, self.width)
        return select_backend("auto", DEVICE, self.dtype, shape).__name__.rpartition(".")[2]


def suitable(case: Case, variants: list[str]) -> list[str]:
    return [variant for variant in variants if unsuitable(case, variant) is None]


def unsuitable(case: Case, variant: str) -> str | None:
    """Why there is no such variant of this case, None if there is."""
    if variant == "public" and case.top_k is not None:
        return "the public formula routes densely"
    if variant == "compiled" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "torch.compile needs a C++ compiler, and there is none"
    return None


def comparisons(cases: list[Case], quick: Mapping[tuple[Case, str], tuple[str, ...]]) -> list:
    """Test parameters ``case, direction, variant``, a comparison's variants next to each other; ``quick``: what --quick runs of them."""
    return [
        pytest.param(
            case,
            direction,
            variant,
            id=f"{case}-{direction}-{variant}",
            marks=[pytest.mark.quick] * (variant in quick.get((case, direction), ())),
        )
        for case in cases
        for direction in DIRECTIONS
        for variant in VARIANTS
    ]


@lru_cache(maxsize=1)
def prepared(case: Case) -> Pass:
    """The case's `Pass`, the same one for all its directions: compiling and proving it take longer than timing it."""
    return Pass(case)


class Pass:
    """The tensors of a case, and what each variant does with them. Everything requires a gradient except the frozen norm's weights."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        self.layer = case.num_layers // 2
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE, case.dtype)

        def parameter(tensor: Tensor) -> Tensor:
            return tensor.detach().clone().requires_grad_()

        width, experts, layers = case.width, case.num_experts, case.num_layers
        self.whole = [  # as the public formula takes them: all layers'
            parameter(normal(layers * experts, width) / width**0.5),
            parameter(0.1 * normal(layers * experts)),
            parameter(0.01 * normal(layers, experts, width)),
            parameter(torch.full((layers,), 0.1, device=DEVICE, dtype=case.dtype)),
        ]
        rows = slice(self.layer * experts, (self.layer + 1) * experts)
        router_weight, router_bias, vectors, scales = self.whole
        cut = (router_weight[rows], router_bias[rows], vectors[self.layer], scales[self.layer])
        self.slices = [parameter(tensor) for tensor in cut]
        self.norm = [1 + 0.1 * normal(width), 0.1 * normal(width)] if case.norm else []
        stream = (1, case.frames, width)
        names = ("x", "residual") if case.norm else ("x",)
        copies = 1  # a layer finds its stream in the CPU's cache; a GPU's short kernels must not find it in theirs
        if DEVICE.type == "cuda":
            copies = min(16, 1 + _L2_TIMES_FOUR // case.bytes_to_move("forward+backward"))
        self.streams = [[parameter(normal(*stream)) for _ in names] for _ in range(copies)]
        self._faults: dict[str, str | None] = {}
        self.incoming = [[normal(*stream) for _ in names] for _ in range(copies)]

    def function(self, variant: str) -> Formula:
        """The variant as a function of the stream, (B, T, D) or two of them, with its parameters in place.

        One of `VARIANTS`, or a backend's name for the fused operators on that backend.
        """
        if variant == "public":
            return partial(_public, self)
        if variant in ("eager", "compiled"):
            run = _eager if variant == "eager" else self._compiled
            return partial(run, self.case.norm, self.case.top_k, self.slices, self.norm)
        return partial(_fused, "auto" if variant == "ours" else variant, self.case.norm, self.case.top_k, self.slices, self.norm)

    @cached_property
    def _compiled(self) -> Formula:
        torch.compiler.reset()  # or else the cases before count as recompilations of this one, of which torch allows eight
        return torch.compile(_eager, fullgraph=True, dynamic=False)

    def parameters(self, variant: str) -> list[Tensor]:
        return (self.whole if variant == "public" else self.slices) + self.norm

    def wanted(self, variant: str, copy: int = 0) -> list[Tensor]:
        return self.streams[copy] + (self.whole if variant == "public" else self.slices)

    def preparation(self, variant: str, direction: str) -> Preparation:
        """What is timed: per copy of the stream, one call."""
        function = self.function(variant)

        def forward(copy: int) -> object:
            with torch.no_grad():
                return function(*self.streams[copy])

        def backward(copy: int, outputs: Tensor | tuple[Tensor, Tensor]) -> object:
            return torch.autograd.grad(outputs, self.wanted(variant, copy), self.incoming[copy])

        def thunk(copy: int) -> Thunk:
            if direction == "forward":
                return partial(forward, copy)
            if direction == "backward":
                return partial(backward, copy, function(*self.streams[copy]))
            return lambda: backward(copy, function(*self.streams[copy]))

        return lambda: [thunk(copy) for copy in range(len(self.streams))]

    # --- the proof --------------------------------------------------------------------------------------------------------------------

    def faults(self, variants: list[str]) -> dict[str, str | None]:
        """Per variant, what is more than twice as wrong as the eager formula in the same dtype, both against float64; None if nothing."""
        for variant in variants:
            if variant not in self._faults:
                self._faults[variant] = fault(errors(self._results(variant), self._exact), self._usual, self.case.dtype)
        return {variant: self._faults[variant] for variant in variants}

    @cached_property
    def _usual(self) -> dict[str, float]:
        return errors(self._results("eager"), self._exact)

    def _results(self, variant: str) -> dict[str, Tensor]:
        computed = self.function(variant)(*self.streams[0])
        outputs = (computed,) if isinstance(computed, Tensor) else computed
        grads = torch.autograd.grad(outputs, self.wanted(variant), self.incoming[0])
        dstream, dweight, dvectors = grads[0], grads[len(self.streams[0])], grads[len(self.streams[0]) + 2]
        if variant == "public":
            experts = self.case.num_experts
            dweight, dvectors = dweight[self.layer * experts : (self.layer + 1) * experts], dvectors[self.layer]
        results = dict(zip(("y", "normed"), (output.detach() for output in outputs), strict=False))
        return results | {"dx": dstream, "dweight": dweight, "dvectors": dvectors}

    @cached_property
    def _exact(self) -> dict[str, Tensor]:
        """The reference in float64."""
        stream, slices = ([t.detach().double().requires_grad_() for t in tensors] for tensors in (self.streams[0], self.slices))
        norm, incoming = ([t.double() for t in tensors] for tensors in (self.norm, self.incoming[0]))
        if self.case.norm:
            x, residual = stream
            outputs = reference.steer_norm(x, *slices, *norm, residual=residual, top_k=self.case.top_k)[:2]
        else:
            outputs = reference.steer(*stream, *slices, top_k=self.case.top_k)[:1]
        dx, dweight, dvectors = torch.autograd.grad(outputs, [stream[0], slices[0], slices[2]], incoming)
        results = dict(zip(("y", "normed"), (output.detach() for output in outputs), strict=False))
        return results | {"dx": dx, "dweight": dweight, "dvectors": dvectors}


def _public(work: Pass, *stream: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    function: Formula = public_steer_norm if work.case.norm else public_steer
    return function(*stream, *work.whole, work.layer, *work.norm)


def _eager(norm: bool, top_k: int | None, slices: list[Tensor], weights: list[Tensor], *stream: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    function: Formula = eager_steer_norm if norm else eager_steer
    return function(*stream, *slices, *weights, top_k=top_k)


def _fused(
    backend: str, norm: bool, top_k: int | None, slices: list[Tensor], weights: list[Tensor], *stream: Tensor
) -> Tensor | tuple[Tensor, Tensor]:
    if not norm:
        return SF.steer(*stream, *slices, top_k=top_k, backend=backend)[0]
    x, residual = stream
    return SF.steer_norm(x, *slices, *weights, residual=residual, top_k=top_k, backend=backend)[:2]
