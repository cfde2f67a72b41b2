"""Turn saved benchmark results into a Markdown table and a plot: ``python benchmarks/report.py RESULTS.json [-o DIR] [--compact]``.

Writes RESULTS.md and RESULTS.png beside the JSON file, or into DIR; with ``--compact`` prints the README's table instead. The results come
from ``pytest benchmarks/ --benchmark-only --benchmark-json=RESULTS.json``. Exit status 2, and one sentence, for a file that will not do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ReportError", "compact_tables", "full_report", "main", "read_results"]

NAMES = {
    "unsteered": "unsteered",
    "unsteered_compiled": "unsteered, torch.compile",
    "public": "public formula",
    "eager": "best eager",
    "compiled": "torch.compile",
    "ours": "this package",
}
KINDS = {
    "steer": "Steer",
    "steer_norm": "Add the residual, steer, LayerNorm",
    "kept": "Kept for backward",
    "whisper": "Whisper encoder layers",
}
DIRECTIONS = {"forward+backward": "forward + backward"}
OPERATORS = {"steer": "steer", "steer_norm": "add + steer + norm"}
AIMS = (  # for one layer of large-v3 in float32, as calls that follow each other
    ("forward", "eager", 2.0),
    ("forward", "compiled", 2.0),
    ("forward", "public", 10.0),
    ("forward + backward", "eager", 2.5),
    ("forward + backward", "public", 4.0),
)
KEPT_AIM = 0.05
COMPACT = {"model": "large-v3", "N": 1500, "E": 8, "dtype": "float32", "top_k": None}


class ReportError(Exception):
    """A results file that will not do, in one sentence."""


@dataclass(frozen=True)
class Measured:
    """One variant of a comparison."""

    info: dict[str, Any]
    stats: dict[str, float]

    @property
    def median(self) -> float:
        return self.stats["median"]

    @property
    def spread(self) -> float:
        """The interquartile range, as a share of the median."""
        return (self.stats["q3"] - self.stats["q1"]) / self.median


@dataclass(frozen=True)
class Comparison:
    """The variants that were timed taking turns."""

    name: str
    variants: dict[str, Measured]

    @property
    def kind(self) -> str:
        return self.name.split()[0]

    @property
    def info(self) -> dict[str, Any]:
        return next(iter(self.variants.values())).info

    @property
    def work(self) -> str:
        """The sizes, in words."""
        info = self.info
        words = [str(info.get("model")), f"N {info.get('N')}", f"D {info.get('D')}", f"E {info.get('E')}", f"L {info.get('L')}"]
        if info.get("top_k") is not None:
            words.append(f"top-{info['top_k']}")
        return ", ".join([*words, str(info.get("dtype"))])

    @property
    def direction(self) -> str:
        return DIRECTIONS.get(self.info.get("direction", ""), self.info.get("direction", ""))

    def seconds(self, variant: str) -> float | None:
        return self.variants[variant].median if variant in self.variants else None

    def seconds_after_others(self, variant: str) -> float | None:
        return self.variants[variant].info.get("after_others_s") if variant in self.variants else None

    def bytes(self, variant: str, key: str = "kept_bytes") -> int | None:
        return self.variants[variant].info.get(key) if variant in self.variants else None


@dataclass(frozen=True)
class Results:
    source: Path
    machine: dict[str, Any]
    commit: dict[str, Any]
    date: str
    comparisons: list[Comparison]

    def of_kind(self, kind: str) -> list[Comparison]:
        return [comparison for comparison in self.comparisons if comparison.kind == kind]


# --- reading ------------------------------------------------------------------------------------------------------------------------------


def read_results(path: Path) -> Results:
    """The comparisons in a pytest-benchmark JSON file, in the file's order. `ReportError` for anything else."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ReportError(f"{path} is not JSON: {error}") from error
    if not isinstance(saved, dict) or not isinstance(saved.get("benchmarks"), list):
        raise ReportError(f"{path} is not a file that pytest-benchmark saved: it has no list of benchmarks")
    if not saved["benchmarks"]:
        raise ReportError(f"{path} holds no benchmarks: make it with pytest benchmarks/ --benchmark-only --benchmark-json={path.name}")
    groups: dict[str, dict[str, Measured]] = {}
    for entry in saved["benchmarks"]:
        try:
            info, stats = entry["extra_info"], entry["stats"]
            measured = Measured(info, {name: float(stats[name]) for name in ("q1", "median", "q3")})
            if not measured.median > 0:
                raise ReportError(f"{path} holds a benchmark with a median of {measured.median:g} s: {entry['group']}, {info['variant']}")
            groups.setdefault(entry["group"], {})[info["variant"]] = measured
        except (KeyError, TypeError, ValueError) as error:
            raise ReportError(f"{path} holds a benchmark that is not one of this folder's: it lacks {error}") from error
    comparisons = [Comparison(name, variants) for name, variants in groups.items() if str(name).split(" ")[0] in KINDS]
    if not comparisons:
        raise ReportError(f"{path} holds no comparison of this folder's, only {', '.join(map(str, groups))}")
    machine, commit = (saved.get(key) or {} for key in ("machine_info", "commit_info"))
    return Results(path, machine, commit, str(saved.get("datetime", ""))[:10], comparisons)


