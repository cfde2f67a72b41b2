"""The stages of `gpu_check.py`, one generator each: they yield ``(key, result)`` as results come, so that a cut-off run keeps what it has.

A stage runs in a process of its own: a kernel that takes the device down takes one stage down with it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

__all__ = ["STAGES", "DeviceLostError", "Settings", "Stage"]

ROOT = Path(__file__).resolve().parents[1]
_FAREWELL = 15.0  # seconds that a test run may take to end when it is asked to


@dataclass(frozen=True)
class Settings:
    """``rehearse``: everything on whatever device there is, at sizes that take seconds; its numbers mean nothing.

    ``cases``: frames, experts and top_k of further passes for the op stage, which take precedence over its own. ``seconds``: what is left
    to a stage before it is cut off. ``without``: variants to leave out, because they have taken the device down.
    """

    out: Path
    seed: int = 0
    rehearse: bool = False
    cases: tuple[tuple[int, int, int | None], ...] = ()
    seconds: float = 3600.0
    without: tuple[str, ...] = ()

    @property
    def site(self) -> Path:
        """Where the build stage installs the package, and every later stage imports it from."""
        return self.out / "site"

    def known(self, stage: str) -> dict[str, Any]:
        """What a stage that starts again, without what ended it, had found before."""
        partial = self.out / f"{stage}.json"
        return json.loads(partial.read_text()) if self.without and partial.exists() else {}


Results = Iterator[tuple[str, Any]]


class DeviceLostError(RuntimeError):
    """A variant, whose name this is, took the device down: no call after it works in this process."""


@dataclass(frozen=True)
class Stage:
    """What to run, and the seconds after which it is cut off."""

    run: Callable[[Settings], Results]
    limit: float


# --- building and looking around ----------------------------------------------------------------------------------------------------------


def build(settings: Settings) -> Results:
    """Install this checkout as it stands, with the torch, CMake, Ninja and pybind11 that are there already."""
    missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    missing += [] if importlib.util.find_spec("pybind11") else ["pybind11"]
    if missing:
        raise RuntimeError(f"the build needs {', '.join(missing)} in this environment: pip install {' '.join(missing)}")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--upgrade",
        "--target",
        str(settings.site),
        str(ROOT),
    ]
    # The compiler's usual place, for a shell that does not look there.
    environment = os.environ | {"PATH": os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"the package does not build: {(done.stdout + done.stderr)[-3000:]}")
    yield "installed", sorted(path.name for path in (settings.site / "steermoe_kernels").glob("*.so"))


def environment(settings: Settings) -> Results:
    """The machine, the versions, and which backends can run."""
    import torch
    from machine import describe

    yield "machine", describe({"system": platform.system(), "python_version": platform.python_version()})
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        yield (
            "gpu",
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_bytes": properties.total_memory,
                "cuda": torch.version.cuda,
            },
        )
    if shutil.which("nvidia-smi"):
        query = "driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
        done = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True)
        yield "nvidia-smi", dict(zip(query.split(","), (field.strip() for field in done.stdout.split(",")), strict=False))


def device(settings: Settings) -> Results:
    """The device's own limits: copies as large as the streams and larger, and matrix products."""
    import torch
    from machine import DEVICE
    from timing import interleave

    sizes = {"N1500": 1500 * 1280 * 2, "N6000": 6000 * 1280 * 2, "N24000": 24000 * 1280 * 2, "1GB": 2**30}
    if settings.rehearse:
        sizes = {"N1500": sizes["N1500"]}
    for name, size in sizes.items():
        copies = 2 if settings.rehearse else max(2, min(32, 2**28 // size))  # more than fit into a cache, in rotation
        sources = [torch.randint(0, 255, (size,), dtype=torch.uint8, device=DEVICE) for _ in range(copies)]
        targets = [torch.empty_like(source) for source in sources]
        thunks = [lambda s=source, t=target: t.copy_(s) for source, target in zip(sources, targets, strict=True)]
        seconds = interleave({"copy": lambda thunks=thunks: thunks}, DEVICE, 0.3, 5)["copy"].usual
        yield f"copy {name}", {"bytes_per_s": 2 * size / statistics.median(seconds)}
        del sources, targets, thunks
    edge = 512 if settings.rehearse else 8192
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        left, right = (torch.randn(edge, edge, device=DEVICE).to(dtype) for _ in range(2))
        seconds = interleave({"product": lambda left=left, right=right: [lambda: left @ right]}, DEVICE, 0.3, 3)["product"].usual
        yield f"product {str(dtype)[6:]}", {"flop_per_s": 2 * edge**3 / statistics.median(seconds)}


# --- is it right --------------------------------------------------------------------------------------------------------------------------


def fused_backends(dtype: Any) -> list[str]:
    """The compiled backends that take a stream of ``dtype`` on the device that is measured."""
    from machine import DEVICE

    from steermoe_kernels import available_backends
    from steermoe_kernels.backends import get_backend

    return [name for name in available_backends() if name != "reference" and get_backend(name).rejects(DEVICE, dtype) is None]


def tests(settings: Settings) -> Results:
    """The kernels' tests of every fused backend, one process a backend and dtype, all at once.

    Results come in the order in which the processes end. Before the stage is cut off, those still running are asked to end, and say how
    far they came.
    """
    import torch

    until = time.monotonic() + settings.seconds - _FAREWELL

    folder = ROOT / "tests" / "kernels"
    others = [folder / f"test_{name}.py" for name in ("determinism", "routing", "memory", "bad_input", "composability")]
    jobs: dict[str, list[str]] = {}
    for backend in fused_backends(torch.float32):
        for dtype in ("float32", "bfloat16", "float16"):
            only = f"{backend}-{dtype}" + (" and 1x7x33 and E8" if settings.rehearse else "")
            jobs[f"{backend} {dtype}"] = [str(folder / "test_accuracy.py"), "-k", only]
        jobs[f"{backend} sizes"] = [
            str(folder / "test_accuracy.py"),
            "-k",
            f"{backend} and every_size" + (" and frames" if settings.rehearse else ""),
        ]
        files = others[:1] if settings.rehearse else others
        jobs[f"{backend} others"] = [*map(str, files), "-k", backend]
    running = {name: _start_pytest(settings, name, arguments) for name, arguments in jobs.items()}
    asked = False
    while running:
        for name in [name for name, process in running.items() if process.poll() is not None]:
            yield name, _outcome(_report(settings, name), running.pop(name).returncode)
        if not asked and time.monotonic() > until:
            asked = True
            for process in running.values():
                process.send_signal(signal.SIGINT)  # on which pytest still writes its report
        time.sleep(0.1)


def _report(settings: Settings, name: str) -> Path:
    return settings.out / f"tests-{name.replace(' ', '-')}.xml"


def _start_pytest(settings: Settings, name: str, arguments: list[str]) -> subprocess.Popen:
    report = _report(settings, name)
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}"]
    with report.with_suffix(".txt").open("w") as output:  # a pipe would fill up before its turn to be read comes
        return subprocess.Popen(
            [*command, f"--junitxml={report}", *arguments],
            cwd=settings.out,
            env=os.environ | {"OMP_NUM_THREADS": "2"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _outcome(report: Path, code: int) -> dict[str, Any]:
    """How many tests passed, and what the first failures said."""
    if not report.exists():
        return {"passed": 0, "failed": 0, "exit": code, "output": report.with_suffix(".txt").read_text(errors="replace")[-2000:]}
    cases = list(ElementTree.parse(report).iter("testcase"))
    faults = [(case, fault) for case in cases for fault in (*case.findall("failure"), *case.findall("error"))]
    skipped = sum(case.find("skipped") is not None for case in cases)
    messages = [f"{case.get('name')}: {(fault.get('message') or '')[:400]}" for case, fault in faults[:20]]
    return {"passed": len(cases) - len(faults) - skipped, "failed": len(faults), "skipped": skipped, "exit": code, "failures": messages}


def sanitizer(settings: Settings) -> Results:
    """compute-sanitizer's memory and race checks over a few problems of every fused backend, where it is installed."""
    import torch

    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        yield "skipped", "compute-sanitizer is not installed"
        return
    target = str(ROOT / "tests" / "kernels" / "test_accuracy.py")
    # Without torch's own pools, every tensor ends where the memory does that the checks know of. Only our kernels are looked at.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for backend in fused_backends(torch.float32):
        for check in ("racecheck", "memcheck", "synccheck"):
            command = [tool, "--tool", check, "--kernel-name", "kns=steer", "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q"]
            command += ["-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}", target, "-k", _watched(backend)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=settings.out, env=environment)
            summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line or " passed" in line or " failed" in line]
            yield (
                f"{backend} {check}",
                {"exit": done.returncode, "summary": summary, "output": done.stdout[:4000] if done.returncode else ""},
            )


def _watched(backend: str) -> str:
    """Of the accuracy tests, those in which blocks take several tiles, and one at a width for the kernels without tensor cores."""
    return f"{backend}-bfloat16 and (9001x40 or 6001x40) or {backend}-float32 and (9001x40 or 3x5x33-E8-layer-residual)"


# --- is it fast ---------------------------------------------------------------------------------------------------------------------------


def op(settings: Settings) -> Results:
    """One layer's pass: every formula and fused backend, taking turns, in the order in which a cut-off run would miss them least."""
    import torch
    from machine import DEVICE
    from passes import DIRECTIONS, Case, Pass, suitable
    from timing import interleave

    large = Case("large-v3", dtype=torch.bfloat16)
    if settings.rehearse:
        cases = [Case("tiny", frames=60), Case("tiny", frames=60, norm=True)]
    else:
        sizes = [(16, 8, None), (1, 8, None), (16, 64, None), (4, 8, None), (16, 16, None), (16, 8, 2), (1, 64, None), (4, 64, None)]
        sizes += [(1, 16, None), (4, 16, None), (1, 8, 2)]
        cases = [
            replace(large, frames=1500 * batch, num_experts=experts, top_k=top_k, norm=norm)
            for batch, experts, top_k in sizes
            for norm in (False, True)
        ]
        cases += [replace(large, frames=50, norm=norm) for norm in (False, True)]
        cases += [Case("large-v3", frames=24000, norm=norm) for norm in (False, True)]
    own = [
        replace(large, frames=frames, num_experts=experts, top_k=top_k, norm=norm)
        for frames, experts, top_k in settings.cases
        for norm in (False, True)
    ]
    cases = own + cases
    for case in cases:
        keys = {direction: f"{'steer_norm' if case.norm else 'steer'} {case} {direction}" for direction in DIRECTIONS}
        if settings.known("op").keys() >= set(keys.values()):
            continue
        formulas = ["public", "eager"]
        # Each shape compiles for some seconds: the two ends of the range are enough of it.
        if not settings.rehearse and case.num_experts == 8 and case.frames in (1500, 24000) and case.top_k is None:
            formulas.append("compiled")
        variants = [*suitable(case, formulas), *(name for name in fused_backends(case.dtype) if name not in settings.without)]
        work = Pass(case, settings.seed)
        faults = {name: _proved(name, work.faults) for name in variants}
        right = [name for name in variants if faults[name] is None]
        for direction in DIRECTIONS:
            preparations = {name: work.preparation(name, direction) for name in right}
            times = interleave(preparations, DEVICE, 0.02 if settings.rehearse else 0.15, 3)
            yield (
                keys[direction],
                case.info(direction, "all")
                | {
                    "seconds": {name: statistics.median(each.usual) for name, each in times.items()},
                    "quartiles": {name: statistics.quantiles(each.usual, n=4)[::2] for name, each in times.items()},
                    "flop": _flop(case, direction),
                    "faults": {name: fault for name, fault in faults.items() if fault},
                },
            )
        del work
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


def _proved(variant: str, faults: Callable[[list[str]], dict[str, str | None]]) -> str | None:
    """What is wrong with a variant, a failure of its own included, so that the others are measured all the same; None if nothing is."""
    import torch

    try:
        return faults([variant])[variant]
    except Exception as error:
        try:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except Exception:
            raise DeviceLostError(variant) from error
        return f"{type(error).__name__}: {str(error)[:400]}"


def _flop(case: Any, direction: str) -> int:
    """Multiply-adds, counted twice: u W^T and g V forward; d V^T, dz W, dz^T u, g^T d and g V again backward."""
    products = {"forward": 2, "backward": 5, "forward+backward": 7}[direction]
    return 2 * products * case.frames * case.width * case.num_experts


def encoder(settings: Settings) -> Results:
    """Whisper large-v3's encoder with random weights: forward, a training step, and the peak of memory of that step."""
    import torch
    from machine import DEVICE
    from stacks import Encoders, Stack

    cases = [Stack("tiny", 1)] if settings.rehearse else [Stack("large-v3", 32, batch, torch.bfloat16) for batch in (16, 1)]
    # What takes minutes to compile comes last: a run that is cut off has the rest by then.
    for directions in (("forward", "training step"), ("forward, compiled",)):
        for case in cases:
            missing = [direction for direction in directions if f"{case} {direction}" not in settings.known("encoder")]
            if not missing:
                continue
            fused = [name for name in fused_backends(case.dtype) if name not in settings.without]
            encoders = Encoders(case, fused)
            for direction in missing:
                yield f"{case} {direction}", _timed_encoder(settings, encoders, fused, direction)
            del encoders
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()


def _timed_encoder(settings: Settings, encoders: Any, fused: list[str], direction: str) -> dict[str, Any]:
    from machine import DEVICE
    from timing import interleave

    case, kind = encoders.case, direction.partition(",")[0]
    steered = fused if "compiled" in direction else ["public", "eager", *fused]
    faults = {name: _proved(name, lambda names: encoders.faults(names, kind)) for name in steered}
    unsteered = {"forward": ["unsteered"], "training step": [], "forward, compiled": ["unsteered_compiled"]}[direction]
    timed = [*unsteered, *(name for name in steered if faults[name] is None)]
    preparations = {name: encoders.preparation(name, kind) for name in timed}
    times = interleave(preparations, DEVICE, 0.05 if settings.rehearse else 1.5, 3, queued=False)
    return {
        "model": case.model,
        "layers": case.num_layers,
        "batch": case.batch,
        "dtype": str(case.dtype)[6:],
        "direction": direction,
        "seconds": {name: statistics.median(each.usual) for name, each in times.items()},
        "quartiles": {name: statistics.quantiles(each.usual, n=4)[::2] for name, each in times.items()},
        "peak_bytes": {name: _peak(preparations[name]) for name in timed} if DEVICE.type == "cuda" else {},
        "faults": {name: fault for name, fault in faults.items() if fault},
    }


def _peak(prepare: Callable[[], Any]) -> int:
    """Bytes that one run takes at most beyond what lay there before."""
    import torch

    (thunk,) = prepare()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    thunk()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


STAGES = {
    "build": Stage(build, 150),
    "environment": Stage(environment, 40),
    "device": Stage(device, 40),
    "tests": Stage(tests, 170),
    "op": Stage(op, 180),
    "encoder": Stage(encoder, 130),
    "sanitizer": Stage(sanitizer, 120),
}
