"""Compile the kernels for a GPU that is not there, and read what the assembler says of registers, spills and shared memory.

What is compiled are the launches that `launches.py` prepares for tensors on PyTorch's "meta" device: the same kernels, constants and
options as at run time. Not for use under Triton's interpreter, which has nothing to compile.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .. import Options
from .launches import Launch, prepare_backward, prepare_forward

__all__ = ["Problem", "Resources", "compile_launch", "launches_of"]

_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64"}


@dataclass(frozen=True)
class Problem:
    """A pass to compile. ``norm`` and ``pool`` as in `Options`; a frozen aligner needs the gradient of the stream only, and
    ``trained_norm`` those of the norm's weight and bias, too."""

    width: int
    num_experts: int
    stream: torch.dtype = torch.bfloat16
    parameters: torch.dtype = torch.float32
    residual: bool = False
    norm: str = ""
    pool: str = ""
    top_k: int | None = None
    renormalize: bool = True
    frozen: bool = False
    trained_norm: bool = False


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers a thread, bytes of stack and local memory a thread (spills), bytes of shared memory."""

    kernel: str
    registers: int
    stack: int
    local: int
    shared: int
    num_warps: int


def launches_of(problem: Problem, direction: str) -> list[Launch]:
    """The launches of a "forward" or "backward" pass over two clips of 1,500 frames on a GPU with 100 multiprocessors."""

    def empty(*shape: int, dtype: torch.dtype = problem.parameters) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    width, num_experts = problem.width, problem.num_experts
    x = empty(2, 1500, width, dtype=problem.stream)
    weight, bias, vectors, scale = empty(num_experts, width), empty(num_experts), empty(num_experts, width), empty()
    norm_weight, norm_bias = (empty(width), empty(width)) if problem.norm else (None, None)
    options = Options(
        norm=problem.norm,
        pool=problem.pool,
        pool_size=4 if problem.pool else 1,
        top_k=problem.top_k or num_experts,
        renormalize=problem.renormalize,
        num_experts=num_experts,
    )
    residual = torch.empty_like(x) if problem.residual else None
    (y, normed, *kept), forward = prepare_forward(x, residual, weight, bias, vectors, scale, norm_weight, norm_bias, options)
    if direction == "forward":
        return forward
    needs = [True, *[not problem.frozen] * 4, problem.trained_norm, problem.trained_norm]
    dnormed = normed if problem.norm else None
    return prepare_backward(y, dnormed, kept[0], y, *kept, weight, vectors, scale, norm_weight, options, needs, 100)[1]


def compile_launch(launch: Launch, capability: int) -> Resources:
    """Compile for sm_``capability``, with every pointer aligned as PyTorch's allocator aligns it."""
    signature, constants, attributes = {}, dict(launch.constants), {}
    for index, parameter in enumerate(launch.kernel.params):
        signature[parameter.name] = "constexpr"
        value = launch.arguments.get(parameter.name)
        if isinstance(value, Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, (int, float)):
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
        elif not parameter.is_constexpr:
            constants[parameter.name] = None
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    registers, stack, local = _resource_usage(compiled.asm["cubin"])
    return Resources(launch.kernel.__name__, registers, stack, local, compiled.metadata.shared, launch.num_warps)


def _resource_usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers, stack and local memory of the one kernel in ``cubin``, from the cuobjdump in Triton's wheel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command: list[Any] = [tool, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    if usage is None:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{report}")
    registers, stack, local = map(int, usage.groups())
    return registers, stack, local
