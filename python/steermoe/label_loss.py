"""Cross entropy over a large vocabulary, without its logits: chunks of tokens, each computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = ["IGNORED", "chunked_cross_entropy"]

# The label of a token that is not to be learnt.
IGNORED = -100
# Logits of a chunk, in elements: 64 MiB in float32, which is 110 tokens of a vocabulary of 152,000 and keeps a matrix product busy.
CHUNK_ELEMENTS = 1 << 24


def chunked_cross_entropy(
    hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], vocabulary: int, *, chunk_elements: int = CHUNK_ELEMENTS
) -> Tensor:
    """``sum_i -log softmax(head(hidden_i))[targets_i]``, a scalar in float32; 0 for no targets.

    ``hidden`` (N, D); ``targets`` (N,) in 0 .. vocabulary - 1; ``head`` maps (n, D) to logits (n, vocabulary). At no time are more than
    ``chunk_elements`` logits alive, or one token's if that is more: the forward keeps ``hidden`` only, and the backward computes each
    chunk's logits again.
    """
    tokens = max(1, chunk_elements // vocabulary)
    total = hidden.sum() * 0.0 if hidden.shape[0] == 0 else hidden.new_zeros((), dtype=torch.float32)

    def cross_entropy(part: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head(part).float(), wanted, reduction="sum")

    for part, wanted in zip(hidden.split(tokens), targets.split(tokens), strict=True):
        if not part.shape[0]:
            continue
        if torch.is_grad_enabled() and part.requires_grad:
            total = total + checkpoint(cross_entropy, part, wanted, use_reentrant=False, preserve_rng_state=False)
        else:
            total = total + cross_entropy(part, wanted)
    return total.float()
