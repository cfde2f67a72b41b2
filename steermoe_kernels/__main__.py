"""``python -m steermoe_kernels``: versions, the build, the devices, every backend's state, and a self-check.

Exit status 1 if STEERMOE_BACKEND names a backend that cannot run, or if a backend fails the self-check: its outputs and gradients may be at
most twice as wrong as the same formula in plain PyTorch of the same dtype, both against the reference in float64.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import __version__, reference
from . import functional as SF
from .backends import backend_states, get_backend, select_backend

__all__ = ["main"]

_PACKAGES = ("numpy", "triton", "transformers")
_COMPILED = ("_cpu", "_cuda")
_CHECKED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_COLUMN = 12
_DRAWS = 8


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m steermoe_kernels", description="What is installed here, and whether it computes right."
    )
    parser.parse_args(argv)
    states = backend_states()
    _section(f"steermoe_kernels {__version__}", _versions())
    _section("compiled modules", _builds())
    _section("devices", _devices())
    chosen = list(_automatic())
    _section("backends", iter([(name, text) for name, text, _ in chosen] + list(_states(states))))
    print(
        "self-check: outputs and gradients, at most twice as wrong as plain PyTorch of the same dtype (error, allowed error of the worst)"
    )
    passed = all(works for _, _, works in chosen) and not _simd_is_unknown()
    for name, reason in states.items():
        for line, right in _check(name) if reason is None else [("skipped, it cannot run here", True)]:
            passed &= right
            print(f"  {name:<{_COLUMN}} {line}")
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


def _section(title: str, lines: Iterator[tuple[str, str]]) -> None:
    print(title)
    for name, text in lines:
        print(f"  {name:<{_COLUMN}} {text}")
    print()


# --- what is here -------------------------------------------------------------------------------------------------------------------------


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", torch.__version__
    for package in _PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"


def _builds() -> Iterator[tuple[str, str]]:
    for name in _COMPILED:
        try:
            module = importlib.import_module(f"{__package__}.{name}")
        except ImportError as error:
            yield name, f"absent: {error}"
        else:
            for key, value in module.build_info().items():
                yield name, f"{key}: {value}"


def _devices() -> Iterator[tuple[str, str]]:
    yield "cpu", f"{_cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {_simd_level()}"
    if not torch.backends.cuda.is_built():
        yield "gpu", "none: this torch is built without CUDA"
    elif not torch.cuda.is_available():
        yield "gpu", "none found"
    else:
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = f"{properties.total_memory / 2**30:.0f} GiB"
            yield f"gpu {index}", f"{properties.name}, sm_{properties.major}{properties.minor}, {memory}"


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        models = []
    return models[0] if models else platform.processor() or platform.machine()


def _simd_level() -> str:
    levels = f"torch uses {torch.backends.cpu.get_cpu_capability()}"
    try:
        core = importlib.import_module(f"{__package__}._cpu")
    except ImportError:
        return levels
    if _simd_is_unknown():
        return f"kernels FAIL: STEERMOE_SIMD={os.environ['STEERMOE_SIMD']} names none of their instruction sets, {levels}"
    return f"kernels use {os.environ.get('STEERMOE_SIMD') or core.simd_level()}, {levels}"


def _simd_is_unknown() -> bool:
    """Whether STEERMOE_SIMD keeps C++ kernels that are there from running."""
    try:
        core = importlib.import_module(f"{__package__}._cpu")
    except ImportError:
        return False
    named = os.environ.get("STEERMOE_SIMD", "")
    return named != "" and not core.has_level(named)


def _automatic() -> Iterator[tuple[str, str, bool]]:
    """What "auto" means on each device, and whether it runs."""
    by = ", by STEERMOE_BACKEND" if os.environ.get("STEERMOE_BACKEND") else ""
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        try:
            chosen = select_backend("auto", torch.device(device), torch.float32).__name__.rpartition(".")[2]
        except (ValueError, RuntimeError) as error:
            yield "auto", f"FAILS for tensors on {device}: {error}", False
        else:
            yield "auto", f"{chosen} for tensors on {device}{by}", True


def _states(states: Mapping[str, str | None]) -> Iterator[tuple[str, str]]:
    for name, reason in states.items():
        yield name, "available" if reason is None else f"unavailable: {reason}"


# --- self-check ---------------------------------------------------------------------------------------------------------------------------

Tensors = dict[str, Tensor]
Formula = Callable[[Tensors], Tensors]


def _check(backend: str) -> Iterator[tuple[str, bool]]:
    """A line for every dtype the backend takes, with whether it is right."""
    cpu = torch.device("cpu")
    device = cpu if get_backend(backend).rejects(cpu, torch.float32) is None else torch.device("cuda")
    for dtype in _CHECKED:
        name = str(dtype).removeprefix("torch.")
        if (reason := get_backend(backend).rejects(device, dtype)) is not None:
            yield f"{name:<9} skipped: {reason}", True
        elif dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1" and backend == "triton":
            yield f"{name:<9} skipped: Triton's interpreter multiplies bfloat16 wrongly", True
        else:
            try:
                yield _compare(backend, device, dtype, f"{name:<9} on {device.type:<5}")
            except Exception as error:  # whatever a broken backend throws is its result
                yield f"{name:<9} FAILED: {type(error).__name__}: {error}", False


def _compare(backend: str, device: torch.device, dtype: torch.dtype, start: str) -> tuple[str, bool]:
    problems = [_draw(dtype, device, seed) for seed in range(_DRAWS)]
    # Roundings at the store and in the accumulator; float64 has no finer truth to be held against, only float32 to be told from.
    unavoidable = 2.0**-40 if dtype == torch.float64 else torch.finfo(dtype).eps / 2 + 2 * torch.finfo(torch.float32).eps
    worst = (0.0, "", 0.0, 0.0)
    for title, fused, plain, exact in (
        ("steer", _steer(SF, backend=backend), _plain_steer, _steer(reference)),
        ("steer_norm", _steer_norm(SF, backend=backend), _plain_steer_norm, _steer_norm(reference)),
    ):
        truth = _results(exact, [{name: tensor.double() for name, tensor in problem.items()} for problem in problems])
        usual, ours = _results(plain, problems), _results(fused, problems)
        for name in truth:
            allowed = max(2 * _error(usual[name], truth[name]), unavoidable)
            error = _error(ours[name], truth[name])
            ratio = error / allowed if error == error else float("inf")
            worst = max(worst, (ratio, f"{title} {name}", error, allowed))
    ratio, what, error, allowed = worst
    right = ratio <= 1
    return f"{start} {'ok' if right else 'FAILED'}: {what} {error:.2g}, {allowed:.2g}", right


def _draw(dtype: torch.dtype, device: torch.device, seed: int) -> Tensors:
    """A small problem at odd sizes: two clips of 19 frames, width 97, 7 experts. The bias holds the logits apart, so that rounding does not
    change which experts are selected, and the incoming gradient leans on the vectors, so that the scale's gradient does not cancel."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    width, experts, stream = 97, 7, (2, 19, 97)
    vectors = normal(experts, width)
    drawn = {
        "x": normal(*stream),
        "residual": normal(*stream),
        "weight": 0.1 * normal(experts, width) / width**0.5,
        "bias": torch.randperm(experts, generator=generator).double(),
        "vectors": vectors,
        "scale": torch.tensor(0.7, dtype=torch.float64),
        "norm_weight": 1 + 0.3 * normal(width),
        "norm_bias": 0.3 * normal(width),
        "dy": normal(*stream) + vectors.mean(0),
        "dnormed": normal(2, 10, width) + vectors.mean(0),
        "dgates": normal(2, 19, experts),
    }
    return {name: tensor.to(device, dtype) for name, tensor in drawn.items()}


