"""Fused kernels for SteerMoE: a frozen audio encoder joined to a frozen language model by a few million trained parameters."""

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError("steermoe_kernels runs on PyTorch: pip install torch", name="torch") from None

from . import functional, reference
from ._version import __version__
from .backends import available_backends
from .encoders import patch_steermoe, steer_encoder, unsteer_encoder
from .modules import FusedSteerMoE

__all__ = [
    "FusedSteerMoE",
    "__version__",
    "available_backends",
    "functional",
    "patch_steermoe",
    "reference",
    "steer_encoder",
    "unsteer_encoder",
]
