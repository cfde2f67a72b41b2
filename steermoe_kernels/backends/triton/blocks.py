"""Tile sizes: a plain table over width, number of experts and dtype.

Nothing here looks at the number of frames, so that a kernel is compiled once per model and not once per batch, and nothing asks a driver.

A row of the stream lives in registers from the moment it is read until its last use, BLOCK_N * D numbers of 4 bytes over 32 * num_warps
threads. The tensor cores take 16 frames at least, which is also what keeps more than one program on a multiprocessor; the number of
warps then follows from the width. Up to 2,048 columns nothing spills; beyond, what does not fit is kept in local memory, that is in the
first-level cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import interpreted

__all__ = [
    "Blocks",
    "choose_blocks",
    "choose_parameter_blocks",
    "choose_reduction_blocks",
    "precision",
    "programs_per_multiprocessor",
    "sums_fit_in_registers",
]

FRAMES = 16  # the tensor cores' smallest tile


@dataclass(frozen=True)
class Blocks:
    """BLOCK_N, BLOCK_D and BLOCK_E of a kernel, its steps over the width, its warps and over how many of them `dot_over_width` is split."""

    frames: int
    width: int
    experts: int
    chunks: int
    num_warps: int
    split: int

    @property
    def padded_width(self) -> int:
        return self.width * self.chunks


def precision(dtype: torch.dtype) -> str:
    """How products in float32 are emulated: with the stream's bits to spare. Triton's interpreter needs no emulation and has none that
    is right for bfloat16."""
    if interpreted():
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "bf16x3"


def choose_blocks(width: int, num_experts: int) -> Blocks:
    """Tiles of the kernels that walk over whole rows."""
    return _row_blocks(width, num_experts, 4 if width <= 768 else 8 if width <= 2048 else 16)


def choose_backward_blocks(width: int, num_experts: int, parameters: bool) -> Blocks:
    """As `choose_blocks`; with eight warps where the parameters' sums are to live in registers, which takes all of them."""
    blocks = choose_blocks(width, num_experts)
    wide = _row_blocks(width, num_experts, 8)
    return wide if parameters and sums_fit_in_registers(wide) else blocks


def choose_column_blocks(width: int) -> Blocks:
    """Tiles of the kernels that go down the columns, without tensor cores."""
    step = min(128, max(16, _power_of_two(width)))
    return Blocks(8, step, 0, -(-width // step), 4, 1)


def sums_fit_in_registers(blocks: Blocks) -> bool:
    """Whether a program can hold its share of dW and dV, 2 * E * D float32, next to its tile."""
    return 2 * blocks.experts * blocks.padded_width <= 80 * 32 * blocks.num_warps


def _row_blocks(width: int, num_experts: int, num_warps: int) -> Blocks:
    # All warps share a step's columns, 16 each at least; a parameter's tile (experts, columns) must fit in shared memory twice.
    experts = max(8, _power_of_two(num_experts))
    largest = max(64, min(256, 16384 // experts))
    candidates = [size for size in (256, 128, 64) if size <= largest and size >= 16 * num_warps] or [largest]
    step = min(candidates, key=lambda size: (-(-width // size) * size, -size))
    return Blocks(FRAMES, step, experts, -(-width // step), num_warps, num_warps if experts <= 16 else 1)


def choose_parameter_blocks(width: int, num_experts: int) -> Blocks:
    """Tiles of the kernel that sums dW and dV where they do not fit in registers next to whole rows."""
    experts = min(64, max(8, _power_of_two(num_experts)))
    step = min(128, max(16, _power_of_two(width)))
    return Blocks(32, step, experts, -(-width // step), 4, 1)


def choose_reduction_blocks(width: int, num_experts: int) -> Blocks:
    """Tiles of the kernel that adds up the partials: about 80 programs at the widths of speech encoders."""
    experts = max(1, _power_of_two(num_experts) // 8)
    step = 128 if experts == 1 else 64
    return Blocks(0, step, experts, -(-width // step), 4, 1)


def programs_per_multiprocessor(blocks: Blocks) -> int:
    """How many programs of a persistent kernel certainly are on a multiprocessor together: it has registers for 8 warps of 255."""
    return max(1, 8 // blocks.num_warps)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
