"""The report of a `gpu_check.py` run: report.md, roofline.png and bars.png from gpu_check.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from report import NAMES, bytes_in_words, seconds_in_words, table, times_faster

__all__ = ["BARS", "bars", "write"]

FORMULAS = ("unsteered", "unsteered_compiled", "public", "eager", "compiled")
COLOURS = {"public": "#b0b0b0", "eager": "#737373", "compiled": "#6baed6", "triton": "#7570b3", "cuda": "#d95f02", "cpu": "#1b9e77"}

BARS = {
    "steer forward, bfloat16, N 24000: share of copy bandwidth": (">=", 0.90),
    "steer_norm forward + backward, bfloat16, N 24000: share of copy bandwidth": (">=", 0.85),
    "encoder forward, B 1: time over the unsteered encoder's": ("<=", 1.00),
    "encoder forward, B 16: time over the unsteered encoder's": ("<=", 1.00),
    "encoder forward, B 1: time over torch.compile of the unsteered encoder": ("<=", 1.03),
    "encoder forward, B 16: time over torch.compile of the unsteered encoder": ("<=", 1.03),
    "training step, B 1: the public formula's time over ours": (">=", 1.30),
    "training step, B 16: the public formula's time over ours": (">=", 1.30),
    "steer forward, bfloat16, N 24000: 64 experts' time over 8 experts'": ("<=", 1.20),
}


def write(folder: Path) -> str:
    """Write the report of ``folder``/gpu_check.json beside it; the verdicts, as text."""
    found = json.loads((folder / "gpu_check.json").read_text())
    pictures = _pictures(found, folder)
    verdicts = table(["what", "bar", "backend", "measured", "verdict"], _verdicts(found)) if _backends(found) else "Nothing was measured."
    parts = [
        "# GPU check",
        "\n".join(f"- {line}" for line in _provenance(found)),
        "## Stages",
        table(["stage", "state", "time"], _stages(found)),
    ]
    if tests := list(_tests(found)):
        parts += ["## Tests on the device", table(["tests", "passed", "failed", "skipped"], tests), *_failures(found)]
    parts += ["## Against the bars", verdicts]
    if limits := _results(found, "device"):
        parts += ["## The device's own limits", table(["what", "measured"], _limits(limits))]
    parts += [f"![{picture.stem}]({picture.name})" for picture in pictures]
    if passes := _results(found, "op"):
        header = ["pass", *(NAMES.get(name, name) for name in _variants(passes)), "best backend against best formula", "of copy bandwidth"]
        parts += ["## One layer's pass", table(header, _op_rows(found, passes))]
    if encoders := _results(found, "encoder"):
        header = ["encoder", *(f"{NAMES.get(name, name)}, peak" for name in _variants(encoders))]
        parts += ["## Whisper encoder", table(header, _encoder_rows(encoders))]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return verdicts


def bars(found: dict[str, Any], backend: str) -> dict[str, float | None]:
    """What a run measured for each of `BARS` with one backend; None where it did not get that far."""
    passes, encoders = _results(found, "op"), _results(found, "encoder")

    def seconds(key: str, variant: str) -> float | None:
        return passes.get(key, {}).get("seconds", {}).get(variant)

    def share(key: str) -> float | None:
        return _share(found, passes[key], backend) if seconds(key, backend) else None

    def encoder(batch: int, direction: str, over: str, under: str) -> float | None:
        for result in encoders.values():
            if (result["batch"], result["direction"]) == (batch, direction) and {over, under} <= result["seconds"].keys():
                return result["seconds"][over] / result["seconds"][under]
        return None

    few, many = (seconds(f"steer large-v3-N24000-E{experts}-bfloat16 forward", backend) for experts in (8, 64))
    values = [
        share("steer large-v3-N24000-E8-bfloat16 forward"),
        share("steer_norm large-v3-N24000-E8-bfloat16 forward+backward"),
        encoder(1, "forward", backend, "unsteered"),
        encoder(16, "forward", backend, "unsteered"),
        encoder(1, "forward, compiled", backend, "unsteered_compiled"),
        encoder(16, "forward, compiled", backend, "unsteered_compiled"),
        encoder(1, "training step", "public", backend),
        encoder(16, "training step", "public", backend),
        many / few if few and many else None,
    ]
    return dict(zip(BARS, values, strict=True))


# --- what was found ----------------------------------------------------------------------------------------------------------------------


def _results(found: dict[str, Any], stage: str) -> dict[str, Any]:
    return found["stages"].get(stage, {}).get("results", {})


def _variants(results: dict[str, Any]) -> list[str]:
    names = {name for result in results.values() for name in result["seconds"]}
    return [name for name in FORMULAS if name in names] + sorted(names.difference(FORMULAS))


def _backends(found: dict[str, Any]) -> list[str]:
    return [name for name in _variants(_results(found, "op") | _results(found, "encoder")) if name not in FORMULAS]


def _share(found: dict[str, Any], result: dict[str, Any], variant: str) -> float | None:
    """Bytes that have to move over the time taken, as a share of a copy of about the same size."""
    copies = _results(found, "device")
    size = "N24000" if result["N"] > 6000 else "N6000" if result["N"] > 1500 else "N1500"
    copy = copies.get(f"copy {size}") or copies.get("copy N1500")
    return None if copy is None else result["bytes_to_move"] / result["seconds"][variant] / copy["bytes_per_s"]


def _provenance(found: dict[str, Any]) -> Iterator[str]:
    environment = _results(found, "environment")
    machine, gpu = environment.get("machine", {}), environment.get("gpu", {})
    if found.get("rehearsal"):
        yield "A rehearsal at small sizes: these numbers mean nothing"
    yield f"Device: {gpu.get('name', 'no GPU')}" + (f", {gpu['multiprocessors']} multiprocessors, CUDA {gpu['cuda']}" if gpu else "")
    if driver := environment.get("nvidia-smi"):
        yield "nvidia-smi: " + ", ".join(f"{name} {value}" for name, value in driver.items())
    versions = machine.get("versions", {})
    yield "Versions: " + ", ".join([f"Python {machine.get('python_version', '?')}", *(f"{k} {v}" for k, v in versions.items() if v)])
    yield f"Date: {found['date']}; commit: {found['commit'] or 'unknown'}; seed: {found['seed']}"
    yield "Medians of runs that took turns. Passes: device time, inputs in rotation; encoders: wall time to the end of the work"


def _stages(found: dict[str, Any]) -> Iterator[list[str]]:
    for name, stage in found["stages"].items():
        yield [name, stage["state"], f"{stage['seconds']:.0f} s"]


def _tests(found: dict[str, Any]) -> Iterator[list[str]]:
    for name, result in _results(found, "tests").items():
        yield [name, str(result["passed"]), str(result["failed"]), str(result.get("skipped", 0))]
    for name, result in _results(found, "sanitizer").items():
        if isinstance(result, dict):
            yield [f"compute-sanitizer, {name}", "; ".join(result["summary"]) or "-", f"exit {result['exit']}", "-"]


def _failures(found: dict[str, Any]) -> Iterator[str]:
    lines = [f"{name}: {line}" for name, result in _results(found, "tests").items() for line in result.get("failures", [])]
    faults = [
        f"{key}, {variant}: {fault}"
        for stage in ("op", "encoder")
        for key, result in _results(found, stage).items()
        for variant, fault in result.get("faults", {}).items()
    ]
    if lines or faults:
        yield "\n".join(f"- {line}" for line in [*lines, *faults])


def _verdicts(found: dict[str, Any]) -> Iterator[list[str]]:
    for backend in _backends(found):
        for what, value in bars(found, backend).items():
            sign, bound = BARS[what]
            reached = value is not None and (value >= bound if sign == ">=" else value <= bound)
            verdict = "not measured" if value is None else "reached" if reached else "missed"
            yield [what, f"{sign} {bound:.2f}", backend, "-" if value is None else f"{value:.2f}", verdict]


def _limits(limits: dict[str, Any]) -> Iterator[list[str]]:
    for name, result in limits.items():
        if "bytes_per_s" in result:
            yield [name, f"{result['bytes_per_s'] / 1e9:.0f} GB/s, read and written"]
        else:
            yield [name, f"{result['flop_per_s'] / 1e12:.1f} TFLOP/s"]


def _op_rows(found: dict[str, Any], passes: dict[str, Any]) -> Iterator[list[str]]:
    variants = _variants(passes)
    for key, result in passes.items():
        seconds = result["seconds"]
        fused = {name: seconds[name] for name in seconds if name not in FORMULAS}
        best = min(fused, key=lambda name: fused[name], default=None)
        formula = min((seconds[name] for name in FORMULAS if name in seconds), default=None)
        share = None if best is None else _share(found, result, best)
        yield [
            key,
            *(seconds_in_words(seconds.get(name)) for name in variants),
            "-" if best is None else f"{best} {times_faster(formula, fused[best])}",
            "-" if share is None else f"{100 * share:.0f}%",
        ]


def _encoder_rows(encoders: dict[str, Any]) -> Iterator[list[str]]:
    for key, result in encoders.items():
        yield [
            key,
            *(
                f"{seconds_in_words(result['seconds'].get(name))}, {bytes_in_words(result['peak_bytes'].get(name))}"
                for name in _variants(encoders)
            ),
        ]


# --- pictures ----------------------------------------------------------------------------------------------------------------------------


def _pictures(found: dict[str, Any], folder: Path) -> list[Path]:
    """The roofline and the bars, of what there is; none without matplotlib."""
    passes = _results(found, "op")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    if not passes:
        return []
    roofline, bars_path = folder / "roofline.png", folder / "bars.png"
    _roofline(Figure(figsize=(9, 6), layout="constrained"), found, passes).savefig(roofline, dpi=110)
    _bars(Figure(figsize=(11, 1.5 + 0.3 * len(passes)), layout="constrained"), found, passes).savefig(bars_path, dpi=110)
    return [roofline, bars_path]


def _roofline(figure: Any, found: dict[str, Any], passes: dict[str, Any]) -> Any:
    """Arithmetic a second over arithmetic a byte; the slope is the copy's bandwidth, the ceiling the matrix product's rate."""
    axis = figure.subplots()
    for variant in _variants(passes):
        results = [result for result in passes.values() if variant in result["seconds"]]
        intensity = [result["flop"] / result["bytes_to_move"] for result in results]
        rate = [result["flop"] / result["seconds"][variant] for result in results]
        axis.scatter(intensity, rate, s=16, color=COLOURS.get(variant), label=NAMES.get(variant, variant))
    limits = _results(found, "device")
    bandwidth = max((limit["bytes_per_s"] for limit in limits.values() if "bytes_per_s" in limit), default=None)
    ceiling = max((limit["flop_per_s"] for limit in limits.values() if "flop_per_s" in limit), default=None)
    if bandwidth and ceiling:
        ends = [0.5, ceiling / bandwidth, 4 * ceiling / bandwidth]
        axis.plot(ends, [min(ceiling, bandwidth * end) for end in ends], color="black", linewidth=1, label="the device's limits")
    axis.set(xscale="log", yscale="log", xlabel="FLOP a byte that has to move", ylabel="FLOP a second")
    axis.set_title("\n".join(list(_provenance(found))[:1]), fontsize=9)
    axis.legend(fontsize=8, frameon=False)
    return figure


def _bars(figure: Any, found: dict[str, Any], passes: dict[str, Any]) -> Any:
    """Share of copy bandwidth of every pass and variant."""
    axis = figure.subplots()
    variants = _variants(passes)
    thickness = 0.8 / len(variants)
    for index, variant in enumerate(variants):
        shares = [(row, _share(found, result, variant)) for row, result in enumerate(passes.values()) if variant in result["seconds"]]
        places = [row + (index - (len(variants) - 1) / 2) * thickness for row, share in shares if share is not None]
        values = [100 * share for _, share in shares if share is not None]
        axis.barh(places, values, thickness, color=COLOURS.get(variant), label=NAMES.get(variant, variant))
    axis.set_yticks(range(len(passes)), list(passes), fontsize=7)
    axis.invert_yaxis()
    axis.axvline(100, color="black", linewidth=0.8)
    axis.set_xlabel("percent of copy bandwidth, counting only the bytes that have to move")
    axis.legend(fontsize=8, frameon=False)
    return figure