# --- words --------------------------------------------------------------------------------------------------------------------------------


def seconds_in_words(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{_three_digits(seconds / size)} {unit}"
    return f"{_three_digits(seconds / 1e-6)} µs"


def bytes_in_words(size: int | None) -> str:
    return "-" if size is None else f"{_three_digits(size / 1e6)} MB"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def times_faster(base: float | None, ours: float | None) -> str:
    """``base / ours`` as a factor; a loss says so."""
    if base is None or ours is None:
        return "-"
    ratio = base / ours
    return f"{ratio:.2f}x" + (" (slower)" if round(ratio, 2) < 1 else "")


def percentage(part: float | None, whole: float | None) -> str:
    return "-" if part is None or not whole else f"{100 * part / whole:.2g}%"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def provenance(results: Results) -> list[str]:
    """What the numbers were measured on and with, one line each."""
    machine, commit = results.machine, results.commit
    cpu, versions = machine.get("cpu") or {}, machine.get("versions") or {}
    processor = f"{cpu.get('brand_raw', 'unknown CPU')}, {cpu.get('count', '?')} cores, {machine.get('threads', '?')} threads"
    if cpu.get("simd"):
        processor += f", {cpu['simd']}"
    lines = [f"Machine: {machine['gpu']}; {processor}" if machine.get("gpu") else f"Machine: {processor}"]
    lines.append(
        "Versions: " + ", ".join([f"Python {machine.get('python_version', '?')}", *(f"{k} {v}" for k, v in versions.items() if v)])
    )
    changed = " with uncommitted changes" if commit.get("dirty") else ""
    lines.append(f"Date: {results.date or 'unknown'}; commit: {str(commit.get('id', 'unknown'))[:12]}{changed}")
    return lines


# --- tables -------------------------------------------------------------------------------------------------------------------------------


def full_report(results: Results, plot: str | None = None) -> str:
    """The whole Markdown file; ``plot`` is the name of the picture to show in it."""
    backends = sorted({str(m.info["backend"]) for c in results.comparisons for m in c.variants.values() if m.info.get("backend")})
    clock = "times are the device's own" if results.machine.get("device") == "cuda" else "times are wall times"
    parts = [
        "# Benchmarks",
        "\n".join(f"- {line}" for line in [*provenance(results), f"This package's backend: {', '.join(backends) or 'unknown'}"]),
        f"Medians of runs that took turns; {clock}. A factor above 1 means that this package is faster, and a loss says so. Where a turn "
        "is several calls, times and factors are of those that follow one of the same program, as in a loop, and `after others` are the "
        "factors of each turn's first call, which finds other programs' work in the caches. Spread: the widest interquartile range in the "
        f"row, as a share of its median. Made by `python benchmarks/report.py` from `{results.source.name}`.",
    ]
    if plot is not None:
        parts.append(f"![Speed relative to the best eager spelling, and bytes kept for backward]({plot})")
    makers = {"steer": _speed_table, "steer_norm": _speed_table, "kept": _kept_table, "whisper": _whisper_table}
    for kind, title in KINDS.items():
        if comparisons := results.of_kind(kind):
            parts += [f"## {title}", makers[kind](comparisons)]
    return "\n\n".join(parts) + "\n"


def _speed_table(comparisons: list[Comparison]) -> str:
    variants = ("public", "eager", "compiled", "ours")
    against = ("eager", "compiled", "public")
    header = ["work", "direction", *(NAMES[v] for v in variants), *(f"against {NAMES[v]}" for v in against)]
    header += [f"after others: {', '.join(NAMES[v] for v in against)}", "of copy bandwidth", "spread"]

    def row(comparison: Comparison) -> list[str]:
        ours = comparison.seconds("ours")
        share = comparison.variants["ours"].info.get("percent_of_copy_bandwidth") if ours is not None else None
        return [
            comparison.work,
            comparison.direction,
            *(seconds_in_words(comparison.seconds(variant)) for variant in variants),
            *(times_faster(comparison.seconds(variant), ours) for variant in against),
            _after_others(comparison, against),
            "-" if share is None else f"{share:.0f}%",
            _spread(comparison),
        ]

    return table(header, map(row, comparisons))


def _after_others(comparison: Comparison, against: Sequence[str]) -> str:
    ours = comparison.seconds_after_others("ours")
    factors = [times_faster(comparison.seconds_after_others(variant), ours) for variant in against]
    return ", ".join(factors) if any(factor != "-" for factor in factors) else "-"


def _kept_table(comparisons: list[Comparison]) -> str:
    variants = ("public", "eager", "compiled", "ours")
    header = ["operator", "work", *(NAMES[v] for v in variants), *(f"{NAMES[v]}, with y" for v in variants), "of the public formula's"]

    def row(comparison: Comparison) -> list[str]:
        return [
            comparison.name.split()[1],
            comparison.work,
            *(bytes_in_words(comparison.bytes(variant)) for variant in variants),
            *(bytes_in_words(comparison.bytes(variant, "kept_bytes_with_output")) for variant in variants),
            percentage(comparison.bytes("ours"), comparison.bytes("public")),
        ]

    note = (
        "One layer. Storages that the backward holds on to, each once, parameters left out; `y` is the steered stream, which whatever "
        "reads it next keeps in any case."
    )
    return note + "\n\n" + table(header, map(row, comparisons))


def _whisper_table(comparisons: list[Comparison]) -> str:
    variants = ("unsteered", "unsteered_compiled", "public", "eager", "ours")
    against = ("unsteered", "unsteered_compiled", "public", "eager")
    header = ["layers", "direction", *(NAMES[v] for v in variants), *(f"against {NAMES[v]}" for v in against)]
    header += ["kept, public formula", "kept, this package", "spread"]

    def row(comparison: Comparison) -> list[str]:
        ours = comparison.seconds("ours")
        return [
            comparison.work,
            comparison.direction,
            *(seconds_in_words(comparison.seconds(variant)) for variant in variants),
            *(times_faster(comparison.seconds(variant), ours) for variant in against),
            bytes_in_words(comparison.bytes("public")),
            bytes_in_words(comparison.bytes("ours")),
            _spread(comparison),
        ]

    note = (
        "transformers' encoder with its convolutions, random weights, frozen; a training step is forward and backward to the aligner's "
        "parameters, and what it keeps includes the frozen layers' own share. Wall times on every device."
    )
    return note + "\n\n" + table(header, map(row, comparisons))


def _spread(comparison: Comparison) -> str:
    return f"{100 * max(measured.spread for measured in comparison.variants.values()):.0f}%"


def compact_tables(results: Results) -> str:
    """The README's tables: a layer of Whisper large-v3 in float32, its aims, then the layer stack. `ReportError` if none of it was run."""
    makers = (_compact_operator, _compact_aims, _compact_kept, _compact_stack)
    parts = [part for part in (make(results) for make in makers) if part]
    if not parts:
        raise ReportError(f"{results.source} holds nothing of the compact table: it shows large-v3 in float32, N 1500, E 8")
    source = f"`benchmarks/results/{results.source.name}`"
    return "\n\n".join([*parts, "; ".join([*provenance(results), source]) + "."]) + "\n"


def _compact_operator(results: Results) -> str:
    variants, against = ("public", "eager", "compiled", "ours"), ("eager", "compiled", "public")
    rows = []
    for comparison in _compact_passes(results):
        ours = comparison.seconds("ours")
        times = [seconds_in_words(comparison.seconds(variant)) for variant in variants]
        factors = [times_faster(comparison.seconds(variant), ours) for variant in against]
        rows.append([f"{OPERATORS[comparison.kind]}, {comparison.direction}", *times, *factors, _after_others(comparison, against)])
    header = [
        "one layer: N 1500, D 1280, E 8, L 32, float32",
        *(NAMES[v] for v in variants),
        *(f"against {NAMES[v]}" for v in against),
        f"after others: {', '.join(NAMES[v] for v in against)}",
    ]
    return table(header, rows) if rows else ""


def _compact_aims(results: Results) -> str:
    """What was aimed at for such a layer, beside what came out, in words that say so where it was missed."""
    speeds = {(comparison.kind, comparison.direction): comparison for comparison in _compact_passes(results)}
    kept = {comparison.name.split()[1]: comparison for comparison in results.of_kind("kept") if _is_compact(comparison)}
    rows = []
    for direction, variant, aim in AIMS:
        cells = []
        for kind in OPERATORS:
            comparison = speeds.get((kind, direction))
            base, ours = (comparison.seconds(name) if comparison else None for name in (variant, "ours"))
            cells.append(_against_aim(times_faster(base, ours), base is None or ours is None or round(base / ours, 2) >= aim))
        if set(cells) != {"-"}:
            rows.append([f"{direction}, against {NAMES[variant]}: at least {aim:g}x", *cells])
    if kept:
        shares = [(kept[kind].bytes("ours"), kept[kind].bytes("public")) if kind in kept else (None, None) for kind in OPERATORS]
        cells = [_against_aim(percentage(ours, base), not (ours and base) or ours <= KEPT_AIM * base) for ours, base in shares]
        rows.append([f"kept for backward, of what the {NAMES['public']} keeps: at most {100 * KEPT_AIM:g}%", *cells])
    return table(["aim", *OPERATORS.values()], rows) if rows else ""


def _against_aim(words: str, reached: bool) -> str:
    return words if reached else f"{words} (missed)"


def _compact_kept(results: Results) -> str:
    variants = ("public", "eager", "compiled", "ours")
    rows = [
        [OPERATORS[comparison.name.split()[1]], *(bytes_in_words(comparison.bytes(variant)) for variant in variants)]
        for comparison in results.of_kind("kept")
        if _is_compact(comparison)
    ]
    return table(["kept for backward, beyond y", *(NAMES[v] for v in variants)], rows) if rows else ""


def _compact_passes(results: Results) -> list[Comparison]:
    return [c for c in results.comparisons if c.kind in OPERATORS and c.direction != "backward" and _is_compact(c)]


def _is_compact(comparison: Comparison) -> bool:
    return all(comparison.info.get(name) == value for name, value in COMPACT.items())


def _compact_stack(results: Results) -> str:
    variants = ("unsteered", "public", "eager", "ours")
    rows = []
    for comparison in results.of_kind("whisper"):
        info, ours = comparison.info, comparison.seconds("ours")
        if info.get("model") == COMPACT["model"]:
            times = [seconds_in_words(comparison.seconds(variant)) for variant in variants]
            factors = [times_faster(comparison.seconds(variant), ours) for variant in ("unsteered", "eager", "public")]
            rows.append([f"{info['L']} layers, N {info['N']}, {info['dtype']}, {comparison.direction}", *times, *factors])
    against = [f"against {NAMES[variant]}" for variant in ("unsteered", "eager", "public")]
    return table(["Whisper large-v3 encoder", *(NAMES[v] for v in variants), *against], rows) if rows else ""


# --- plot ---------------------------------------------------------------------------------------------------------------------------------

COLOURS = {"public": "#b0b0b0", "compiled": "#6baed6", "ours": "#d95f02"}


def draw_plot(results: Results, path: Path) -> None:
    """Bars of every comparison: speed relative to best eager, and below it the bytes kept. ImportError without matplotlib."""
    from matplotlib.figure import Figure

    speed = [c for c in results.comparisons if c.kind != "kept" and "eager" in c.variants]
    kept = [c for c in results.of_kind("kept") if "eager" in c.variants]
    panels = [panel for panel in (speed, kept) if panel] or [results.comparisons]
    heights = [len(panel) + 2 for panel in panels]
    figure = Figure(figsize=(11, 0.32 * sum(heights) + 1.2), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        if panel is kept:
            _bars(axis, panel, [(v, [(c.bytes(v) or 0) / 1e6 for c in panel]) for v in COLOURS])
            axis.set_xlabel("MB kept for backward beyond y")
        else:
            _bars(axis, panel, list(_speeds(panel)))
            axis.set_xlabel("speed relative to best eager, the line (further right: faster)")
            axis.axvline(1.0, color="black", linewidth=0.8)
    axes[0].set_title("\n".join(provenance(results)[::2]), fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(COLOURS), fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def _speeds(comparisons: list[Comparison]) -> Iterator[tuple[str, list[float | None]]]:
    for variant in COLOURS:
        ratios: list[float | None] = []
        for comparison in comparisons:
            base, seconds = comparison.seconds("eager"), comparison.seconds(variant)
            ratios.append(base / seconds if base and seconds else None)
        yield variant, ratios


def _bars(axis: Any, comparisons: list[Comparison], series: Sequence[tuple[str, Sequence[float | None]]]) -> None:
    thickness = 0.8 / len(series)
    for index, (variant, values) in enumerate(series):
        places = [row + (index - (len(series) - 1) / 2) * thickness for row in range(len(comparisons))]
        shown = [(place, value) for place, value in zip(places, values, strict=True) if value]
        axis.barh([place for place, _ in shown], [value for _, value in shown], thickness, color=COLOURS[variant], label=NAMES[variant])
    axis.set_yticks(range(len(comparisons)), [comparison.name for comparison in comparisons], fontsize=7)
    axis.invert_yaxis()
    axis.margins(y=0.01)


# --- command line -------------------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="report.py", description="Tables and a plot of saved benchmark results.")
    parser.add_argument("results", type=Path, help="a file made with --benchmark-json")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="where to write (default: beside the results)")
    parser.add_argument("--compact", action="store_true", help="print the README's tables and write nothing")
    arguments = parser.parse_args(argv)
    try:
        results = read_results(arguments.results)
        if arguments.compact:
            print(compact_tables(results), end="")
        else:
            _write(results, arguments.output or arguments.results.parent)
    except ReportError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    return 0


def _write(results: Results, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        picture: Path | None = folder / f"{results.source.stem}.png"
        try:
            draw_plot(results, folder / f"{results.source.stem}.png")
        except ImportError:
            picture = None
            print("no plot: matplotlib is missing, and the extra `bench` installs it", file=sys.stderr)
        text = folder / f"{results.source.stem}.md"
        text.write_text(full_report(results, picture.name if picture else None), encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{folder} cannot be written to: {error.strerror}") from error
    print(*(str(path) for path in (text, picture) if path), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
