"""The benchmarks' own machinery: turns, proof before timing, bytes kept, and what a run saves."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import steermoe_kernels

pytest.importorskip("pytest_benchmark", reason="the benchmarks need the extra `bench`")

_ROOT = Path(__file__).parents[2]
_PACKAGE = str(Path(steermoe_kernels.__file__).parents[1])  # the one under test, installed or not


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of the folder, as its tests import them."""
    monkeypatch.syspath_prepend(str(_ROOT / "benchmarks"))
    names = ("baselines", "kept", "machine", "passes", "proof", "timing")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def test_variants_take_turns(benchmarks: SimpleNamespace) -> None:
    calls: list[str] = []
    variants = {name: (lambda name=name: [lambda: calls.append(name)]) for name in ("a", "b", "c")}
    times = benchmarks.timing.interleave(variants, torch.device("cpu"), 0.0, 6)
    assert {name: len(each.usual) for name, each in times.items()} == {"a": 6, "b": 6, "c": 6}
    rounds = [calls[-3 * count : len(calls) - 3 * (count - 1)] for count in range(6, 0, -1)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len(set(map(tuple, rounds))) > 1


def test_an_encoder_is_proved_clip_by_clip(benchmarks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the batch, float64 sees one clip at a time: large-v3's attention on 16 would keep 180 GB for the backward."""
    pytest.importorskip("transformers")
    stacks = importlib.import_module("stacks")
    encoders = stacks.Encoders(stacks.Stack("tiny", 1, 2), ())
    results, batches = stacks._results, []

    def recorded(encoder: Any, aligner: Any, mel: torch.Tensor, *rest: Any) -> dict[str, torch.Tensor]:
        batches.append((mel.dtype, mel.shape[0]))
        return results(encoder, aligner, mel, *rest)

    monkeypatch.setattr(stacks, "_results", recorded)
    for direction in ("forward", "training step"):
        assert encoders.faults(["eager", "public"], direction) == {"eager": None, "public": None}
    assert {count for dtype, count in batches if dtype == torch.float64} == {1}
    assert {count for dtype, count in batches if dtype == torch.float32} == {2}


@pytest.fixture
def clock(benchmarks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still until its ``pass_by(seconds)`` is called."""
    clock = SimpleNamespace(now=0.0)

    def pass_by(seconds: float) -> None:
        clock.now += seconds

    clock.pass_by = pass_by
    monkeypatch.setattr(benchmarks.timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_as_many_rounds_as_fit_into_the_time(benchmarks: SimpleNamespace, clock: SimpleNamespace) -> None:
    variants = {"quick": lambda: [lambda: clock.pass_by(0.125)], "slow": lambda: [lambda: clock.pass_by(0.375)]}
    times = benchmarks.timing.interleave(variants, torch.device("cpu"), 2.0, 3)
    assert {name: each.usual for name, each in times.items()} == {"quick": [0.125] * 8, "slow": [0.375] * 8}  # 4 s in all
    assert len(benchmarks.timing.interleave(variants, torch.device("cpu"), 0.1, 3)["slow"].usual) == 3


def test_calls_after_others_are_told_from_calls_in_a_row(benchmarks: SimpleNamespace, clock: SimpleNamespace) -> None:
    """Whoever has not run last is slow."""
    last: list[str] = []

    def run(name: str) -> None:
        clock.pass_by(0.25 if last[-1:] == [name] else 1.0)
        last.append(name)

    variants = {name: (lambda name=name: [lambda: run(name)]) for name in ("a", "b", "c")}
    times = benchmarks.timing.interleave(variants, torch.device("cpu"), 0.0, 20, calls=3)
    for each in times.values():
        assert each.usual == each.in_a_row == [0.25] * 40
        assert each.after_others == [1.0] * 20
    assert len(benchmarks.timing.interleave(variants, torch.device("cpu"), 15.0, 1, calls=3)["a"].usual) == 2 * 10, "4.5 s a round"


def test_preparing_is_not_timed_and_copies_share_the_time(benchmarks: SimpleNamespace, clock: SimpleNamespace) -> None:
    def prepare() -> list:
        clock.pass_by(8.0)
        return [lambda: clock.pass_by(0.25), lambda: clock.pass_by(0.75)]

    assert benchmarks.timing.interleave({"a": prepare}, torch.device("cpu"), 0.0, 2)["a"].usual == [0.5, 0.5]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("top_k", [None, 2])
def test_the_variants_compute_the_same(benchmarks: SimpleNamespace, norm: bool, top_k: int | None) -> None:
    case = benchmarks.passes.Case("tiny", norm=norm, frames=33, top_k=top_k)
    variants = benchmarks.passes.suitable(case, ["public", "eager", "ours"])
    assert ("public" in variants) == (top_k is None)
    assert benchmarks.passes.Pass(case).faults(variants) == dict.fromkeys(variants)


@pytest.mark.parametrize("result", ["y", "normed"])
def test_a_wrong_variant_is_found_out(benchmarks: SimpleNamespace, result: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = benchmarks.passes.SF.steer_norm

    def wrong(*arguments: object, **settings: object) -> tuple[torch.Tensor, ...]:
        y, normed, gates = right(*arguments, **settings)
        return (1.0001 * y, normed, gates) if result == "y" else (y, normed + 1e-4, gates)

    monkeypatch.setattr(benchmarks.passes.SF, "steer_norm", wrong)
    faults = benchmarks.passes.Pass(benchmarks.passes.Case("tiny", norm=True, frames=33)).faults(["eager", "ours"])
    assert faults["eager"] is None
    assert f"{result}: error" in faults["ours"]


def test_bytes_kept_for_backward(benchmarks: SimpleNamespace) -> None:
    x, weight = torch.randn(10, 4, requires_grad=True), torch.randn(4, requires_grad=True)

    def run() -> torch.Tensor:
        return (x * weight).exp()  # the product keeps x and the weight, exp its output

    assert benchmarks.kept.kept_for_backward(run, [weight]) == (160, 320)
    assert benchmarks.kept.kept_for_backward(run, [weight, x]) == (0, 160)
    assert benchmarks.kept.kept_for_backward(lambda: x[:, :1] + 1, []) == (0, 0)
    assert benchmarks.kept.kept_for_backward(lambda: x.view(4, 10).mT.matmul(x.view(4, 10)), []) == (160, 160)  # one storage, two views


def test_a_steering_pass_keeps_its_gates(benchmarks: SimpleNamespace) -> None:
    """And the public formula more than two streams."""
    work = benchmarks.passes.Pass(benchmarks.passes.Case("tiny", frames=33))
    kept = {
        name: benchmarks.kept.kept_for_backward(lambda name=name: work.function(name)(*work.streams[0]), work.parameters(name))[0]
        for name in ("public", "ours")
    }
    assert kept["ours"] == 33 * 8 * 4
    assert kept["public"] > 2 * 33 * 384 * 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short real run of two variants."""
    folder = tmp_path_factory.mktemp("run")
    tests = [f"{_ROOT}/benchmarks/test_steer.py::test_steer[large-v3-N50-E8-float32-forward-{name}]" for name in ("eager", "ours")]
    options = ["--benchmark-only", "--benchmark-max-time=0.01", f"--benchmark-json={folder / 'run.json'}", "-p", "no:cacheprovider", "-q"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *tests, *options, "--rootdir", str(_ROOT), "-c", str(_ROOT / "pyproject.toml")],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join([_PACKAGE, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return folder / "run.json"


def test_what_a_run_saves(saved: Path) -> None:
    content = json.loads(saved.read_text())
    assert [entry["extra_info"]["variant"] for entry in content["benchmarks"]] == ["eager", "ours"]
    for entry in content["benchmarks"]:
        assert entry["group"] == "steer large-v3-N50-E8-float32 forward"
        assert {"direction", "dtype", "N", "D", "E", "L", "percent_of_copy_bandwidth", "after_others_s"} <= entry["extra_info"].keys()
        assert entry["extra_info"]["bytes_to_move"] == 2 * 50 * 1280 * 4
        assert "data" not in entry["stats"] and 0 < entry["stats"]["min"] <= entry["stats"]["median"] <= entry["stats"]["max"]
    assert content["benchmarks"][1]["extra_info"]["backend"]
    machine = content["machine_info"]
    assert machine["threads"] >= 1 and machine["versions"]["torch"] and "node" not in machine
    assert saved.stat().st_size < 5_000  # of which two of about 250 benchmarks: everything stays far below 500 kB


def test_the_report_reads_what_a_run_saves(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(_ROOT / "benchmarks"))
    report: ModuleType = importlib.import_module("report")
    assert report.main([str(saved)]) == 0
    assert "| large-v3, N 50, D 1280, E 8, L 32, float32 | forward | - |" in saved.with_suffix(".md").read_text()
