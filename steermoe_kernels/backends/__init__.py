"""The backends: one module each, found by name, all with the same functions.

A backend is a module (or package) in this folder; a module without ``steer_forward`` is none. Importing it must not need a library that may
be missing: ``unavailable`` is the place to look for it. `backends/reference.py` is all of this in plain PyTorch, to start from; every check
there is runs on a new backend by itself: ``python -m steermoe_kernels``, and ``pytest tests/kernels -k NAME``. Both use tensors on the CPU
if the backend takes them there, else on a CUDA device; for any other device, `__main__` and tests/kernels/problems.py have to learn of it.
A backend defines

``unavailable() -> str | None``
    None if it can run on this machine, else the reason in one sentence. Must not compile, tune or initialise a driver.
``rejects(device, dtype, options=PLAIN) -> str | None``
    None if it takes a stream of this ``torch.device`` and ``torch.dtype`` through such a pass, else the reason. The tests leave out what
    it rejects by device and dtype; a pass that it rejects by its options fails there, and is an error to who named the backend.
``AUTO_DEVICES: frozenset[str]`` and ``PRIORITY: int``
    The device types for which ``backend="auto"`` may choose it; of several, the highest priority wins, unless `steermoe_kernels.choice`
    knows which was measured to be faster.
``steer_forward(x, residual, weight, bias, vectors, scale, norm_weight, norm_bias, options) -> (y, normed, gates, probs, stats)``
    Equations of `steermoe_kernels.reference`. ``x`` and ``residual`` (B, T, D) are contiguous and of one dtype, never empty;
    parameters are contiguous, each float32, float16, bfloat16 or float64. The pool and the norm read ``y`` as it is stored, rounded: the
    backward has nothing else, and must find the same maxima and deviations. ``gates`` (B, T, E), in the accumulation dtype (float32,
    float64 for a float64 stream), exactly zero for experts that were not selected. ``probs``: the full softmax (B, T, E) where
    ``options.keeps_probs``, else of size 0. ``normed`` (B, P, D) and ``stats`` (2, B, P), the mean (zero for RMSNorm) and the reciprocal
    deviation of each of the P = ceil(T / pool_size) normalised frames; both of size 0 without a norm, and there is no pool without one.
``steer_backward(dy, dnormed, dgates, y, gates, probs, stats, weight, vectors, scale, norm_weight, options, needs)``
    ``-> (du, dweight, dbias, dvectors, dscale, dnorm_weight, dnorm_bias)``. Incoming gradients are contiguous or None, never all None;
    ``dy`` and ``dnormed`` have the stream's dtype, ``dgates`` the accumulation dtype. ``needs`` lists seven booleans in the order of the
    results; a gradient that is not needed may be None, or there all the same. ``du`` has the stream's dtype, the others the accumulation
    dtype.
``direct(options, automatic) -> object | None``
    Optional: a way around the operator, for eager calls that nobody watches, through passes with ``options``. ``automatic`` tells that
    STEERMOE_BACKEND may name another backend. The object has ``forward(x, residual, weight, bias, vectors, scale, norm_weight,
    norm_bias)``, with results like `steer_forward`'s but of shape (..., D) and (..., E) for ``x`` (..., D), and None instead of those of
    size 0; and ``backward`` from ``dy`` to ``norm_weight``, and ``needs``, as in `steer_backward`. Both answer with tuples, and are kept
    for later calls. Their arguments are whatever the caller gave, not checked by anybody. They return None to decline arguments, unsuitable
    ones or such as are not worth it, and the call goes its usual way.

Of equal logits the first expert is selected, as after rounding: products that underflow tie with zero, and experts with equal rows tie. A
NaN counts as the largest logit, so that it is never steered past in silence.

Results are tensors of their own: none shares memory with another or with an argument, not even two of size 0. Accumulate in the
accumulation dtype, with autocast off (it reaches into backends that call torch). The tests hold every result to twice the error of the same
formula in plain PyTorch; the gradients of parameters are sums over all frames, in which one chain of float32 additions is too much.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import warnings
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType

import torch

from .. import choice

__all__ = ["PLAIN", "Options", "automatic_backend", "available_backends", "backend_states", "get_backend", "select_backend"]


@dataclass(frozen=True)
class Options:
    """What a steering pass does beyond the tensors it is given.

    ``norm`` and ``pool`` are "" where there is none; ``top_k`` equals the number of experts for dense routing. The fields stand in the
    order of the operator's schema, from which they are filled by position; ``num_experts``, which is read off the weight, comes last.
    """

    norm: str = ""
    eps: float = 1e-5
    pool: str = ""
    pool_size: int = 1
    top_k: int = 1
    renormalize: bool = True
    num_experts: int = 1

    @property
    def dense(self) -> bool:
        return self.top_k == self.num_experts

    @property
    def keeps_probs(self) -> bool:
        """The backward of gates that are not renormalised needs the softmax of the experts left out, too."""
        return not self.dense and not self.renormalize


PLAIN = Options()  # for those who ask about a stream, whatever the pass


@cache
def _modules() -> dict[str, ModuleType | ImportError]:
    """Every backend by name; of one that cannot be imported, the error."""
    found: dict[str, ModuleType | ImportError] = {}
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        try:
            module = importlib.import_module(f"{__name__}.{name}")
        except ImportError as error:
            found[name] = error
        else:
            if hasattr(module, "steer_forward"):
                found[name] = module
    return found


def _unavailable(name: str) -> str | None:
    module = _modules()[name]
    return f"it cannot be imported: {module}" if isinstance(module, ImportError) else module.unavailable()


def _load(name: str) -> ModuleType:
    module = _modules()[name]
    if isinstance(module, ImportError):
        raise module
    return module


def backend_states() -> dict[str, str | None]:
    """Every backend's name, with None if it can run on this machine and else the reason why not."""
    return {name: _unavailable(name) for name in _modules()}


