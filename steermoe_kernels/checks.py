"""What a steering pass accepts, and the sentence a caller reads when it gets something else.

Each message names the argument, says what would do, and what came. Nothing is computed or changed before the checks have passed.
"""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "check_layer",
    "check_norm",
    "check_parameters",
    "check_pool",
    "check_projection",
    "check_renormalize",
    "check_scale",
    "check_size",
    "check_stream",
    "check_tensors",
    "check_top_k",
    "check_weight",
    "check_width",
    "not_dense",
]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LARGEST_POOL = 2**31 - 1


def check_top_k(top_k: int | None, num_experts: int) -> int:
    """``top_k`` as a number: ``num_experts`` for None. ValueError unless between 1 and ``num_experts``."""
    if top_k is None:
        return num_experts
    top_k = _integer("top_k", top_k, " or None")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be between 1 and num_experts ({num_experts}), got {top_k}")
    return top_k


def check_pool(pool: str | None, pool_size: int) -> int:
    """``pool_size`` as an int. ValueError unless ``pool`` is "max" or "mean", ``pool_size`` 1 to 2^31 - 1; or None with a size of 1."""
    if pool not in (None, "max", "mean"):
        raise ValueError(f"pool must be None, 'max' or 'mean', got {pool!r}")
    pool_size = _integer("pool_size", pool_size)
    if pool_size < 1:
        raise ValueError(f"pool_size must be at least 1, got {pool_size}")
    if pool_size > _LARGEST_POOL:
        raise ValueError(f"pool_size must be at most {_LARGEST_POOL}, got {pool_size}")
    if pool is None and pool_size != 1:
        raise ValueError(f"pool None pools nothing, and pool_size must be 1 then, got {pool_size}")
    return pool_size


