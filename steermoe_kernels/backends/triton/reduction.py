"""The second, small reduction: the partials of all programs become the parameters' gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import load_experts


@triton.jit
def sum_partials(partials, count, size: tl.constexpr, places, inside):
    """Sum over the first dimension of ``partials`` (count, size), in a fixed order, at ``places`` (i, j) within a row."""
    ROWS: tl.constexpr = 16 if places.shape[0] * places.shape[1] <= 512 else 4
    rows, total = tl.arange(0, ROWS).to(tl.int64)[:, None, None], tl.zeros(places.shape, tl.float32)
    for start in range(0, count, ROWS):
        tile = partials + (start + rows) * size + places[None, :, :]
        total += tl.sum(tl.load(tile, mask=(start + rows < count) & inside[None, :, :], other=0.0), 0)
    return total


# One program: e experts, d columns of the width. The first of all experts' programs also do the norm's parameters, and the very first the
# ones that have no width.
#
#     dW = sum dz^T y - s M V          db = sum dz          dgamma, dbeta
#     dV = s sum g^T d                 ds = sum g * a
@triton.jit(do_not_specialize=["splits", "programs", "norm_splits"], do_not_specialize_on_alignment=["scale"])
def parameter_reduction_kernel(
    dweight_partials,  # (splits, E, D); None, like the others, where the gradient is not needed
    mixed_partials,  # (splits, E, E)
    dvectors_partials,  # (splits, E, D)
    dbias_partials,  # (programs, E)
    dscale_partials,  # (programs, E)
    dgamma_partials,  # (norm_splits, D)
    dbeta_partials,  # (norm_splits, D)
    vectors,  # (E, D)
    scale,  # ()
    dweight,  # (E, D), float32 like all of them
    dvectors,  # (E, D)
    dbias,  # (E,)
    dscale,  # ()
    dgamma,  # (D,)
    dbeta,  # (D,)
    splits,
    programs,
    norm_splits,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ALL_EXPERTS: tl.constexpr,
):
    experts = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    s = tl.load(scale).to(tl.float32)
    places, inside = experts[:, None] * D + columns[None, :], (experts < E)[:, None] & (columns < D)[None, :]
    if dweight is not None:
        gradient = sum_partials(dweight_partials, splits, E * D, places, inside)
        for start in range(0, E, 16):
            others = start + tl.arange(0, 16)
            pairs, known = experts[:, None] * E + others[None, :], (experts < E)[:, None] & (others < E)[None, :]
            M = sum_partials(mixed_partials, splits, E * E, pairs, known)
            V = load_experts(vectors, others, columns, E, D).to(tl.float32)
            gradient -= s * tl.sum(M[:, :, None] * V[None, :, :], 1)
        tl.store(dweight + places, gradient, mask=inside)
    if dvectors is not None:
        tl.store(dvectors + places, s * sum_partials(dvectors_partials, splits, E * D, places, inside), mask=inside)
    if tl.program_id(0) == 0:
        row, within = columns[None, :], (columns < D)[None, :]
        if dgamma is not None:
            tl.store(dgamma + row, sum_partials(dgamma_partials, norm_splits, D, row, within), mask=within)
        if dbeta is not None:
            tl.store(dbeta + row, sum_partials(dbeta_partials, norm_splits, D, row, within), mask=within)
        if tl.program_id(1) == 0:
            every = tl.arange(0, ALL_EXPERTS)[None, :]
            if dbias is not None:
                tl.store(dbias + every, sum_partials(dbias_partials, programs, E, every, every < E), mask=every < E)
            if dscale is not None:
                tl.store(dscale, tl.sum(tl.sum(sum_partials(dscale_partials, programs, E, every, every < E), 1), 0))
