"""What a pass launches: kernels, grids, arguments and compile-time constants, prepared without running anything.

Why the tiles are what they are, `blocks.py` says. The forward is one launch. The backward is one, too, where a program can keep its share
of dW and dV; else `parameter_gradient_kernel` makes them, 4 programs a multiprocessor, each with frames and columns of its own. A pooling
and a trained norm each add a launch, the partials of all programs a last, small one.

The backend runs these launches; `static.py` compiles the same ones, prepared from tensors without storage. So what is inspected on a
machine without a GPU is what will run on one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import Options
from .backward import parameter_gradient_kernel, steer_backward_kernel
from .blocks import (
    Blocks,
    choose_backward_blocks,
    choose_column_blocks,
    choose_forward_blocks,
    choose_parameter_blocks,
    choose_reduction_blocks,
    precision,
    programs_per_multiprocessor,
    sums_fit_in_registers,
)
from .forward import steer_forward_kernel
from .pooling import norm_gradient_kernel, unpool_kernel
from .reduction import parameter_reduction_kernel

__all__ = ["Launch", "prepare_backward", "prepare_forward"]


@dataclass(frozen=True)
class Launch:
    """One kernel, ready to run: its ``arguments`` by name (tensors, numbers, None for what is absent), its compile-time ``constants``."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options. Registers up to the limit: left to itself the assembler trades some for spills. Nothing is loaded ahead but in
        the loops that say so (STAGES). Multiply and add fuse, which is said aloud because Triton's default is about to change."""
        registers = min(255, 65536 // (32 * self.num_warps))
        return {"num_warps": self.num_warps, "num_stages": 1, "maxnreg": registers, "enable_fp_fusion": True}

    def run(self) -> None:
        """Launch on the current device and stream."""
        self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


def prepare_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    vectors: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    options: Options,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], list[Launch]]:
    """The results of ``steer_forward``, still empty, and the launches that fill them."""
    batch, frames, width = x.shape
    num_experts = options.num_experts
    windows = _windows(x, options)
    y = torch.empty_like(x)
    normed = x.new_empty((batch, windows["windows_per_clip"], width) if options.norm else 0)
    gates = x.new_empty((batch, frames, num_experts), dtype=torch.float32)
    probs = x.new_empty(gates.shape if options.keeps_probs else 0, dtype=torch.float32)
    stats = x.new_empty((2, *normed.shape[:2]) if options.norm else 0, dtype=torch.float32)
    blocks = choose_forward_blocks(width, num_experts, x.dtype, bool(options.pool))
    launch = Launch(
        steer_forward_kernel,
        (_tiles(windows["windows"], blocks.frames),),
        {
            "x": x,
            "residual": residual,
            "weight": weight,
            "bias": bias,
            "vectors": vectors,
            "scale": scale,
            "norm_weight": norm_weight if options.norm else None,
            "norm_bias": norm_bias if options.norm else None,
            "y": y,
            "normed": normed if options.norm else None,
            "gates": gates,
            "probs": probs if options.keeps_probs else None,
            "stats": stats if options.norm else None,
            "top_k": options.top_k,
            "eps": options.eps,
        }
        | windows,
        _row_constants(blocks, width)
        | _steer_constants(blocks, num_experts, x.dtype)
        | {
            "ROUTING": "dense" if options.dense else "top_k" if options.renormalize else "top_k_probs",
            "NORM": options.norm,
            "POOL": options.pool,
        },
        blocks.num_warps,
    )
    return (y, normed, gates, probs, stats), [launch]


