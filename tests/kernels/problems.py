"""Steering problems: what is steered, the tensors of it, and three ways to compute it (fused, plain, float64).

The tensors are drawn so that nothing hangs on one rounding: where experts are selected or a maximum is taken, the candidates lie far
apart, and every dtype has to make the same choice as float64.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from steermoe_kernels import functional as SF
from steermoe_kernels import reference
from steermoe_kernels.backends import get_backend

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """One case. ``norm`` "" is `functional.steer`, else `functional.steer_norm`; ``wanted`` are the inputs that require a gradient."""

    batch: int = 1
    frames: int = 7
    width: int = 33
    num_experts: int = 8
    top_k: int | None = None
    renormalize: bool = True
    bias: bool = True
    residual: bool = False
    norm: str = ""
    norm_weight: bool = True
    norm_bias: bool = True
    eps: float = 1e-5
    pool: str | None = None
    pool_size: int = 1
    float32_parameters: bool = False
    layout: str = "contiguous"
    incoming: tuple[str, ...] = ("y", "normed", "gates")
    wanted: tuple[str, ...] = ("x", "residual", "weight", "bias", "vectors", "scale", "norm_weight", "norm_bias")

    @property
    def selects(self) -> bool:
        return self.top_k is not None and self.top_k < self.num_experts

    @property
    def pooled(self) -> int:
        return -(-self.frames // self.pool_size) if self.pool else self.frames

    def __str__(self) -> str:
        """A short name for the test report: the sizes, then whatever is not the default."""
        words = [f"{self.batch}x{self.frames}x{self.width}", f"E{self.num_experts}"]
        words += [f"k{self.top_k}" + ("" if self.renormalize else "raw")] if self.top_k else []
        words += [self.norm + ("" if self.norm_weight else "-w") + ("" if self.norm_bias else "-b")] if self.norm else []
        words += [f"eps{self.eps:g}"] if self.eps != Problem.eps else []
        words += [f"{self.pool}{self.pool_size}"] if self.pool else []
        words += ["residual"] if self.residual else []
        words += [] if self.bias else ["nobias"]
        words += ["f32params"] if self.float32_parameters else []
        words += [self.layout] if self.layout != "contiguous" else []
        words += ["from-" + "+".join(self.incoming)] if self.incoming != Problem.incoming else []
        words += ["to-" + "+".join(self.wanted)] if self.wanted != Problem.wanted else []
        return "-".join(words)


def device_for(backend: str) -> torch.device:
    """Where the tensors of a test of ``backend`` live: the CPU if it takes them there, else the GPU."""
    cpu = torch.device("cpu")
    return cpu if get_backend(backend).rejects(cpu, torch.float32) is None else torch.device("cuda")


def interpreted(backend: str) -> bool:
    """Whether the backend's kernels run in Triton's interpreter, element by element in Python: small problems only."""
    return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def dtypes_of(backend: str, device: torch.device) -> list[torch.dtype]:
    """The stream dtypes the backend takes, less bfloat16 in Triton's interpreter, whose ``tl.dot`` is wrong in it."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    taken = [dtype for dtype in dtypes if get_backend(backend).rejects(device, dtype) is None]
    return [dtype for dtype in taken if dtype != torch.bfloat16 or not interpreted(backend)]


# --- drawing ----------------------------------------------------------------------------------------------------------------------------


