"""The measuring kit for GPUs, rehearsed on whatever there is: stages, what a cut-off run keeps, the bars, the report."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import steermoe_kernels

pytest.importorskip("pytest_benchmark", reason="the benchmarks need the extra `bench`")

_ROOT = Path(__file__).parents[2]
_PACKAGE = str(Path(steermoe_kernels.__file__).parents[1])  # the one under test, installed or not


@pytest.fixture
def kit(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(_ROOT / "benchmarks"))
    return SimpleNamespace(**{name: importlib.import_module(f"gpu_{name}") for name in ("check", "stages", "report")})


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rehearsed run of the stages that measure one layer's pass."""
    folder = tmp_path_factory.mktemp("kit")
    command = [sys.executable, str(_ROOT / "benchmarks" / "gpu_check.py"), "--out", str(folder), "--rehearse"]
    run = subprocess.run(
        [*command, "--stages", "environment,op", "--commit", "abc", "--case", "40,4,2"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([_PACKAGE, os.environ.get("PYTHONPATH", "")])},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


def test_what_a_run_saves(rehearsal: Path) -> None:
    found = json.loads((rehearsal / "gpu_check.json").read_text())
    assert found["commit"] == "abc" and found["rehearsal"] and found["date"].startswith("20")
    assert {name: stage["state"] for name, stage in found["stages"].items()} == {"environment": "done", "op": "done"}
    machine = found["stages"]["environment"]["results"]["machine"]
    assert machine["versions"]["torch"] and "node" not in machine
    passes = found["stages"]["op"]["results"]
    assert "steer tiny-N60-E8-float32 forward+backward" in passes and "steer_norm large-v3-N40-E4-k2-bfloat16 forward" in passes
    for result in passes.values():
        assert not result["faults"]
        assert {"eager", *steermoe_kernels.available_backends()} - {"reference"} <= result["seconds"].keys()
        assert all(seconds > 0 for seconds in result["seconds"].values())


def test_the_report_says_that_it_was_a_rehearsal(rehearsal: Path) -> None:
    report = (rehearsal / "report.md").read_text()
    assert "A rehearsal at small sizes" in report
    assert "| environment | done |" in report and "| steer tiny-N60-E8-float32 forward |" in report


def test_a_stage_that_dies_keeps_what_it_had(kit: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(settings: Any) -> Any:
        yield "first", {"seconds": 1}
        raise RuntimeError("an illegal memory access")

    monkeypatch.setitem(kit.check.STAGES, "op", kit.stages.Stage(stage, 10))
    with pytest.raises(RuntimeError, match="illegal"):
        kit.check._run_stage("op", kit.stages.Settings(tmp_path))
    assert json.loads((tmp_path / "op.json").read_text()) == {"first": {"seconds": 1}}


def test_a_stage_past_its_time_is_cut_off(kit: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text(
        "import json, pathlib, subprocess, sys, time\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "(folder / 'op.json').write_text(json.dumps({'first': 1}))\n"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    )
    monkeypatch.setattr(kit.check, "__file__", str(sleeper))
    state = kit.check._insist("op", kit.stages.Settings(tmp_path), 6.0)
    assert (state["state"], state["results"]) == ("cut off", {"first": 1})
    assert kit.check._insist("op", kit.stages.Settings(tmp_path), 1.0)["state"] == "left out, no time"


def test_a_stage_goes_on_without_what_took_the_device_down(kit: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "stage.py"
    script.write_text(
        "import json, pathlib, sys\n"
        "partial = pathlib.Path(sys.argv[sys.argv.index('--out') + 1]) / 'op.json'\n"
        "if '--without' not in sys.argv:\n"
        "    partial.write_text(json.dumps({'first': 1}))\n"
        "    print('an illegal memory access', 'cuda', sep='\\n')\n"
        "    sys.exit(3)\n"
        "assert sys.argv[sys.argv.index('--without') + 1] == 'cuda'\n"
        "partial.write_text(json.dumps(json.loads(partial.read_text()) | {'second': 2}))\n"
    )
    monkeypatch.setattr(kit.check, "__file__", str(script))
    state = kit.check._insist("op", kit.stages.Settings(tmp_path), 60.0)
    assert (state["state"], state["results"]) == ("done, without cuda", {"first": 1, "second": 2})
    assert "illegal memory access" in state["error"] and not kit.check._is_good(state)


def test_what_a_variant_does_wrong_is_its_own_affair(kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def faults(names: list[str]) -> dict[str, str | None]:
        if names == ["bad"]:
            raise RuntimeError("steer_forward_kernel: invalid argument")
        return dict.fromkeys(names)

    assert kit.stages._proved("good", faults) is None
    assert kit.stages._proved("bad", faults) == "RuntimeError: steer_forward_kernel: invalid argument"

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", lost)
    with pytest.raises(kit.stages.DeviceLostError, match="bad"):
        kit.stages._proved("bad", faults)


def test_tests_count_as_they_end(kit: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not behind a slow one; and one that would be cut off is asked to end in time."""
    sleeps = {"a bfloat16": 1.0, "a float16": 60.0}

    def start(settings: Any, name: str, arguments: list[str]) -> subprocess.Popen:
        kit.stages._report(settings, name).with_suffix(".txt").write_text(name)
        return subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({sleeps.get(name, 0)})"], stderr=subprocess.DEVNULL)

    monkeypatch.setattr(kit.stages, "fused_backends", lambda dtype: ["a"])
    monkeypatch.setattr(kit.stages, "_start_pytest", start)
    settings = kit.stages.Settings(tmp_path, seconds=kit.stages._FAREWELL + 3)
    results = dict(kit.stages.tests(settings))
    assert list(results)[-2:] == ["a bfloat16", "a float16"] and len(results) == 5
    assert results["a float16"]["exit"] != 0 and results["a bfloat16"]["output"] == "a bfloat16"


def test_the_sanitizer_watches_blocks_that_take_several_tiles(kit: SimpleNamespace) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--collect-only",
        "-p",
        "no:cacheprovider",
        str(_ROOT / "tests/kernels/test_accuracy.py"),
    ]
    listed = subprocess.run([*command, "-k", kit.stages._watched("cpu")], cwd=_ROOT, capture_output=True, text=True).stdout
    assert all(
        name in listed for name in ("cpu-bfloat16-1x9001x40", "cpu-bfloat16-2x6001x40", "cpu-float32-1x9001x40", "cpu-float32-3x5x33")
    )


@pytest.mark.parametrize(
    "result, good",
    [
        ({"failed": 1}, False),
        ({"exit": 9}, False),
        ({"faults": {"cuda": "y: error 1"}}, False),
        ({"failed": 0, "exit": 0, "faults": {}}, True),
    ],
)
def test_a_wrong_result_fails_the_run(kit: SimpleNamespace, result: dict, good: bool) -> None:
    assert kit.check._is_good({"state": "done", "results": {"cuda float32": result}}) is good
    assert not kit.check._is_good({"state": "cut off", "results": {}})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_at_once(kit: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kit.check.main(["--out", str(tmp_path / "gpu")]) == 2
    assert "PyTorch sees no GPU here" in capsys.readouterr().err and not (tmp_path / "gpu").exists()


def test_the_bars(kit: SimpleNamespace, tmp_path: Path) -> None:
    def stage(results: dict) -> dict:
        return {"state": "done", "seconds": 1.0, "error": "", "results": results}

    def one_pass(seconds: float, moved: int) -> dict:
        return {"N": 24000, "bytes_to_move": moved, "flop": 1, "seconds": {"eager": 4.0, "cuda": seconds}, "faults": {}}

    def encoder(direction: str, batch: int, **seconds: float) -> dict:
        return {"direction": direction, "batch": batch, "seconds": seconds, "peak_bytes": {}, "faults": {}}

    found = {
        "date": "2031-01-01",
        "commit": None,
        "seed": 0,
        "stages": {
            "device": stage({"copy N24000": {"bytes_per_s": 100.0}}),
            "op": stage(
                {
                    "steer large-v3-N24000-E8-bfloat16 forward": one_pass(1.0, 95),
                    "steer large-v3-N24000-E64-bfloat16 forward": one_pass(1.5, 95),
                    "steer_norm large-v3-N24000-E8-bfloat16 forward+backward": one_pass(2.0, 160),
                }
            ),
            "encoder": stage(
                {
                    "a": encoder("forward", 16, unsteered=1.0, cuda=0.9),
                    "b": encoder("training step", 16, public=3.0, cuda=2.0),
                    "c": encoder("forward, compiled", 16, unsteered_compiled=1.0, cuda=1.04),
                }
            ),
        },
    }
    measured = list(kit.report.bars(found, "cuda").values())
    assert measured == pytest.approx([0.95, 0.8, None, 0.9, None, 1.04, None, 1.5, 1.5])
    (tmp_path / "gpu_check.json").write_text(json.dumps(found))
    verdicts = [line.split(" | ")[-1].removesuffix(" |") for line in kit.report.write(tmp_path).splitlines()[2:]]
    none = "not measured"
    assert verdicts == ["reached", "missed", none, "reached", none, "missed", none, "reached", "missed"]


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--stages", "op,lunch"], "unknown stage lunch"), (["--case", "1500"], "frames,experts")]
)
def test_bad_arguments(kit: SimpleNamespace, arguments: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        kit.check.main(["--out", "x", *arguments])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