def _steer(module: object, **settings: str) -> Formula:
    def run(t: Tensors) -> Tensors:
        y, gates = module.steer(t["x"], t["weight"], t["bias"], t["vectors"], t["scale"], **settings)  # type: ignore[attr-defined]
        return {"y": y, "gates": gates}

    return run


def _steer_norm(module: object, **settings: str) -> Formula:
    def run(t: Tensors) -> Tensors:
        parameters = (t["weight"], t["bias"], t["vectors"], t["scale"], t["norm_weight"], t["norm_bias"])
        options = {"residual": t["residual"], "pool": "mean", "pool_size": 2, "top_k": 2}
        y, normed, gates = module.steer_norm(t["x"], *parameters, **options, **settings)  # type: ignore[attr-defined]
        return {"y": y, "normed": normed, "gates": gates}

    return run


def _plain_steer(t: Tensors) -> Tensors:
    gates = torch.softmax(F.linear(t["x"], t["weight"], t["bias"]), -1)
    return {"y": t["x"] + t["scale"] * (gates @ t["vectors"]), "gates": gates}


def _plain_steer_norm(t: Tensors) -> Tensors:
    u = t["x"] + t["residual"]
    largest, indices = F.linear(u, t["weight"], t["bias"]).topk(2, -1)
    gates = u.new_zeros((*u.shape[:2], t["weight"].shape[0])).scatter(-1, indices, torch.softmax(largest, -1))
    y = u + t["scale"] * (gates @ t["vectors"])
    pooled = F.avg_pool1d(y.mT, 2, ceil_mode=True).mT
    return {"y": y, "normed": F.layer_norm(pooled, pooled.shape[-1:], t["norm_weight"], t["norm_bias"]), "gates": gates}


def _results(formula: Formula, problems: Sequence[Tensors]) -> Tensors:
    """Outputs and the gradients of all inputs, of all problems together."""
    found: dict[str, list[Tensor]] = {}
    for problem in problems:
        inputs = {name: tensor.detach().requires_grad_() for name, tensor in problem.items() if not name.startswith("d")}
        outputs = formula(inputs)
        incoming = [problem["d" + name].to(output.dtype) for name, output in outputs.items()]
        grads = torch.autograd.grad(list(outputs.values()), list(inputs.values()), incoming, allow_unused=True)
        named = outputs | {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True) if grad is not None}
        for name, tensor in named.items():
            found.setdefault(name, []).append(tensor.detach())
    return {name: torch.stack(tensors) for name, tensors in found.items()}


def _error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


if __name__ == "__main__":
    sys.exit(main())
