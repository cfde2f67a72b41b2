"""What the kernels share: moving tiles of the stream, products on the tensor cores, routing, the gradient that enters the steering.

Letters as in `steermoe_kernels.reference`. A program works on tiles of ``n`` = BLOCK_N frames and walks the width in CHUNKS steps of
``d`` = BLOCK_D columns, so that a width like 1280 is not padded to 2048; ``e`` = BLOCK_E is the number of experts, padded. Whatever lies
outside (N, D, E) is loaded as zero and never stored. What a row needs more than once stays in registers, as a tuple with one tile a step.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def columns_of(chunk, BLOCK_D: tl.constexpr):
    """Columns (d,) of one step over the width."""
    return chunk * BLOCK_D + tl.arange(0, BLOCK_D)


@triton.jit
def from_row(pointer, row, size: tl.constexpr):
    """A tensor (N, size) from ``row`` on. The row is int64, N * size may pass 2^31; what is left to add to it does not."""
    return pointer + row * size


@triton.jit
def load_frames(pointer, frames, valid, columns, D: tl.constexpr):
    """Tile (n, d) of an (N, D) tensor, in the type it is stored in."""
    inside = valid[:, None] & (columns < D)[None, :]
    return tl.load(pointer + frames[:, None] * D + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_frames(pointer, tile, frames, valid, columns, D: tl.constexpr):
    """Store a tile (n, d) into an (N, D) tensor, rounded once to its type."""
    inside = valid[:, None] & (columns < D)[None, :]
    tl.store(pointer + frames[:, None] * D + columns[None, :], tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_experts(pointer, experts, columns, E: tl.constexpr, D: tl.constexpr):
    """Tile (e, d) of an (E, D) parameter, in the type it is stored in."""
    inside = (experts < E)[:, None] & (columns < D)[None, :]
    return tl.load(pointer + experts[:, None] * D + columns[None, :], mask=inside, other=0.0)


@triton.jit
def load_width(pointer, columns, D: tl.constexpr):
    """Columns (d,) of a (D,) parameter, in float32."""
    return tl.load(pointer + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def load_pair(pointer, start, frames, valid, count):
    """Two numbers for each of the frames from ``start`` on, each (n,), from a (2, count) tensor; zeros where there is none."""
    one, two = tl.zeros(frames.shape, tl.float32), tl.zeros(frames.shape, tl.float32)
    if pointer is not None:
        one = tl.load(from_row(pointer, start, 1) + frames, mask=valid, other=0.0)
        two = tl.load(from_row(pointer, count + start, 1) + frames, mask=valid, other=0.0)
    return one, two


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a b``, (M, K) (K, N) or batches of them, to more than the stream's precision whatever the operands are stored in.

    Two operands of one 16-bit type multiply exactly as they are. A bfloat16 operand against a float32 one stays as it is while the
    other is cut into two bfloat16 numbers that add up to it. Everything else is multiplied in float32, which PRECISION emulates on the
    tensor cores with three products: "tf32x3" carries 22 bits, "bf16x3" 16. "ieee" multiplies in float32 whatever comes.
    """
    if PRECISION != "ieee" and a.dtype == b.dtype and a.dtype != tl.float32:
        return tl.dot(a, b, acc)
    elif PRECISION == "bf16x3" and a.dtype == tl.bfloat16:
        high = b.to(tl.bfloat16)
        low = (b.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(a, high, tl.dot(a, low, acc))
    elif PRECISION == "bf16x3" and b.dtype == tl.bfloat16:
        high = a.to(tl.bfloat16)
        low = (a.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(high, b, tl.dot(low, b, acc))
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def dot_over_width(h, P, acc, PRECISION: tl.constexpr, SPLIT: tl.constexpr):
    """``acc + h P^T``, h (n, d) and P (e, d) -> (SPLIT, n, e), to be added up over SPLIT at the end.

    (n, e) alone is too small to be shared out among the warps: each would multiply the whole tile. So each takes d / SPLIT columns.
    """
    h = tl.permute(tl.reshape(h, (h.shape[0], SPLIT, h.shape[1] // SPLIT)), (1, 0, 2))
    P = tl.permute(tl.reshape(P, (P.shape[0], SPLIT, P.shape[1] // SPLIT)), (1, 2, 0))
    if SPLIT == 1:
        acc = dot(tl.reshape(h, h.shape[1:]), tl.reshape(P, P.shape[1:]), tl.reshape(acc, acc.shape[1:]), PRECISION)
        return tl.expand_dims(acc, 0)
    else:
        return dot(h, P, acc, PRECISION)


@triton.jit
def dot_over_experts(g, P, PRECISION: tl.constexpr):
    """``g P``, g (n, e) and P (max(e, 16), d) -> (n, d). Tensor cores add up 16 terms at a time: 8 experts are padded with zeros."""
    if g.shape[1] != P.shape[0]:
        g = tl.reshape(tl.permute(tl.join(g, tl.zeros_like(g)), (0, 2, 1)), (g.shape[0], P.shape[0]))
    return dot(g, P, tl.zeros((g.shape[0], P.shape[1]), tl.float32), PRECISION)


@triton.jit
def route(z, experts, top_k, E: tl.constexpr, ROUTING: tl.constexpr):
    """Gates and full softmax, both (n, e), from logits ``z`` (n, e); zero for the padding experts.

    ROUTING "dense": g is the softmax. "top_k": the softmax over the ``top_k`` largest logits, ties to the lowest index, zero elsewhere.
    "top_k_probs": the full softmax's values at those, zero elsewhere.
    """
    exists = (experts < E)[None, :]
    z = tl.where(exists, z, float("-inf"))
    powers = tl.where(exists, tl.exp(z - tl.max(z, 1)[:, None]), 0.0)
    probs = powers / tl.sum(powers, 1)[:, None]
    if ROUTING == "dense":
        return probs, probs
    else:
        rest = z
        selected = z != z  # a NaN stays in its frame's gates
        for _ in range(top_k):
            pick = experts[None, :] == tl.argmax(rest, 1)[:, None]
            selected = selected | pick
            rest = tl.where(pick, float("-inf"), rest)
        gates = tl.where(selected, probs, 0.0)
        if ROUTING == "top_k":
            powers = tl.where(selected, powers, 0.0)
            gates = powers / tl.sum(powers, 1)[:, None]
        return gates, probs


@triton.jit
def pool_again(y, clip_start, first, exists, frames_per_clip, pool_size, columns, D: tl.constexpr, POOL: tl.constexpr):
    """``p = pool(y)`` (n, d) in float32, and for a maximum the step (n, d) of the first of the largest frames in the window."""
    p = tl.full((first.shape[0], columns.shape[0]), float("-inf") if POOL == "max" else 0.0, tl.float32)
    place = tl.zeros(p.shape, tl.int32)
    for step in range(pool_size):
        valid = exists & (first + step < frames_per_clip)
        frame = load_frames(y, clip_start + first + step, valid, columns, D).to(tl.float32)
        if POOL == "max":
            larger = valid[:, None] & ((frame > p) | (frame != frame))
            p = tl.where(larger, frame, p)
            place = tl.where(larger, step, place)
        else:
            p += frame
    if POOL == "mean":
        p *= frame_share(first, frames_per_clip, pool_size)[:, None]
    return tl.where(exists[:, None], p, 0.0), place


@triton.jit
def frame_share(first, frames_per_clip, pool_size):
    """One over the number of frames (n,) in each window; the last of a clip may be short."""
    return 1.0 / tl.minimum(pool_size, frames_per_clip - first).to(tl.float32)


@triton.jit
def normalized(p, mean, rstd, columns, D: tl.constexpr):
    """``xhat = (p - mean) rstd`` (n, d), zero in the padding columns."""
    return tl.where((columns < D)[None, :], (p.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)


@triton.jit
def weighted(dn, norm_weight, columns, D: tl.constexpr):
    """``t = dn * gamma`` (n, d), in float32."""
    t = dn.to(tl.float32)
    if norm_weight is not None:
        t *= load_width(norm_weight, columns, D)[None, :]
    return t


@triton.jit
def through_norm(t, xhat, rstd, centre, slope, columns, D: tl.constexpr):
    """The norm's backward, ``rstd (t - mean(t) - xhat mean(t xhat))`` (n, d); the two means (n,) come in as ``centre`` and ``slope``."""
    return tl.where((columns < D)[None, :], rstd[:, None] * (t - centre[:, None] - xhat * slope[:, None]), 0.0)