def available_backends() -> list[str]:
    """Names of the backends that can run on this machine; "reference" is always among them."""
    return [name for name, reason in backend_states().items() if reason is None]


def get_backend(name: str) -> ModuleType:
    """The backend called ``name``. ValueError if there is none of that name, RuntimeError if it cannot run on this machine."""
    if not isinstance(name, str) or name not in _modules():
        raise ValueError(f"unknown backend {name!r}: choose one of auto, {', '.join(_modules())}")
    if (reason := _unavailable(name)) is not None:
        raise RuntimeError(f"backend {name!r} is unavailable: {reason}")
    return _load(name)


def select_backend(
    name: str, device: torch.device, dtype: torch.dtype, shape: choice.Shape | None = None, options: Options = PLAIN
) -> ModuleType:
    """The backend for a stream of this device, dtype and shape, and a pass with these options.

    ``name`` "auto" takes the one the environment variable STEERMOE_BACKEND names, or else the best available for the device: the one
    measured to be the fastest for the ``shape``, where there is such a measurement. Raises as `get_backend`, and RuntimeError if the
    backend that was asked for does not take this device, dtype or pass.
    """
    if name == "auto" and (name := os.environ.get("STEERMOE_BACKEND") or "auto") != "auto" and name not in _modules():
        raise ValueError(f"STEERMOE_BACKEND={name} names no backend: choose one of auto, {', '.join(_modules())}")
    if name != "auto":
        backend = get_backend(name)
        if (reason := backend.rejects(device, dtype, options)) is not None:
            raise RuntimeError(f"backend {name!r} cannot run this: {reason}")
        return backend
    return automatic_backend(device, dtype, None if shape is None else choice.fastest(device, dtype, shape), options)


@lru_cache(maxsize=64)
def automatic_backend(device: torch.device, dtype: torch.dtype, measured: str | None = None, options: Options = PLAIN) -> ModuleType:
    """The backend for "auto" where the environment names none: ``measured``, if it runs here, else the highest priority that does."""

    def runs(name: str) -> bool:
        return _unavailable(name) is None and _load(name).rejects(device, dtype, options) is None

    if measured is not None and runs(measured):
        return _load(measured)
    made_for_it = [name for name, found in _modules().items() if device.type in getattr(found, "AUTO_DEVICES", ())]
    usable = [_load(name) for name in made_for_it if runs(name)]
    missing = "; ".join(f"{name}: {reason}" for name in made_for_it if (reason := _unavailable(name)) is not None)
    if missing and not usable:
        warnings.warn(f"plain PyTorch steers here, slower than it could ({missing})", RuntimeWarning, stacklevel=2)
    return max(usable, key=lambda backend: backend.PRIORITY, default=_load("reference"))
