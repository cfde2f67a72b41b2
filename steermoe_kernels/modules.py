"""`FusedSteerMoE`: the trained part of SteerMoE as a torch.nn module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoints
from . import functional as SF
from .backends import get_backend
from .checks import check_layer, check_parameters, check_renormalize, check_size, check_top_k, check_width
from .reference import compute_dtype

__all__ = ["FusedSteerMoE", "LayerParameters"]


class LayerParameters(NamedTuple):
    """One layer's slices, in the order `functional.steer` takes them."""

    weight: Tensor  # (E, D)
    bias: Tensor  # (E,)
    vectors: Tensor  # (E, D)
    scale: Tensor  # ()


class FusedSteerMoE(nn.Module):
    """Layer-wise mixture-of-experts steering on fused kernels, and the projection to the language model.

    Parameters, named as in public checkpoints: ``steering_vectors`` (L, E, D) drawn from 0.01 N(0, 1); ``router``, a
    Linear(D, L * E); ``layer_scales`` (L,), each ``steering_scale``; ``prompt_proj``, a Linear(D, output_dim), or None.

    ``router`` and ``prompt_proj`` are read, not called: parametrizations, pruning and torch's older weight_norm and spectral_norm work;
    other hooks on the two are not run; one whose class has a forward of its own, such as an adapter, or whose weight is no tensor, such as
    a quantized Linear, raises TypeError when it is read.

    ``top_k`` None routes densely. ``backend`` is "auto" or one of `available_backends()`. The parameters may stay in float32 while the
    stream is in half precision. Raises ValueError for sizes below one, ``top_k`` outside 1 .. E and a scale that is not finite, TypeError
    for arguments of another kind, and as `get_backend`.
    """

    def __init__(
        self,
        feature_dim: int,
        num_experts: int = 8,
        num_layers: int = 1,
        *,
        top_k: int | None = None,
        renormalize: bool = True,
        steering_scale: float = 0.1,
        output_dim: int | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        feature_dim, num_experts = check_size("feature_dim", feature_dim), check_size("num_experts", num_experts)
        num_layers = check_size("num_layers", num_layers)
        output_dim = None if output_dim is None else check_size("output_dim", output_dim)
        check_renormalize(renormalize)
        steering_scale = check_parameters(steering_scale, dtype)
        top_k = None if top_k is None else check_top_k(top_k, num_experts)
        if backend != "auto":
            get_backend(backend)
        self.feature_dim, self.num_experts, self.num_layers = feature_dim, num_experts, num_layers
        self.top_k, self.renormalize, self.backend = top_k, renormalize, backend
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.steering_vectors = nn.Parameter(0.01 * torch.randn(num_layers, num_experts, feature_dim, **like))
        self.router = nn.Linear(feature_dim, num_layers * num_experts, **like)
        self.layer_scales = nn.Parameter(torch.full((num_layers,), steering_scale, **like))
        self.prompt_proj = None if output_dim is None else nn.Linear(feature_dim, output_dim, **like)
        self._records: list[dict[int, Tensor]] = []

    @classmethod
    def for_encoder(cls, encoder: nn.Module, num_experts: int = 8, **kwargs: Any) -> FusedSteerMoE:
        """An aligner with the width, number of layers, device and dtype of ``encoder``; ``kwargs`` as in the constructor."""
        from .encoders import describe_encoder

        shape = describe_encoder(encoder)
        kwargs.setdefault("device", shape.device)
        kwargs.setdefault("dtype", shape.dtype)
        return cls(shape.feature_dim, num_experts, shape.num_layers, **kwargs)

    @classmethod
    def from_checkpoint(cls, checkpoint: str | Mapping[str, Tensor], **kwargs: Any) -> FusedSteerMoE:
        """An aligner with the sizes and weights of a checkpoint: a path, or a state dict with the public implementation's keys or ours.

        ``kwargs`` may hold what a checkpoint does not say: ``top_k``, ``renormalize``, ``backend``, ``device``, ``dtype``. TypeError for
        others, OSError for a checkpoint that is not there, RuntimeError for one that holds no whole aligner, naming all that is missing or
        mis-shaped.
        """
        state = checkpoints.aligner_state(checkpoints.read(checkpoint))
        sizes = checkpoints.sizes(state)
        if said := [name for name in ("feature_dim", "num_experts", "num_layers", "output_dim", "steering_scale") if name in kwargs]:
            raise TypeError(f"{' and '.join(said)} must be left to the checkpoint, which says {sizes}")
        aligner = cls(**(kwargs | sizes))
        aligner.load_state_dict(state)
        return aligner

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict with our keys, or a public checkpoint's, in which the aligner lies among the backbones' weights.

        With ``strict``, missing, unknown and mis-shaped keys, and values without numbers to copy, are all named in one RuntimeError, and
        nothing has been changed then.
        """
        state = checkpoints.aligner_state(state_dict)
        if strict:
            checkpoints.check_fits(state, self.state_dict(), assign)
        return super().load_state_dict(state, strict=strict, assign=assign)

    def layer_parameters(self) -> list[LayerParameters]:
        """Every layer's W (E, D), b (E,), V (E, D) and s (), cut once: their gradients are stacked, where slices' are L zero-padded sums.

        TypeError where the router cannot be read.
        """
        router = self.router
        _make_ready("router", router)
        try:
            rows = router.weight.view(self.num_layers, self.num_experts, self.feature_dim).unbind()
            biases = router.bias.view(self.num_layers, self.num_experts).unbind()
        except AttributeError:
            _check_tensors("router", weight=router.weight, bias=router.bias)
            raise
        slices = zip(rows, biases, self.steering_vectors.unbind(), self.layer_scales.unbind(), strict=True)
        return [LayerParameters(*layer) for layer in slices]

    def layer(self, layer: int) -> LayerParameters:
        """W (E, D), b (E,), V (E, D) and s () of one layer. IndexError if there is none, TypeError where the router cannot be read."""
        check_layer(layer, self.num_layers)
        router, rows = self.router, slice(layer * self.num_experts, (layer + 1) * self.num_experts)
        _make_ready("router", router)
        try:
            return LayerParameters(router.weight[rows], router.bias[rows], self.steering_vectors[layer], self.layer_scales[layer])
        except TypeError:
            _check_tensors("router", weight=router.weight, bias=router.bias)
            raise

    def forward(
        self, h: Tensor, layer: int = 0, *, return_gates: bool = False, parameters: LayerParameters | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Steer ``h`` (..., D) with the experts of ``layer``: ``y = h + s (g V)`` in ``h``'s shape and dtype.

        With ``return_gates`` also ``g`` (..., E), float32 (float64 of a float64 stream). ``parameters``: the layer's slices, where
        `layer_parameters` has cut them already. IndexError if there is no such layer; dtypes and other errors as `functional.steer`.
        """
        check_width("h", h, self.feature_dim)
        slices = self.layer(layer) if parameters is None else parameters
        y, gates = SF.steer(h, *slices, top_k=self.top_k, renormalize=self.renormalize, backend=self.backend)
        self.record(layer, gates)
        return (y, gates) if return_gates else y

    def steer_norm(
        self,
        x: Tensor,
        layer: int,
        norm: nn.Module,
        *,
        parameters: LayerParameters | None = None,
        residual: Tensor | None = None,
        pool: str | None = None,
        pool_size: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """`functional.steer_norm` with the experts of ``layer`` and ``norm``, the LayerNorm or RMSNorm that reads the stream next.

        ``x`` and ``residual`` (..., D), with ``pool`` (B, T, D). ``norm`` is torch's or has its attributes; an RMSNorm is told by the name
        of its class. Gemma's, which multiplies by ``1 + weight``, does not fit. ``parameters``: the layer's slices, where
        `layer_parameters` has cut them already. Returns ``y`` (..., D) and ``normed`` (..., D), or (B, ceil(T / pool_size), D) with
        ``pool``. IndexError if there is no such layer, TypeError or ValueError for another norm; else as `functional.steer_norm`.
        """
        check_width("x", x, self.feature_dim)
        check_layer(layer, self.num_layers)
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        eps, rms = _eps(norm, x, dtype), "RMSNorm" in (kind := type(norm).__name__) or kind == "T5LayerNorm"
        y, normed, gates = SF.steer_norm(
            x,
            *(self.layer(layer) if parameters is None else parameters),
            norm.weight,  # type: ignore[arg-type]
            getattr(norm, "bias", None),
            residual=residual,
            eps=eps,
            rms=rms,
            pool=pool,
            pool_size=pool_size,
            top_k=self.top_k,
            renormalize=self.renormalize,
            backend=self.backend,
        )
        self.record(layer, gates)
        return y, normed

    def project(self, h: Tensor) -> Tensor:
        """``q = n P^T + c``: pooled, normalised frames (..., D) to the language model's width (..., output_dim), in their dtype.

        ValueError without a projection, TypeError where it cannot be read; else as `functional.project`.
        """
        proj = self.prompt_proj
        if proj is None:
            raise ValueError("this aligner has no projection: give output_dim when making it")
        _make_ready("prompt_proj", proj)
        _check_tensors("prompt_proj", weight=proj.weight)
        return SF.project(h, proj.weight, proj.bias)

    @property
    def is_recording(self) -> bool:
        """Whether a `record_gates` block is open."""
        return bool(self._records)

    def record(self, layer: int, gates: Tensor) -> None:
        """Hand the gates of a pass through ``layer`` to the open `record_gates` blocks."""
        for record in self._records:
            record[layer] = gates

    @contextmanager
    def record_gates(self) -> Iterator[dict[int, Tensor]]:
        """A dict, layer -> gates (B, T, E), differentiable, filled by every pass inside the block; a layer's latest pass stays.

        They lie as the layer's frames do: (T, B, E) where an encoder's layers take (T, B, D), as torch's do without ``batch_first``.
        Passes in other threads of the process are among them. In a reentrant checkpoint gates have no gradient: steered encoders that make
        such checkpoints raise RuntimeError, those made by hand cannot tell.
        """
        record: dict[int, Tensor] = {}
        self._records.append(record)
        try:
            yield record
        finally:
            self._records = [kept for kept in self._records if kept is not record]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_records": []}  # an open block belongs to this instance, not to its copies

    def extra_repr(self) -> str:
        return (
            f"feature_dim={self.feature_dim}, num_experts={self.num_experts}, num_layers={self.num_layers}, top_k={self.top_k}, "
            f"renormalize={self.renormalize}, backend={self.backend!r}"
        )


def _make_ready(name: str, linear: nn.Module) -> None:
    """TypeError for what does not compute with its weight and bias alone.

    Runs the hooks in which torch's pruning, and its older weight_norm and spectral_norm, make the weight anew for each forward.
    """
    if type(linear).forward is not nn.Linear.forward:
        kind = f"{type(linear).__module__}.{type(linear).__qualname__}"
        raise TypeError(
            f"{name} must be a torch.nn.Linear, got {kind}, which has a forward of its own: FusedSteerMoE reads the weight and bias of "
            f"{name} and never calls it (parametrizations, as of torch.nn.utils.parametrize, are read with them)"
        )
    for hook in linear._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):
            hook(linear, ())  # none of them looks at the input


def _check_tensors(name: str, **tensors: object) -> None:
    for part, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}.{part} must be a tensor, got {type(tensor).__name__}: FusedSteerMoE reads it and never calls {name}")


