"""The forward kernel: add, route, steer, pool and norm in one read and one write of the stream."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import columns_of, dot_over_experts, dot_over_width, load_experts, load_frames, load_width, normalized, route, store_frames


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


# One program: n windows of the pooling (n frames where there is none), all their frames, the whole width.
#
#     u = x + r                      (n, D)   read once, kept in registers until it becomes y
#     z = u W^T + b                  (n, e)   first walk over the width
#     g = route(z)                   (n, e)
#     y = u + s (g V)                (n, D)   second walk; written, and kept for the norm
#     p = pool(y)                    (n, D)   one step of the loop per frame of the window; then u is not kept but read again,
#                                             from the first-level cache, because p has its registers
#     n = (p - mean) rstd gamma + beta        third walk, over registers
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
    HOLD: tl.constexpr,
):
    BLOCK_K: tl.constexpr = BLOCK_E if BLOCK_E > 16 else 16
    window = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = window < windows
    experts = tl.arange(0, BLOCK_E)
    s = tl.load(scale).to(tl.float32)

    steps = 1
    first, pooled = window, ()
    if POOL != "":
        steps = pool_size
        clip, first = window // windows_per_clip, (window % windows_per_clip) * pool_size
    if NORM != "":
        for _ in tl.static_range(CHUNKS):
            pooled = pooled + (tl.full((BLOCK_N, BLOCK_D), float("-inf") if POOL == "max" else 0.0, tl.float32),)

    for step in tl.range(steps, disable_licm=True):
        frames, valid = window, exists
        if POOL != "":
            frames, valid = clip * frames_per_clip + first + step, exists & (first + step < frames_per_clip)

        z, us, rs = tl.zeros((SPLIT, BLOCK_N, BLOCK_E), tl.float32), (), ()
        if HOLD:
            for chunk in tl.static_range(CHUNKS):
                u, r = load_stream(x, residual, frames, valid, columns_of(chunk, BLOCK_D), D)
                us, rs = us + (u,), rs + (r,)
            for chunk in tl.static_range(CHUNKS):
                W = load_experts(weight, experts, columns_of(chunk, BLOCK_D), E, D)
                z = dot_over_width(stream(us[chunk], rs[chunk], residual), W, z, PRECISION, SPLIT)
        else:
            for chunk in range(CHUNKS):
                columns = columns_of(chunk, BLOCK_D)
                u, r = load_stream(x, residual, frames, valid, columns, D)
                W = load_experts(weight, experts, columns, E, D)
                z = dot_over_width(stream(u, r, residual), W, z, PRECISION, SPLIT)
        z = tl.sum(z, 0)
        if bias is not None:
            z += tl.load(bias + experts, mask=experts < E, other=0.0).to(tl.float32)[None, :]
        g, full = route(z, experts, top_k, E, ROUTING)
        inside, places = valid[:, None] & (experts < E)[None, :], frames[:, None] * E + experts[None, :]
        tl.store(gates + places, g, mask=inside)
        if ROUTING == "top_k_probs":
            tl.store(probs + places, full, mask=inside)

        ps = ()
        for chunk in tl.static_range(CHUNKS):
            columns = columns_of(chunk, BLOCK_D)
            V = load_experts(vectors, tl.arange(0, BLOCK_K), columns, E, D)
            gV = dot_over_experts(g, V, PRECISION)
            if HOLD:
                u = stream(us[chunk], rs[chunk], residual)
            else:
                u, r = load_stream(x, residual, frames, valid, columns, D)
                u = stream(u, r, residual)
            stored = (u.to(tl.float32) + s * gV).to(y.dtype.element_ty)
            store_frames(y, stored, frames, valid, columns, D)
            p = stored.to(tl.float32)  # pool and norm read y as the backward will find it
            if POOL == "max":
                p = tl.where(valid[:, None] & ((p > pooled[chunk]) | (p != p)), p, pooled[chunk])
            elif POOL == "mean":
                p = pooled[chunk] + tl.where(valid[:, None], p, 0.0)
            ps = ps + (p,)
        if NORM != "":
            pooled = ps

    if NORM != "":
        if POOL == "mean":
            share = 1.0 / tl.minimum(pool_size, frames_per_clip - first).to(tl.float32)
            ps = ()
            for chunk in tl.static_range(CHUNKS):
                ps = ps + (pooled[chunk] * share[:, None],)
            pooled = ps
        mean = tl.zeros((BLOCK_N,), tl.float32)
        if NORM == "layer":
            for chunk in tl.static_range(CHUNKS):
                mean += tl.sum(pooled[chunk], 1)
            mean = mean / D
        squares, one = tl.zeros((BLOCK_N,), tl.float32), tl.full((BLOCK_N,), 1.0, tl.float32)
        for chunk in tl.static_range(CHUNKS):
            centred = normalized(pooled[chunk], mean, one, columns_of(chunk, BLOCK_D), D)
            squares += tl.sum(centred * centred, 1)
        rstd = tl.rsqrt(squares / D + eps)
        tl.store(stats + window, mean, mask=exists)
        tl.store(stats + windows + window, rstd, mask=exists)
        for chunk in tl.static_range(CHUNKS):
            columns = columns_of(chunk, BLOCK_D)
            n = normalized(pooled[chunk], mean, rstd, columns, D)
            if norm_weight is not None:
                n *= load_width(norm_weight, columns, D)[None, :]
            if norm_bias is not None:
                n += load_width(norm_bias, columns, D)[None, :]
            store_frames(normed, n, window, exists, columns, D)
