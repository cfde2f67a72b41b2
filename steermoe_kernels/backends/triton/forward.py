"""The forward kernel: add, route, steer, pool and norm in one read and one write of the stream."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    columns_of,
    dot_over_experts,
    dot_over_width,
    load_experts,
    load_frames,
    load_width,
    normalized,
    pool_again,
    route,
    store_frames,
)


@triton.jit
def load_stream(x, residual, frames, valid, columns, D: tl.constexpr):
    """Tiles (n, d) of ``x`` and ``residual`` for `stream` to add, in 16 bits as they are stored; in float32 the sum is as small."""
    u = load_frames(x, frames, valid, columns, D)
    r = u
    if residual is not None:
        r = load_frames(residual, frames, valid, columns, D)
        if u.dtype == tl.float32:
            u += r
            r = u
    return u, r


@triton.jit
def stream(u, r, residual):
    """``u = x + r`` (n, d) of what `load_stream` gave; as it is stored where there is nothing to add."""
    if residual is not None and u.dtype != tl.float32:
        u = u.to(tl.float32) + r.to(tl.float32)
    return u


@triton.jit
def add_moments(p, mean, squares, chunk, columns, D: tl.constexpr, NORM: tl.constexpr):
    """The mean (n,) of a row and its sum of squared deviations (n,), with one more step ``p`` (n, d) of the row in them.

    The deviations are those from the step's own mean, and two means merge by their distance: nothing cancels, as it would in a
    difference of squares. An RMSNorm has no mean; there it stays zero.
    """
    if NORM == "layer":
        before = chunk * p.shape[1] + tl.zeros(mean.shape, tl.float32)
        own = tl.minimum(D - before, p.shape[1])
        share, own_mean = own / (before + own), tl.sum(p, 1) / own
        p = tl.where((columns < D)[None, :], p - own_mean[:, None], 0.0)
        distance = own_mean - mean
        mean += distance * share
        squares += distance * distance * (share * before)
    return mean, squares + tl.sum(p * p, 1)


@triton.jit
def store_stats(stats, mean, rstd, window, exists, windows):
    """Mean and reciprocal deviation of each window, for the backward."""
    tl.store(stats + window, mean, mask=exists)
    tl.store(stats + windows + window, rstd, mask=exists)


@triton.jit
def store_normed(normed, p, mean, rstd, norm_weight, norm_bias, window, exists, columns, D: tl.constexpr):
    """``n = (p - mean) rstd gamma + beta`` (n, d)."""
    n = normalized(p, mean, rstd, columns, D)
    if norm_weight is not None:
        n *= load_width(norm_weight, columns, D)[None, :]
    if norm_bias is not None:
        n += load_width(norm_bias, columns, D)[None, :]
    store_frames(normed, n, window, exists, columns, D)


@triton.jit
def route_frames(z, bias, gates, probs, frames, valid, experts, top_k, E: tl.constexpr, ROUTING: tl.constexpr):
    """Gates (n, e) from ``u W^T`` (SPLIT, n, e), stored too."""
    z = tl.sum(z, 0)
    if bias is not None:
        z += tl.load(bias + experts, mask=experts < E, other=0.0).to(tl.float32)[None, :]
    g, full = route(z, experts, top_k, E, ROUTING)
    inside, places = valid[:, None] & (experts < E)[None, :], frames[:, None] * E + experts[None, :]
    tl.store(gates + places, g, mask=inside)
    if ROUTING == "top_k_probs":
        tl.store(probs + places, full, mask=inside)
    return g


# One program: n windows of the pooling (n frames where there is none), all their frames, the whole width.
#
#     u = x + r                      (n, D)
#     z = u W^T + b                  (n, e)   first walk over the width
#     g = route(z)                   (n, e)
#     y = u + s (g V)                (n, D)   second walk; without a pooling it also adds up the moments of y
#     p = pool(y)                    (n, D)
#     n = (p - mean) rstd gamma + beta        last walk
#
# Every walk is a loop that holds one step; the first two copy the next steps into shared memory meanwhile. So at every width the second
# walk reads x and r again, and the last one y, from the second-level cache, where the rows of all programs at work fit: DRAM sees each
# element once. Keeping the rows in registers costs more than it saves: the two products want them in different layouts, so that they are
# kept twice, which spills, and each step waits for its exchange between the two before the next is loaded. With a pooling, the first two
# walks run once per frame of the window, and the moments are a walk of their own over the pooled y.
#
# W and V are read by every program and stay in the caches. One program a tile, not a persistent grid: programs that wait for memory and
# programs that multiply share a multiprocessor, and the hardware hands out the next tile.
@triton.jit(
    do_not_specialize=["windows", "frames_per_clip", "windows_per_clip", "pool_size", "top_k", "eps"],
    do_not_specialize_on_alignment=["bias", "scale"],
)
def steer_forward_kernel(
    x,  # (N, D)
    residual,  # (N, D) or None
    weight,  # (E, D)
    bias,  # (E,) or None
    vectors,  # (E, D)
    scale,  # ()
    norm_weight,  # (D,) or None
    norm_bias,  # (D,) or None
    y,  # (N, D)
    normed,  # (windows, D)
    gates,  # (N, E)
    probs,  # (N, E)
    stats,  # (2, windows)
    windows,
    frames_per_clip,
    windows_per_clip,
    pool_size,
    top_k,
    eps,
    D: tl.constexpr,
    E: tl.constexpr,
    ROUTING: tl.constexpr,
    NORM: tl.constexpr,
    POOL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    BLOCK_K: tl.constexpr = BLOCK_E if BLOCK_E > 16 else 16
    window = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = window < windows
    experts = tl.arange(0, BLOCK_E)
    s = tl.load(scale).to(tl.float32)
    mean, squares = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)

    steps, first, clip_start = 1, window, window
    if POOL != "":
        steps = pool_size
        first, clip_start = window % windows_per_clip * pool_size, window // windows_per_clip * frames_per_clip
    for step in range(steps):
        frames, valid = window, exists
        if POOL != "":
            frames, valid = clip_start + first + step, exists & (first + step < frames_per_clip)
        z = tl.zeros((SPLIT, BLOCK_N, BLOCK_E), tl.float32)
        for chunk in tl.range(CHUNKS, num_stages=STAGES):
            columns = columns_of(chunk, BLOCK_D)
            u, r = load_stream(x, residual, frames, valid, columns, D)
            W = load_experts(weight, experts, columns, E, D)
            z = dot_over_width(stream(u, r, residual), W, z, PRECISION, SPLIT)
        g = route_frames(z, bias, gates, probs, frames, valid, experts, top_k, E, ROUTING)
        for chunk in tl.range(CHUNKS, num_stages=STAGES):
            columns = columns_of(chunk, BLOCK_D)
            V = load_experts(vectors, tl.arange(0, BLOCK_K), columns, E, D)
            u, r = load_stream(x, residual, frames, valid, columns, D)
            u = stream(u, r, residual)
            stored = (u.to(tl.float32) + s * dot_over_experts(g, V, PRECISION)).to(y.dtype.element_ty)
            store_frames(y, stored, frames, valid, columns, D)
            if NORM != "" and POOL == "":
                mean, squares = add_moments(stored.to(tl.float32), mean, squares, chunk, columns, D, NORM)
    if NORM != "":
        tl.debug_barrier()  # what is read from here on, other threads of this program have written
        if POOL != "":
            for chunk in range(CHUNKS):
                columns = columns_of(chunk, BLOCK_D)
                p, _ = pool_again(y, clip_start, first, exists, frames_per_clip, pool_size, columns, D, POOL)
                mean, squares = add_moments(p, mean, squares, chunk, columns, D, NORM)
        rstd = tl.rsqrt(squares / D + eps)
        store_stats(stats, mean, rstd, window, exists, windows)
        for chunk in range(CHUNKS):
            columns = columns_of(chunk, BLOCK_D)
            if POOL == "":
                p = load_frames(y, window, exists, columns, D)
            else:
                p, _ = pool_again(y, clip_start, first, exists, frames_per_clip, pool_size, columns, D, POOL)
            store_normed(normed, p, mean, rstd, norm_weight, norm_bias, window, exists, columns, D)