def _eps(norm: Any, x: Tensor, dtype: torch.dtype) -> float:
    """A norm's epsilon, by the names in use; torch's RMSNorm may leave it to torch, for what it reads is of this ``dtype``.

    TypeError for what is no LayerNorm or RMSNorm, ValueError for one over other dimensions than the last.
    """
    names = [name for name in ("eps", "variance_epsilon") if hasattr(norm, name)]
    if not names or not hasattr(norm, "weight") or isinstance(norm, _OTHER_NORMS):
        raise TypeError(f"norm must be a LayerNorm or an RMSNorm with an eps, got {type(norm).__name__}")
    shape = tuple(getattr(norm, "normalized_shape", x.shape[-1:]))
    if norm.weight is None and shape != x.shape[-1:]:  # the shape of a weight is checked with the others
        raise ValueError(f"norm must be over the last dimension, {tuple(x.shape[-1:])}, got one over {shape}")
    eps = getattr(norm, names[0])
    return _unstated_eps(dtype) if eps is None else float(eps)


def _unstated_eps(dtype: torch.dtype) -> float:
    """What ``F.rms_norm`` adds where it is given no eps: of half precision the machine epsilon of the dtype, as torch's documentation says,
    or of float32, as versions of torch compute."""
    return torch.finfo(dtype if _ADDS_EPS_OF_HALF else compute_dtype(dtype)).eps


# Looked at here, where no tracer and no other device is in the way. The number's square lies between the two: float32's leaves about one.
_ADDS_EPS_OF_HALF = F.rms_norm(torch.full((1,), 2.0**-9, dtype=torch.bfloat16, device="cpu"), (1,)).item() < 0.5


_OTHER_NORMS = (nn.GroupNorm, nn.modules.batchnorm._NormBase)  # instance norms are of the second kind