def prepare_backward(
    dy: Tensor | None,
    dnormed: Tensor | None,
    dgates: Tensor | None,
    y: Tensor,
    gates: Tensor,
    probs: Tensor,
    stats: Tensor,
    weight: Tensor,
    vectors: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    options: Options,
    needs: list[bool],
    multiprocessors: int,
) -> tuple[tuple[Tensor | None, ...], list[Launch]]:
    """The results of ``steer_backward``, still empty, and the launches that fill them; None for what is not needed or is zero."""
    need_u, need_weight, need_bias, need_vectors, need_scale, need_gamma, need_beta = needs
    frames, width, num_experts = y.shape[0] * y.shape[1], y.shape[2], options.num_experts
    launches: list[Launch] = []

    def single(need: bool, *shape: int) -> Tensor | None:
        return y.new_empty(shape, dtype=torch.float32) if need else None

    # Sums over frames, one partial a program, added up by the last launch; None where nobody needs them.
    norm_splits, norm_sums = 1, {"dgamma_partials": None, "dbeta_partials": None}
    if dnormed is not None and (need_gamma or need_beta):
        columns = choose_column_blocks(width)
        windows = _windows(y, options)
        norm_splits = min(_tiles(windows["windows"], columns.frames), _tiles(4 * multiprocessors, columns.chunks))
        norm_sums = {"dgamma_partials": single(need_gamma, norm_splits, width), "dbeta_partials": single(need_beta, norm_splits, width)}
        launches.append(
            Launch(
                norm_gradient_kernel,
                (columns.chunks, norm_splits),
                {"dnormed": dnormed, "y": y, "stats": stats} | norm_sums | windows,
                {"D": width, "POOL": options.pool, "BLOCK_N": columns.frames, "BLOCK_D": columns.width},
                columns.num_warps,
            )
        )
    if dnormed is not None and options.pool:
        columns = choose_column_blocks(width)
        windows = _windows(y, options)
        d = y.new_empty(y.shape, dtype=torch.float32)
        arguments = {"dy": dy, "dnormed": dnormed, "y": y, "stats": stats, "norm_weight": norm_weight, "d": d}
        launches.append(
            Launch(
                unpool_kernel,
                (_tiles(windows["windows"], columns.frames),),
                arguments | windows,
                _row_constants(columns, width) | {"NORM": options.norm, "POOL": options.pool},
                columns.num_warps,
            )
        )
        dy, dnormed = d, None

    blocks = choose_backward_blocks(width, num_experts, y.dtype, need_weight or need_vectors)
    in_registers = sums_fit_in_registers(blocks, y.dtype)
    most_programs = multiprocessors * programs_per_multiprocessor(blocks)
    programs = _tiles(frames, blocks.frames)
    if need_bias or need_scale or (in_registers and (need_weight or need_vectors)):
        programs = min(most_programs, programs)
    small_sums = {
        "dbias_partials": single(need_bias, programs, num_experts),
        "dscale_partials": single(need_scale, programs, num_experts),
    }
    splits, parameter_blocks = programs, choose_parameter_blocks(width, num_experts, y.dtype)
    if not in_registers:
        per_split = parameter_blocks.chunks * _tiles(num_experts, parameter_blocks.experts)
        splits = min(_tiles(frames, parameter_blocks.frames), _tiles(4 * multiprocessors, per_split))
    sums = {
        "dweight_partials": single(need_weight, splits, num_experts, width),
        "mixed_partials": single(need_weight, splits, num_experts, num_experts),
        "dvectors_partials": single(need_vectors, splits, num_experts, width),
    }
    through_norm = dnormed is not None
    dz = single(need_weight and not in_registers, frames, num_experts)
    rows = single(need_vectors and through_norm and not in_registers, 2, frames)
    du = torch.empty_like(y) if need_u else None
    incoming = {
        "dy": dy,
        "dnormed": dnormed,
        "gates": gates,
        "stats": stats if through_norm else None,
        "norm_weight": norm_weight if through_norm else None,
        "dz_out": dz,
        "rows_out": rows,
        "count": frames,
    }
    if any(needs[:5]):
        launches.append(
            Launch(
                steer_backward_kernel,
                (programs,),
                incoming
                | (sums if in_registers else dict.fromkeys(sums))
                | small_sums
                | {
                    "dgates": dgates,
                    "y": y,
                    "probs": probs if options.keeps_probs else None,
                    "weight": weight,
                    "vectors": vectors,
                    "scale": scale,
                    "du": du,
                },
                _row_constants(blocks, width) | _steer_constants(blocks, num_experts, y.dtype) | {"NORM": options.norm},
                blocks.num_warps,
            )
        )
    if not in_registers and (need_weight or need_vectors):
        own = {name: sums[name] for name in ("dweight_partials", "dvectors_partials")}
        arguments = incoming | {"h": y} | own
        launches.append(_parameter_launch(arguments, parameter_blocks, width, num_experts, splits, y.dtype))
    if not in_registers and need_weight:
        square = choose_parameter_blocks(num_experts, num_experts, torch.float32)
        arguments = dict.fromkeys(incoming) | {"gates": None, "dz_out": dz, "h": gates, "count": frames}
        arguments |= {"dweight_partials": sums["mixed_partials"], "dvectors_partials": None}
        launches.append(_parameter_launch(arguments, square, num_experts, num_experts, splits, y.dtype))

    results = {
        "dweight": single(need_weight, num_experts, width),
        "dbias": single(need_bias, num_experts),
        "dvectors": single(need_vectors, num_experts, width),
        "dscale": single(need_scale),
        "dgamma": single(norm_sums["dgamma_partials"] is not None, width),
        "dbeta": single(norm_sums["dbeta_partials"] is not None, width),
    }
    if any(result is not None for result in results.values()):
        reduction = choose_reduction_blocks(width, num_experts)
        launches.append(
            Launch(
                parameter_reduction_kernel,
                (_tiles(num_experts, reduction.experts), reduction.chunks),
                results
                | sums
                | small_sums
                | norm_sums
                | {"vectors": vectors, "scale": scale, "splits": splits, "programs": programs, "norm_splits": norm_splits},
                {
                    "D": width,
                    "E": num_experts,
                    "BLOCK_D": reduction.width,
                    "BLOCK_E": reduction.experts,
                    "ALL_EXPERTS": blocks.experts,
                },
                reduction.num_warps,
            )
        )
    return (du, *results.values()), launches


def _parameter_launch(arguments: dict[str, Any], blocks: Blocks, width: int, num_experts: int, splits: int, dtype: torch.dtype) -> Launch:
    return Launch(
        parameter_gradient_kernel,
        (blocks.chunks, _tiles(num_experts, blocks.experts), splits),
        arguments,
        {
            "D": width,
            "E": num_experts,
            "PRECISION": precision(dtype),
            "BLOCK_N": blocks.frames,
            "BLOCK_D": blocks.width,
            "BLOCK_E": blocks.experts,
            "STAGES": blocks.stages,
        },
        blocks.num_warps,
    )


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def _windows(stream: Tensor, options: Options) -> dict[str, int]:
    """How frames fall into windows; without pooling every frame is its own."""
    batch, frames = stream.shape[:2]
    size = min(options.pool_size, frames) if options.pool else 1
    per_clip = _tiles(frames, size)
    return {"windows": batch * per_clip, "frames_per_clip": frames, "windows_per_clip": per_clip, "pool_size": size}


def _row_constants(blocks: Blocks, width: int) -> dict[str, Any]:
    return {"D": width, "BLOCK_N": blocks.frames, "BLOCK_D": blocks.width, "CHUNKS": blocks.chunks}


def _steer_constants(blocks: Blocks, num_experts: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"E": num_experts, "PRECISION": precision(dtype), "BLOCK_E": blocks.experts, "SPLIT": blocks.split, "STAGES": blocks.stages}
