"""How many bytes a pass keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

__all__ = ["kept_for_backward"]


def kept_for_backward(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> tuple[int, int]:
    """Bytes of every storage saved while ``run`` computes its output: without that output, and with it where it is among them.

    Each storage counts once and in full, the parameters' not at all: they are there anyway.
    """
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    for parameter in parameters:
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    with_output = sum(saved.values())
    saved.pop(output.untyped_storage().data_ptr(), None)
    return sum(saved.values()), with_output
