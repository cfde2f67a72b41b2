"""The backward kernels: the gradient of the stream, and the sums over frames that make the parameters' gradients.

The step is undone instead of remembered, and not even ``u = y - s (g V)`` is formed: it is only needed in

    dW = dz^T u = dz^T y - s M V,        M = dz^T g   (E, E)

The gradient at y is linear in the tiles that were read, with numbers of each row and gamma of each column:

    d = dy + rstd (t - mean(t) - xhat mean(t xhat)) = dy + rstd t + slope y + offset,          t = dn gamma
    slope = -rstd^2 mean(t xhat),   offset = -rstd mean(t) - slope mean                        (mean(t) is 0 in an RMSNorm)

and what of it is known before the means are, ``dy + rstd t``, can be multiplied with V on the way to them:

    a = d V^T = (dy + rstd t) V^T + slope (y V^T) + offset (1 V^T)            (N, E)

Every program adds up its own frames and stores one float32 partial of each sum; `reduction.py` adds the partials in a fixed order. No
atomics: the same call gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    columns_of,
    dot,
    dot_over_experts,
    dot_over_width,
    from_row,
    load_experts,
    load_frames,
    load_pair,
    store_frames,
    weighted,
)


@triton.jit
def gradient_at_y(dy, dnormed, y, norm_weight, rstd, slope, offset, frames, valid, columns, D: tl.constexpr):
    """``d = dy + rstd t + slope y + offset`` (n, d) in float32; ``dy`` alone, as it is stored, where nothing comes through a norm."""
    if dnormed is None:
        return load_frames(dy, frames, valid, columns, D)
    else:
        t = weighted(load_frames(dnormed, frames, valid, columns, D), norm_weight, columns, D)
        d = rstd[:, None] * t + slope[:, None] * load_frames(y, frames, valid, columns, D).to(tl.float32) + offset[:, None]
        if dy is not None:
            d += load_frames(dy, frames, valid, columns, D).to(tl.float32)
        return d


@triton.jit
def add_products(
    dweight,
    dvectors,
    dy,
    dnormed,
    h,
    norm_weight,
    g,
    dz,
    rstd,
    slope,
    offset,
    frames,
    valid,
    columns,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHT: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """``dweight + h^T dz`` and ``dvectors + d^T g``, both (d, e); ``h`` (N, D) is y wherever there is a norm."""
    if WEIGHT:
        dweight = dot(tl.trans(load_frames(h, frames, valid, columns, D)), dz, dweight, PRECISION)
    if VECTORS and (dy is not None or dnormed is not None):
        d = gradient_at_y(dy, dnormed, h, norm_weight, rstd, slope, offset, frames, valid, columns, D)
        dvectors = dot(tl.trans(d), g, dvectors, PRECISION)
    return dweight, dvectors


@triton.jit
def row_sums(V, experts, E: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr):
    """``1 V^T`` (e,), in float32."""
    total = tl.zeros(experts.shape, tl.float32)
    for chunk in range(CHUNKS):
        total += tl.sum(load_experts(V, experts, columns_of(chunk, BLOCK_D), E, D).to(tl.float32), 1)
    return total


# One program: every ``programs``-th tile of n frames, in two walks over the width.
#
#     mean(t), mean(t xhat), a                                  (n,), (n,), (n, e)   first walk
#     dg = s a + dg_ext                                         (n, e)
#     dz = g (dg - sum_e g dg)                                  (n, e)   not renormalised: q, the full softmax, for g, and dg on the
#     du = d + dz W                                             (n, D)   selection only; second walk
#
# The second walk reads its frames again, at every width, from the second-level cache, where the rows of all programs fit; the sums read
# them a third time. Where the sums ``dz^T y`` and ``g^T d`` fit, a program holds them in registers from its first tile to its last, one
# (d, e) accumulator of the tensor cores a step; where they do not, dz and the rows' numbers are left for `parameter_gradient_kernel`.
@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["scale"])
def steer_backward_kernel(
    dy,  # (N, D) or None
    dnormed,  # (N, D) or None
    dgates,  # (N, E) or None
    y,  # (N, D)
    gates,  # (N, E)
    probs,  # (N, E) or None
    stats,  # (2, N) or None: mean, rstd
    weight,  # (E, D)
    vectors,  # (E, D)
    scale,  # ()
    norm_weight,  # (D,) or None
    du,  # (N, D); None, like the following, where nobody needs it
    dz_out,  # (N, E)
    rows_out,  # (2, N): slope, offset
    dweight_partials,  # (programs, E, D): dz^T y
    mixed_partials,  # (programs, E, E): M
    dvectors_partials,  # (programs, E, D): g^T d
    dbias_partials,  # (programs, E)
    dscale_partials,  # (programs, E): g * a, summed over frames
    count,  # N
    D: tl.constexpr,
    E: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    BLOCK_K: tl.constexpr = BLOCK_E if BLOCK_E > 16 else 16
    WEIGHT: tl.constexpr = dweight_partials is not None
    VECTORS: tl.constexpr = dvectors_partials is not None
    program = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK_E)
    s = tl.load(scale).to(tl.float32)

    one_Vt = tl.zeros((BLOCK_E,), tl.float32)
    if dnormed is not None and NORM == "layer":
        one_Vt = row_sums(vectors, experts, E, D, BLOCK_D, CHUNKS)

    dbias_sum, dscale_sum = tl.zeros((BLOCK_N, BLOCK_E), tl.float32), tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    mixed_sum = tl.zeros((BLOCK_E, BLOCK_E), tl.float32)
    dweight_sums, dvectors_sums = (), ()
    if WEIGHT or VECTORS:
        for _ in tl.static_range(CHUNKS):
            dweight_sums = dweight_sums + (tl.zeros((BLOCK_D, BLOCK_E), tl.float32),)
            dvectors_sums = dvectors_sums + (tl.zeros((BLOCK_D, BLOCK_E), tl.float32),)

    tiles = tl.cdiv(count, BLOCK_N)
    tl.assume(program < tiles)
    for tile in tl.range(program, tiles, tl.num_programs(0), disable_licm=True):
        start = tile * BLOCK_N
        frames = tl.arange(0, BLOCK_N)
        valid = frames < count - start
        mean, rstd = load_pair(stats, start, frames, valid, count)
        dy_tile = dy if dy is None else from_row(dy, start, D)
        dnormed_tile = dnormed if dnormed is None else from_row(dnormed, start, D)
        y_tile = from_row(y, start, D)

        mean_t, mean_txhat = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
        known_Vt = tl.zeros((SPLIT, BLOCK_N, BLOCK_E), tl.float32)
        y_Vt = known_Vt
        for chunk in tl.range(CHUNKS, num_stages=STAGES):
            columns = columns_of(chunk, BLOCK_D)
            V = load_experts(vectors, experts, columns, E, D)
            if dnormed is not None:
                t = weighted(load_frames(dnormed_tile, frames, valid, columns, D), norm_weight, columns, D)
                h = load_frames(y_tile, frames, valid, columns, D)
                if NORM == "layer":
                    mean_t += tl.sum(t, 1)
                mean_txhat += tl.sum(t * ((h.to(tl.float32) - mean[:, None]) * rstd[:, None]), 1)
                y_Vt = dot_over_width(h, V, y_Vt, PRECISION, SPLIT)
                known = rstd[:, None] * t
                if dy is not None:
                    known += load_frames(dy_tile, frames, valid, columns, D).to(tl.float32)
                known_Vt = dot_over_width(known, V, known_Vt, PRECISION, SPLIT)
            elif dy is not None:
                known_Vt = dot_over_width(load_frames(dy_tile, frames, valid, columns, D), V, known_Vt, PRECISION, SPLIT)
        slope = -rstd * rstd * mean_txhat / D
        offset = -rstd * mean_t / D - slope * mean
        a = tl.sum(known_Vt, 0)
        if dnormed is not None:
            a += slope[:, None] * tl.sum(y_Vt, 0) + offset[:, None] * one_Vt[None, :]

        inside, places = valid[:, None] & (experts < E)[None, :], frames[:, None] * E + experts[None, :]
        g = tl.load(from_row(gates, start, E) + places, mask=inside, other=0.0)
        dg = s * a
        if dgates is not None:
            dg += tl.load(from_row(dgates, start, E) + places, mask=inside, other=0.0).to(tl.float32)
        q = g
        if probs is not None:
            q = tl.load(from_row(probs, start, E) + places, mask=inside, other=0.0)
            dg = tl.where(g != 0.0, dg, 0.0)
        dz = q * (dg - tl.sum(q * dg, 1)[:, None])
        dbias_sum += dz
        dscale_sum += g * a
        if dz_out is not None:
            tl.store(from_row(dz_out, start, E) + places, dz, mask=inside)
        if rows_out is not None:
            tl.store(from_row(rows_out, start, 1) + frames, slope, mask=valid)
            tl.store(from_row(rows_out, count + start, 1) + frames, offset, mask=valid)
        if mixed_partials is not None:
            mixed_sum = dot(tl.trans(dz), g, mixed_sum, PRECISION)

        if du is not None:
            for chunk in tl.range(CHUNKS, num_stages=STAGES):
                columns = columns_of(chunk, BLOCK_D)
                W = load_experts(weight, tl.arange(0, BLOCK_K), columns, E, D)
                d = dot_over_experts(dz, W, PRECISION)
                if dy is not None or dnormed is not None:
                    d += gradient_at_y(dy_tile, dnormed_tile, y_tile, norm_weight, rstd, slope, offset, frames, valid, columns, D).to(
                        tl.float32
                    )
                store_frames(from_row(du, start, D), d, frames, valid, columns, D)

        if WEIGHT or VECTORS:
            old_dweight, old_dvectors = dweight_sums, dvectors_sums
            dweight_sums, dvectors_sums = (), ()
            for chunk in tl.static_range(CHUNKS):
                columns = columns_of(chunk, BLOCK_D)
                dweight, dvectors = add_products(
                    old_dweight[chunk],
                    old_dvectors[chunk],
                    dy_tile,
                    dnormed_tile,
                    y_tile,
                    norm_weight,
                    g,
                    dz,
                    rstd,
                    slope,
                    offset,
                    frames,
                    valid,
                    columns,
                    D,
                    PRECISION,
                    WEIGHT,
                    VECTORS,
                )
                dweight_sums, dvectors_sums = dweight_sums + (dweight,), dvectors_sums + (dvectors,)

    exist = experts < E
    if dbias_partials is not None:
        tl.store(dbias_partials + program * E + experts, tl.sum(dbias_sum, 0), mask=exist)
    if dscale_partials is not None:
        tl.store(dscale_partials + program * E + experts, tl.sum(dscale_sum, 0), mask=exist)
    if mixed_partials is not None:
        places = (program * E + experts[:, None]) * E + experts[None, :]
        tl.store(mixed_partials + places, mixed_sum, mask=exist[:, None] & exist[None, :])
    if WEIGHT or VECTORS:
        for chunk in tl.static_range(CHUNKS):
            columns = columns_of(chunk, BLOCK_D)
            places = (program * E + experts[None, :]) * D + columns[:, None]
            inside = (columns < D)[:, None] & exist[None, :]
            if WEIGHT:
                tl.store(dweight_partials + places, dweight_sums[chunk], mask=inside)
            if VECTORS:
                tl.store(dvectors_partials + places, dvectors_sums[chunk], mask=inside)


# Where the (E, D) sums do not fit in the registers of the kernel above. One program: d columns, e experts and every ``splits``-th tile of
# n frames.
#
#     dz^T h   (E, D)     h is y; or the gates, which gives M (D is E then)
#     g^T d    (E, D)
@triton.jit(do_not_specialize=["count"])
def parameter_gradient_kernel(
    dy,  # (N, D) or None
    dnormed,  # (N, D) or None
    h,  # (N, D)
    gates,  # (N, E)
    dz_out,  # (N, E) or None
    stats,  # (2, N) or None: mean, rstd
    rows_out,  # (2, N) or None: slope, offset
    norm_weight,  # (D,) or None
    dweight_partials,  # (splits, E, D) or None
    dvectors_partials,  # (splits, E, D) or None
    count,  # N
    D: tl.constexpr,
    E: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
):
    WEIGHT: tl.constexpr = dweight_partials is not None
    VECTORS: tl.constexpr = dvectors_partials is not None
    split = tl.program_id(2).to(tl.int64)
    columns = columns_of(tl.program_id(0), BLOCK_D)
    experts = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    dweight, dvectors = tl.zeros((BLOCK_D, BLOCK_E), tl.float32), tl.zeros((BLOCK_D, BLOCK_E), tl.float32)
    for tile in tl.range(split, tl.cdiv(count, BLOCK_N), tl.num_programs(2), num_stages=STAGES):
        start = tile * BLOCK_N
        frames = tl.arange(0, BLOCK_N)
        valid = frames < count - start
        inside, places = valid[:, None] & (experts < E)[None, :], frames[:, None] * E + experts[None, :]
        g, dz = tl.zeros((BLOCK_N, BLOCK_E), tl.float32), tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
        if WEIGHT:
            dz = tl.load(from_row(dz_out, start, E) + places, mask=inside, other=0.0)
        if VECTORS:
            g = tl.load(from_row(gates, start, E) + places, mask=inside, other=0.0)
        _, rstd = load_pair(stats, start, frames, valid, count)
        slope, offset = load_pair(rows_out, start, frames, valid, count)
        dweight, dvectors = add_products(
            dweight,
            dvectors,
            dy if dy is None else from_row(dy, start, D),
            dnormed if dnormed is None else from_row(dnormed, start, D),
            from_row(h, start, D),
            norm_weight,
            g,
            dz,
            rstd,
            slope,
            offset,
            frames,
            valid,
            columns,
            D,
            PRECISION,
            WEIGHT,
            VECTORS,
        )
    places = (split * E + experts[None, :]) * D + columns[:, None]
    inside = (columns < D)[:, None] & (experts < E)[None, :]
    if WEIGHT:
        tl.store(dweight_partials + places, dweight, mask=inside)
    if VECTORS:
        tl.store(dvectors_partials + places, dvectors, mask=inside)