def check_norm(eps: float, rms: bool) -> float:
    """``eps`` as a float. TypeError unless it is a number and ``rms`` a bool; ValueError for an ``eps`` below zero or without bounds."""
    if not _is_number(eps):
        raise TypeError(f"eps must be a number, got {eps!r}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    if not isinstance(rms, bool):
        raise TypeError(f"rms must be True or False, got {rms!r}")
    return _finite("eps", eps, torch.float64)


def check_renormalize(renormalize: bool) -> None:
    """TypeError unless it is a bool."""
    if not isinstance(renormalize, bool):
        raise TypeError(f"renormalize must be True or False, got {renormalize!r}")


def check_scale(scale: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """A tensor as it is, a number as a float. TypeError for anything else, ValueError for a number that is not finite in ``dtype``."""
    if isinstance(scale, Tensor):
        _check_dense("scale", scale)
        return scale
    if not _is_number(scale):
        raise TypeError(f"scale must be a tensor of one element or a number, got {scale!r}")
    return _finite("scale", scale, dtype)


def check_parameters(steering_scale: Tensor | float, dtype: torch.dtype | None) -> float:
    """``steering_scale`` as a float.

    TypeError for one that is no real number, and for a ``dtype`` that the operators do not take; ValueError for one that is not finite.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise TypeError(f"dtype must be torch.float32, float16, bfloat16 or float64, got {dtype!r}")
    number = steering_scale
    if isinstance(number, Tensor) and number.numel() == 1 and not number.is_complex() and not number.is_meta:
        number = number.item()
    if isinstance(number, Tensor) or not _is_number(number):
        raise TypeError(f"steering_scale must be a number, got {steering_scale!r}")
    return _finite("steering_scale", number, torch.get_default_dtype() if dtype is None else dtype)


def check_size(name: str, size: int) -> int:
    """``size`` as an int. TypeError unless it is one, ValueError below one."""
    size = _integer(name, size)
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    return size


def check_layer(layer: int, num_layers: int) -> None:
    """IndexError unless ``layer`` is between 0 and ``num_layers - 1``."""
    layer = _integer("layer", layer)
    if not 0 <= layer < num_layers:
        raise IndexError(f"layer must be between 0 and num_layers - 1 ({num_layers - 1}), got {layer}")


def check_stream(name: str, h: Tensor, rank: int | None = None) -> None:
    """TypeError unless ``h`` is a floating tensor; ValueError unless it has ``rank`` dimensions (at least one for None)."""
    _check_dense(name, h)
    if h.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {_dtype(h)}")
    if rank is not None and h.dim() != rank:
        raise ValueError(f"{name} must be (batch, time, width) to be pooled over time, got shape {tuple(h.shape)}")
    if h.dim() == 0:
        raise ValueError(f"{name} must have the width as its last dimension, got a tensor with no dimensions")


def check_width(name: str, h: Tensor, width: int) -> None:
    """As `check_stream`, and ValueError unless the last dimension of ``h`` is ``width``."""
    check_stream(name, h)
    if h.shape[-1] != width:
        raise ValueError(f"{name} must have the aligner's width ({width}) as its last dimension, got shape {tuple(h.shape)}")


def check_weight(weight: Tensor, x: Tensor) -> None:
    """TypeError unless it is a dense tensor; ValueError unless it has two dimensions."""
    _check_dense("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must be a tensor of shape (E, {x.shape[-1]}), got {tuple(weight.shape)}")


def check_tensors(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    vectors: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
) -> None:
    """Shapes, dtypes and devices of one pass, against ``x`` (..., D) and ``weight`` (E, D). ValueError or TypeError."""
    width = x.shape[-1]
    if width < 1:
        raise ValueError(f"the stream must have at least one column, got shape {tuple(x.shape)}")
    _check_parameter("weight", weight, x, ("E", width))
    num_experts = weight.shape[0]
    if num_experts < 1:
        raise ValueError("weight must hold at least one expert, got shape (0, ...)")
    _check_parameter("vectors", vectors, x, (num_experts, width))
    _check_parameter("scale", scale, x, ())
    for name, tensor, shape in (
        ("bias", bias, (num_experts,)),
        ("norm_weight", norm_weight, (width,)),
        ("norm_bias", norm_bias, (width,)),
    ):
        if tensor is not None:
            _check_parameter(name, tensor, x, shape)
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
        if residual.device != x.device:
            raise ValueError(f"residual must be on x's device {x.device}, got {residual.device}")


def check_memory(**tensors: Tensor | None) -> None:
    """RuntimeError for one whose storage has been freed: kernels would read at address 0, or take it for one that is absent."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.data_ptr() < _LOW and tensor.numel() and tensor.untyped_storage().nbytes() == 0:
            raise RuntimeError(f"{name} has no memory: its storage has been freed, as FSDP does with parameters that are not in use")


_LOW = 1 << 38  # no storage is so large; what begins at address 0 lies below, and little else does, which has to be asked


def check_projection(h: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Shapes, dtypes and devices of a projection of frames ``h`` (..., D). ValueError or TypeError."""
    if isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[1] != h.shape[-1]:
        raise ValueError(f"the projection takes frames of width {weight.shape[1]}, got {tuple(h.shape)}")
    _check_parameter("the projection's weight", weight, h, ("output_dim", h.shape[-1]))
    if bias is not None:
        _check_parameter("the projection's bias", bias, h, (weight.shape[0],))


def _check_parameter(name: str, tensor: Tensor, x: Tensor, shape: tuple[int | str, ...]) -> None:
    _check_dense(name, tensor)
    if tensor.shape == shape and tensor.dtype in _DTYPES and tensor.device == x.device:
        return
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {_dtype(tensor)}")
    fits = tensor.dim() == len(shape) and all(isinstance(want, str) or have == want for have, want in zip(tensor.shape, shape, strict=True))
    if not fits:
        wanted = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name} must have shape ({wanted}) for a stream of width {x.shape[-1]}, got {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on the stream's device {x.device}, got {tensor.device}")


def _check_dense(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if kind := not_dense(tensor):
        raise TypeError(f"{name} must be a dense tensor, got a {kind} one")


def not_dense(tensor: Tensor) -> str:
    """What a tensor is where it is not dense, else nothing."""
    if tensor.is_nested:
        return "nested"
    return "" if tensor.layout is torch.strided else str(tensor.layout).removeprefix("torch.").removeprefix("_")


def _finite(name: str, value: Any, dtype: torch.dtype) -> float:
    """``value`` as a float. ValueError unless ``dtype`` holds it."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= torch.finfo(dtype).max:
        raise ValueError(f"{name} must be a finite number of {str(dtype).removeprefix('torch.')}, got {value!r:.60}")
    return number


def _is_number(value: Any) -> bool:
    """Whether it is a real number; NumPy's are, bools are not."""
    return isinstance(value, (int, float, Real)) and not isinstance(value, bool)


def _integer(name: str, value: Any, otherwise: str = "") -> int:
    """``value`` as an int, from whatever counts as one (NumPy's integers do, bools do not). TypeError for anything else."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer{otherwise}, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer{otherwise}, got {value!r}") from None


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
