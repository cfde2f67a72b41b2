"""Tile sizes: a plain table over width, number of experts and dtype.

Nothing here looks at the number of frames, so that a kernel is compiled once per model and not once per batch, and nothing asks a driver.
Up to 64 experts nothing spills, which `tests/kernels/test_triton_static.py` holds to; these are the bounds that follow. Beyond, registers
do spill: right, but slow.

Up to 16 experts, a program takes 16 frames, the tensor cores' smallest tile: then the rows of all programs at work stay in the second-level
cache between the walks over the width. Its warps share a step's columns, 128 of a 16-bit stream, so that a row's piece is two whole cache
lines of 128 bytes; four warps, because three or more such programs then fit on a multiprocessor and cover each other's waits.

With more experts, W and V are what is read most, by every program from the second-level cache: up to 64 experts, 32 frames share a
reading. The products' operands, split in two for their precision, then fill the registers: steps are of 64 columns, of 32 for float32,
fewer beyond 64 experts, where 16 frames have to do.

In the backward, dW and dV of a program stay in registers from its first tile to its last where they fit, which is 8 experts up to 1,280
columns (1,152 in float16, 896 in float32), and 16 up to half of that. Beyond, a second kernel reads dy, dn and y once more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import interpreted

__all__ = [
    "Blocks",
    "choose_backward_blocks",
    "choose_column_blocks",
    "choose_forward_blocks",
    "choose_parameter_blocks",
    "choose_reduction_blocks",
    "precision",
    "programs_per_multiprocessor",
    "sums_fit_in_registers",
]

FRAMES = 16  # the tensor cores' smallest tile


@dataclass(frozen=True)
class Blocks:
    """BLOCK_N, BLOCK_D and BLOCK_E of a kernel, its steps over the width, its warps, over how many of them `dot_over_width` is split, and
    how many steps are at work at a time, from the copy into shared memory to the product."""

    frames: int
    width: int
    experts: int
    chunks: int
    num_warps: int
    split: int = 1
    stages: int = 1

    @property
    def padded_width(self) -> int:
        return self.width * self.chunks


def precision(dtype: torch.dtype) -> str:
    """How products in float32 are emulated: with the stream's bits to spare. Triton's interpreter needs no emulation and has none that
    is right for bfloat16."""
    if interpreted():
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "bf16x3"


def choose_forward_blocks(width: int, num_experts: int, dtype: torch.dtype, pooled: bool) -> Blocks:
    """Tiles of the forward kernel. A pooling has a whole window's tiles to address: more warps do it, on fewer frames."""
    few = num_experts <= 16
    return _row_blocks(width, num_experts, dtype, 4 if few and not pooled else 8, 3 if few else 2, FRAMES if pooled else 2 * FRAMES)


def choose_backward_blocks(width: int, num_experts: int, dtype: torch.dtype, parameters: bool) -> Blocks:
    """Tiles of the backward kernel; eight warps where the parameters' sums live in registers, which takes all of them."""
    wide = _row_blocks(width, num_experts, dtype, 8, 2, 2 * FRAMES)
    if num_experts > 16 or (parameters and sums_fit_in_registers(wide, dtype)):
        return wide
    return _row_blocks(width, num_experts, dtype, 4, 2, FRAMES)


def choose_column_blocks(width: int) -> Blocks:
    """Tiles of the kernels that go down the columns, without tensor cores."""
    step = min(128, max(16, _power_of_two(width)))
    return _blocks(width, 8, step, 0, 4)


def sums_fit_in_registers(blocks: Blocks, dtype: torch.dtype) -> bool:
    """Whether a program can hold its share of dW and dV, 2 * E * D float32. So many a thread is what spills nowhere."""
    most = {torch.float16: 72, torch.float32: 56}.get(dtype, 80)
    return 2 * blocks.experts * blocks.padded_width <= most * 32 * blocks.num_warps


def _row_blocks(width: int, num_experts: int, dtype: torch.dtype, num_warps: int, stages: int, most_frames: int) -> Blocks:
    experts, is_float32, widest = max(8, _power_of_two(num_experts)), dtype == torch.float32, max(16, _power_of_two(width))
    if experts <= 16:  # all warps share a step's columns, 16 each at least
        step = min(widest, max(16 * num_warps, 64 if is_float32 else 128))
        num_warps = min(num_warps, step // 16)
        return _blocks(width, FRAMES, step, experts, num_warps, num_warps, stages)
    frames = most_frames if experts <= 64 else FRAMES
    return _blocks(width, frames, min(widest, max(16, min(32 if is_float32 else 64, 4096 // experts))), experts, num_warps, 1, stages)


def choose_parameter_blocks(width: int, num_experts: int, dtype: torch.dtype) -> Blocks:
    """Tiles of the kernel that sums dW and dV where they do not fit in registers. Up to 64 experts the stream is read once; every warp has
    its own columns, and all frames of a tile are an operand of every warp, so that many experts allow few frames."""
    experts, is_float32 = min(64, max(8, _power_of_two(num_experts))), dtype == torch.float32
    step = min(128 if experts == 64 and not is_float32 else 64, max(16, _power_of_two(width)))
    return _blocks(width, FRAMES if experts == 64 or is_float32 else 2 * FRAMES, step, experts, 8 if experts == 64 else 4, stages=2)


def choose_reduction_blocks(width: int, num_experts: int) -> Blocks:
    """Tiles of the kernel that adds up the partials: about 80 programs at the widths of speech encoders."""
    experts = max(1, _power_of_two(num_experts) // 8)
    step = 128 if experts == 1 else 64
    return _blocks(width, 0, step, experts, 4)


def programs_per_multiprocessor(blocks: Blocks) -> int:
    """How many programs of a persistent kernel certainly are on a multiprocessor together: it has registers for 8 warps of 255."""
    return max(1, 8 // blocks.num_warps)


def _blocks(width: int, frames: int, step: int, experts: int, num_warps: int, split: int = 1, stages: int = 1) -> Blocks:
    return Blocks(frames, step, experts, -(-width // step), num_warps, split, stages)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
