"""What the layers of one steered encoder have in common: the aligner, which is whatever ``encoder.steering`` is by now, and the pool."""

from __future__ import annotations

import weakref
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import nn

from ..modules import FusedSteerMoE

__all__ = ["Steering"]


class Steering:
    """Made once for an encoder, and shared by its layers.

    Others may put another module in the aligner's place: an aligner of their own, or a wrapper that trains a copy, as peft's for
    ``modules_to_save``. So no layer keeps the aligner; each pass asks for it.
    """

    def __init__(self, encoder: nn.Module, aligner: FusedSteerMoE, pool: str | None, pool_size: int) -> None:
        self.feature_dim, self.num_layers = aligner.feature_dim, aligner.num_layers
        self.pool, self.pool_size = pool, pool_size
        self._aligner = aligner  # the last one seen, for layers that outlive their encoder
        # Weak, as the encoder holds its layers and they hold this: it is to be freed at once when it is let go. And it does not go along
        # with a layer that is copied or saved alone; a copy of the whole encoder tells which it is when it runs.
        self._encoder: weakref.ref[nn.Module] | None = weakref.ref(encoder)

    @property
    def aligner(self) -> FusedSteerMoE:
        """The encoder's aligner, for a layer that does not get it from a pass. Raises as `aligner_of`."""
        encoder = self._known_encoder()
        return self._aligner if encoder is None else self.aligner_of(encoder)

    def _known_encoder(self) -> nn.Module | None:
        return None if self._encoder is None else self._encoder()

    def aligner_of(self, encoder: nn.Module) -> FusedSteerMoE:
        """``encoder.steering``, or what it wraps, where ``encoder`` is the steered one or a replica of it.

        RuntimeError if it has been deleted, TypeError for what is no aligner, ValueError for one of another width or number of layers.
        """
        found: Any = encoder._modules.get("steering")
        if not isinstance(found, FusedSteerMoE) and isinstance(method := getattr(found, "layer_parameters", None), MethodType):
            found = method.__self__  # a wrapper that forwards attributes forwards methods of what it has in use
        if not isinstance(found, FusedSteerMoE) or (found.feature_dim, found.num_layers) != (self.feature_dim, self.num_layers):
            self._refuse(type(encoder).__name__, found)
        if not torch.compiler.is_compiling():
            if (known := self._known_encoder()) is None:
                self._encoder = weakref.ref(encoder)
            if known is None or known is encoder:
                self._aligner = found
        return found

    def _refuse(self, name: str, found: Any) -> NoReturn:
        if found is None:
            raise RuntimeError(f"{name} is steered, but its aligner, the submodule steering, is gone: put it back, or call unsteer_encoder")
        if not isinstance(found, FusedSteerMoE):
            raise TypeError(
                f"the steering of {name} must be a FusedSteerMoE, or forward to one as peft's wrappers do, got {type(found).__name__}"
            )
        raise ValueError(
            f"{name} is steered in {self.num_layers} layers of width {self.feature_dim}, its new aligner has {found.num_layers} of width "
            f"{found.feature_dim}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_encoder": None}
