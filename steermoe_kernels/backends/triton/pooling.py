"""The backward kernels of pooling and norm: the gradient that comes through a pooling, and those of the norm's weight and bias.

A pooled frame is a window; without pooling, every frame is a window of its own. An encoder pools once, after its last layer, and mostly
its norms are frozen, so these are passes of their own and leave the registers of `backward.py` alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import columns_of, frame_share, load_frames, load_pair, normalized, pool_again, store_frames, through_norm, weighted


# The gradient at y in float32; afterwards `backward.py` goes on as if it had come in. One program: n windows, all their frames, in two
# walks over the width; y is read again by the second, from the caches.
#
#     p  = pool(y),  xhat = (p - mean) rstd,  t = dn gamma
#     dp = rstd (t - mean(t) - xhat mean(t xhat))               (n, D)
#     d  = dy + dp at the first of the largest frames, or an equal share of dp for each
@triton.jit(do_not_specialize=["windows", "frames_per_clip", "windows_per_clip", "pool_size"])
def unpool_kernel(
    dy,  # (N, D) or None
    dnormed,  # (windows, D)
    y,  # (N, D)
    stats,  # (2, windows)
    norm_weight,  # (D,) or None
    d,  # (N, D)
    windows,
    frames_per_clip,
    windows_per_clip,
    pool_size,
    D: tl.constexpr,
    NORM: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    window = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = window < windows
    clip_start, first = window // windows_per_clip * frames_per_clip, window % windows_per_clip * pool_size
    mean, rstd = load_pair(stats, 0, window, exists, windows)
    centre, slope = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for chunk in range(CHUNKS):
        columns = columns_of(chunk, BLOCK_D)
        p, _ = pool_again(y, clip_start, first, exists, frames_per_clip, pool_size, columns, D, POOL)
        t = weighted(load_frames(dnormed, window, exists, columns, D), norm_weight, columns, D)
        if NORM == "layer":
            centre += tl.sum(t, 1)
        slope += tl.sum(t * normalized(p, mean, rstd, columns, D), 1)
    centre, slope = centre / D, slope / D
    for chunk in range(CHUNKS):
        columns = columns_of(chunk, BLOCK_D)
        p, place = pool_again(y, clip_start, first, exists, frames_per_clip, pool_size, columns, D, POOL)
        t = weighted(load_frames(dnormed, window, exists, columns, D), norm_weight, columns, D)
        dp = through_norm(t, normalized(p, mean, rstd, columns, D), rstd, centre, slope, columns, D)
        if POOL == "mean":
            dp *= frame_share(first, frames_per_clip, pool_size)[:, None]
        for step in range(pool_size):
            frames, valid = clip_start + first + step, exists & (first + step < frames_per_clip)
            share = dp
            if POOL == "max":
                share = tl.where(place == step, dp, 0.0)
            if dy is not None:
                share += load_frames(dy, frames, valid, columns, D).to(tl.float32)
            store_frames(d, share, frames, valid, columns, D)


# One program: d columns and every ``splits``-th tile of n windows.
#
#     dgamma = sum dn * xhat        dbeta = sum dn        (D,)
@triton.jit(do_not_specialize=["windows", "frames_per_clip", "windows_per_clip", "pool_size"])
def norm_gradient_kernel(
    dnormed,  # (windows, D)
    y,  # (N, D)
    stats,  # (2, windows)
    dgamma_partials,  # (splits, D) or None
    dbeta_partials,  # (splits, D) or None
    windows,
    frames_per_clip,
    windows_per_clip,
    pool_size,
    D: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    split = tl.program_id(1).to(tl.int64)
    columns = columns_of(tl.program_id(0), BLOCK_D)
    dgamma, dbeta = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    for tile in range(split, tl.cdiv(windows, BLOCK_N), tl.num_programs(1)):
        window = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        exists = window < windows
        clip_start, first = window // windows_per_clip * frames_per_clip, window % windows_per_clip * pool_size
        dn = load_frames(dnormed, window, exists, columns, D).to(tl.float32)
        dbeta += tl.sum(dn, 0)
        if dgamma_partials is not None:
            mean, rstd = load_pair(stats, 0, window, exists, windows)
            p, _ = pool_again(y, clip_start, first, exists, frames_per_clip, pool_size, columns, D, POOL)
            dgamma += tl.sum(dn * normalized(p, mean, rstd, columns, D), 0)
    if dgamma_partials is not None:
        tl.store(dgamma_partials + split * D + columns, dgamma, mask=columns < D)
    if dbeta_partials is not None:
        tl.store(dbeta_partials + split * D + columns, dbeta, mask=columns < D)