def draw(problem: Problem, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> tuple[Tensors, Tensors]:
    """Inputs, of which ``problem.wanted`` require gradients, and the gradients that come in for ``problem.incoming``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    p, width, num_experts = problem, problem.width, problem.num_experts
    stream = (p.batch, p.frames, width)
    if p.pool == "max":  # the frames of a window lie on steps one apart, in another order for each column
        u = torch.empty(stream, dtype=torch.float64)
        for window in u.split(p.pool_size, dim=1):
            steps = torch.rand(window.shape, generator=generator).argsort(1).double()
            window.copy_(steps - steps.mean(1, keepdim=True) + uniform(-0.2, 0.2, *window.shape))
        vectors, scale = uniform(-0.5, 0.5, num_experts, width), torch.tensor(0.5, dtype=torch.float64)
    else:
        u, vectors, scale = normal(*stream), normal(num_experts, width), torch.tensor(0.7, dtype=torch.float64)
    if width == 1:  # the norm of a single number divides by it
        u = u + 0.5 * u.sign()
    weight, bias = normal(num_experts, width) / width**0.5, normal(num_experts) if p.bias else None
    if p.selects:
        assert p.top_k is not None
        per_frame = p.pool != "max" and num_experts <= width // 2
        lead = (p.batch, p.frames) if per_frame else ()
        rank = torch.rand((*lead, num_experts), generator=generator).argsort(-1).argsort(-1)
        far = torch.where(rank < p.top_k, 1.0, -1.0) * uniform(0.8, 2.0, *rank.shape)
        if per_frame:  # every frame has a selection of its own, moved to where its logits are ``far``
            u = u + (far - F.linear(u, weight, bias)) @ torch.linalg.pinv(weight).mT
        else:  # no room for that: the bias decides for all frames
            assert p.bias
            weight, bias = 0.1 * weight / u.abs().max(), far
    residual = normal(*stream) if p.residual else None
    inputs: dict[str, Tensor | None] = {
        "x": u if residual is None else u - residual,
        "residual": residual,
        "weight": weight,
        "bias": bias,
        "vectors": vectors,
        "scale": scale,
        "norm_weight": 1 + 0.3 * normal(width) if p.norm and p.norm_weight else None,
        "norm_bias": 0.3 * normal(width) if p.norm and p.norm_bias else None,
    }
    lean = vectors.mean(0) / vectors.mean(0).square().mean().sqrt()  # with it the scale's gradient is a sum that does not cancel
    incoming = {
        "y": normal(*stream) + lean,
        "normed": normal(p.batch, p.pooled, width) + lean,
        "gates": normal(p.batch, p.frames, num_experts),
    }
    if not p.norm:
        del incoming["normed"]

    def finish(name: str, tensor: Tensor) -> Tensor:
        wide = p.float32_parameters and name not in ("x", "residual")
        tensor = tensor.to(torch.promote_types(dtype, torch.float32) if wide else dtype).to(device)
        return _lay_out(tensor, p.layout, name).detach().requires_grad_(name in p.wanted)

    ready = {name: finish(name, tensor) for name, tensor in inputs.items() if tensor is not None}
    coming = {name: _lay_out(incoming[name].to(dtype).to(device), p.layout, "d" + name) for name in p.incoming if name in incoming}
    return ready, coming


def _lay_out(tensor: Tensor, layout: str, name: str) -> Tensor:
    """The same shape in another memory layout: dimensions stored in reverse order with gaps, or one element or frame for all."""
    if layout == "contiguous":
        return tensor
    if layout == "expanded" and name.startswith("d"):
        return tensor.new_ones(()).expand(tensor.shape)  # as from ``.sum().backward()``
    if layout == "expanded" and tensor.dim() == 3:
        return tensor[:1].expand(tensor.shape)
    reverse = tuple(reversed(range(tensor.dim())))
    stored = tensor.permute(reverse)
    return torch.stack((stored, torch.full_like(stored, torch.nan)), -1)[..., 0].permute(reverse)


# --- three ways to compute it -------------------------------------------------------------------------------------------------------------


def fused(problem: Problem, inputs: Tensors, incoming: Tensors, backend: str) -> Tensors:
    """The operators under test."""
    settings = {"top_k": problem.top_k, "renormalize": problem.renormalize, "backend": backend}
    return _differentiated(problem, call(SF, problem, inputs, settings), inputs, incoming)


def exact(problem: Problem, inputs: Tensors, incoming: Tensors) -> Tensors:
    """The reference, in float64, on the same numbers."""
    inputs = {name: tensor.detach().double().requires_grad_(tensor.requires_grad) for name, tensor in inputs.items()}
    settings = {"top_k": problem.top_k, "renormalize": problem.renormalize}
    return _differentiated(problem, call(reference, problem, inputs, settings), inputs, incoming)


def plain(problem: Problem, inputs: Tensors, incoming: Tensors) -> Tensors:
    """`formula`, and its gradients by autograd."""
    return _differentiated(problem, formula(problem, inputs), inputs, incoming)


def formula(problem: Problem, inputs: Tensors) -> Tensors:
    """The outputs as one would write them in PyTorch, every step in the stream's dtype."""
    t = {name: tensor.to(inputs["x"].dtype) for name, tensor in inputs.items()}
    u = t["x"] + t["residual"] if problem.residual else t["x"]
    z = F.linear(u, t["weight"], t.get("bias"))
    if problem.selects:
        top = torch.topk(z, problem.top_k, dim=-1)  # type: ignore[arg-type]
        kept = torch.softmax(top.values, -1) if problem.renormalize else torch.softmax(z, -1).gather(-1, top.indices)
        g = torch.zeros_like(z).scatter(-1, top.indices, kept)
    else:
        g = torch.softmax(z, -1)
    y = u + t["scale"] * (g @ t["vectors"])
    if not problem.norm:
        return {"y": y, "gates": g}
    pooled, size, width = y, min(problem.pool_size, y.shape[-2]), y.shape[-1:]
    if problem.pool == "max":
        pooled = F.max_pool1d(y.mT, size, ceil_mode=True).mT
    elif problem.pool == "mean":
        pooled = F.avg_pool1d(y.mT, size, ceil_mode=True).mT
    if problem.norm == "layer":
        return {"y": y, "gates": g, "normed": F.layer_norm(pooled, width, t.get("norm_weight"), t.get("norm_bias"), problem.eps)}
    normed = F.rms_norm(pooled, width, t.get("norm_weight"), problem.eps)
    return {"y": y, "gates": g, "normed": normed + t["norm_bias"] if "norm_bias" in t else normed}


def call(module: object, problem: Problem, inputs: Tensors, settings: Mapping[str, object]) -> Tensors:
    """`functional` and `reference` have the same two functions."""
    x, weight, bias, vectors, scale = (inputs.get(name) for name in ("x", "weight", "bias", "vectors", "scale"))
    if not problem.norm:
        y, gates = module.steer(x, weight, bias, vectors, scale, **settings)  # type: ignore[attr-defined]
        return {"y": y, "gates": gates}
    y, normed, gates = module.steer_norm(  # type: ignore[attr-defined]
        x,
        weight,
        bias,
        vectors,
        scale,
        inputs.get("norm_weight"),
        inputs.get("norm_bias"),
        residual=inputs.get("residual"),
        eps=problem.eps,
        rms=problem.norm == "rms",
        pool=problem.pool,
        pool_size=problem.pool_size,
        **settings,
    )
    return {"y": y, "normed": normed, "gates": gates}


def _differentiated(problem: Problem, outputs: Tensors, inputs: Tensors, incoming: Tensors) -> Tensors:
    """The outputs, and under "d" + name the gradient of every wanted input (zeros for one that nothing incoming depends on)."""
    wanted = [name for name in problem.wanted if name in inputs]
    through = [name for name in incoming if outputs[name].requires_grad]
    grads = torch.autograd.grad(
        [outputs[name] for name in through],
        [inputs[name] for name in wanted],
        [incoming[name].to(outputs[name].dtype) for name in through],
        allow_unused=True,
    )
    results = {name: tensor.detach() for name, tensor in outputs.items()}
    for name, grad in zip(wanted, grads, strict=True):
        results["d" + name] = torch.zeros_like(inputs[name]) if grad is None else grad
    return results
