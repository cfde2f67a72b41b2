"""What is right and what is fast on this GPU, settled in one command: ``python benchmarks/gpu_check.py --out DIR``.

Builds the package, runs the kernels' tests on the device for every backend, measures the device's own limits, then one layer's pass and
Whisper large-v3's encoder, each against every formula and backend; all within ``--minutes`` (9). Writes DIR/gpu_check.json (machine,
versions, date, commit, and every stage's results), report.md, roofline.png and bars.png. Every stage is saved as its results come, so
that a run which is cut off loses only what it was doing. Exit status 1 if a test failed or a stage did not finish, 2 for bad arguments and
where there is no GPU.

``--rehearse`` runs every stage on any machine in a minute or two, at small sizes: a test of this file, not a measurement.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_report
from gpu_stages import ROOT, STAGES, DeviceLostError, Settings

_RESERVE = 20.0  # seconds kept back for the report
_LOST = 3  # exit status of a stage whose device was taken down; its last line of output says by which variant


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    settings = Settings(
        arguments.out.resolve(), arguments.seed, arguments.rehearse, tuple(arguments.case), arguments.seconds, tuple(arguments.without)
    )
    if arguments.stage:
        _run_stage(arguments.stage, settings)
        return 0
    if not (arguments.rehearse or arguments.report) and not _has_gpu():
        print("gpu_check.py: PyTorch sees no GPU here; --rehearse runs everything at small sizes on whatever there is", file=sys.stderr)
        return 2
    settings.out.mkdir(parents=True, exist_ok=True)
    if arguments.report:
        gpu_report.write(settings.out)
        return 0
    started = time.monotonic()
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": arguments.commit or _commit(),
        "seed": settings.seed,
        "rehearsal": settings.rehearse,
        "stages": {},
    }
    for name in arguments.stages:
        left = 60 * arguments.minutes - _RESERVE - (time.monotonic() - started)
        found["stages"][name] = _insist(name, settings, min(STAGES[name].limit, left))
        _save(settings.out / "gpu_check.json", found)
        state = found["stages"][name]
        print(f"{name}: {state['state']} in {state['seconds']:.0f} s", *state["error"].splitlines()[-3:], sep="\n  ", flush=True)
    print(gpu_report.write(settings.out))
    return 0 if all(_is_good(stage) for stage in found["stages"].values()) else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check.py", description="Correctness and speed of every backend on this machine's GPU.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything (default: 9)")
    parser.add_argument("--stages", type=_names, default=list(STAGES), metavar="A,B", help=f"of {', '.join(STAGES)} (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the streams and parameters that are drawn")
    parser.add_argument(
        "--case", type=_sizes, action="append", default=[], metavar="N,E[,K]", help="a further pass: frames, experts, top_k"
    )
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    parser.add_argument("--rehearse", action="store_true", help="small sizes, on whatever device there is")
    parser.add_argument("--report", action="store_true", help="only write the report of what DIR holds")
    parser.add_argument("--without", action="append", default=[], metavar="BACKEND", help="a backend not to measure")
    parser.add_argument("--seconds", type=float, default=Settings.seconds, help=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _has_gpu() -> bool:
    """Asked in a process of its own: this one must not hold a device that a stage may take down."""
    return subprocess.run([sys.executable, "-c", "import torch, sys; sys.exit(not torch.cuda.is_available())"]).returncode == 0


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        raise argparse.ArgumentTypeError(f"unknown stage {', '.join(unknown)}: choose from {', '.join(STAGES)}")
    return names


def _sizes(text: str) -> tuple[int, int, int | None]:
    try:
        frames, experts, *rest = map(int, text.split(","))
        (top_k,) = rest or [None]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not frames,experts or frames,experts,top_k") from None
    return frames, experts, top_k


def _commit() -> str | None:
    try:
        done = subprocess.run(["git", "describe", "--always", "--abbrev=12", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # a machine without git
        return None
    return done.stdout.strip() or None


# --- one stage ---------------------------------------------------------------------------------------------------------------------------


def _insist(name: str, settings: Settings, limit: float) -> dict[str, Any]:
    """Run a stage, and again from where it was without a variant that has taken the device down: the others are measured all the same."""
    (settings.out / f"{name}.json").unlink(missing_ok=True)
    started = time.monotonic()
    lost: list[str] = []
    errors: list[str] = []
    while True:
        without = (*settings.without, *lost)
        state = _supervise(name, replace(settings, without=without), limit - (time.monotonic() - started))
        errors.append(state["error"])
        if state["lost"] is None or state["lost"] in without:
            break
        lost.append(state["lost"])
    if lost:
        state["state"] += f", without {', '.join(lost)}"
    return state | {"seconds": round(time.monotonic() - started, 1), "error": "\n".join(filter(None, errors))}


def _supervise(name: str, settings: Settings, limit: float) -> dict[str, Any]:
    """Run a stage in a process of its own, for ``limit`` seconds at most; what it has saved by then counts."""
    partial = settings.out / f"{name}.json"
    if limit < 5:
        return {"state": "left out, no time", "error": "", "results": _read(partial), "lost": None}
    command = [sys.executable, str(Path(__file__).resolve()), "--stage", name, "--out", str(settings.out), "--seed", str(settings.seed)]
    command += ["--seconds", str(limit), *["--rehearse"] * settings.rehearse]
    command += [word for variant in settings.without for word in ("--without", variant)]
    for case in settings.cases:
        command += ["--case", ",".join(str(size) for size in case if size is not None)]
    paths = [str(settings.site), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    process = subprocess.Popen(
        command, cwd=settings.out, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit)
        state = "done" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with everything it has started
        output, _ = process.communicate()
        state = "cut off"
    lost = output.splitlines()[-1] if process.returncode == _LOST else None
    return {"state": state, "error": "" if state == "done" else output[-4000:], "results": _read(partial), "lost": lost}


def _run_stage(name: str, settings: Settings) -> None:
    results = settings.known(name)
    try:
        for key, result in STAGES[name].run(settings):
            results[key] = result
            _save(settings.out / f"{name}.json", results)
    except DeviceLostError as error:
        traceback.print_exc()
        print(error, flush=True)
        os._exit(_LOST)  # what else would run at exit waits for the device, or fails


def _read(partial: Path) -> dict[str, Any]:
    return json.loads(partial.read_text()) if partial.exists() else {}


def _save(path: Path, content: Any) -> None:
    """Whole or not at all: a run may be cut off at any moment."""
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=1))
    beside.replace(path)


def _is_good(stage: dict[str, Any]) -> bool:
    """Finished, no test failed, and every variant was as accurate as it has to be."""
    results = [result for result in stage["results"].values() if isinstance(result, dict)]
    return stage["state"] == "done" and not any(result.get("failed") or result.get("exit") or result.get("faults") for result in results)


if __name__ == "__main__":
    sys.exit(main())
