"""benchmarks/report.py: what a saved results file becomes, and what it says of files that will not do."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report", _ROOT / "benchmarks" / "report.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["report"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entry(group: str, variant: str, median: float, **info: Any) -> dict[str, Any]:
    sizes = {"model": "large-v3", "N": 1500, "D": 1280, "E": 8, "L": 32, "dtype": "float32", "top_k": None, "direction": "forward"}
    stats = {"min": 0.8 * median, "q1": 0.9 * median, "median": median, "q3": 1.1 * median, "max": 2 * median, "rounds": 5}
    return {"group": group, "name": f"{group} {variant}", "extra_info": {**sizes, "variant": variant, **info}, "stats": stats}


def saved() -> dict[str, Any]:
    """Against best eager a win, against torch.compile a loss."""
    times = {"public": 0.2, "eager": 0.01, "compiled": 0.005, "ours": 0.008}
    later = {"public": 0.4, "eager": 0.02, "compiled": 0.01, "ours": 0.02}
    steer = [
        entry("steer large-v3 forward", name, time, percent_of_copy_bandwidth=42.4, after_others_s=later[name])
        for name, time in times.items()
    ]
    sizes = {"public": 15_408_000, "eager": 7_768_960, "ours": 48_000}
    kept = [entry("kept steer large-v3", name, 1e-3, kept_bytes=size, kept_bytes_with_output=size) for name, size in sizes.items()]
    layers = {"unsteered": 1.5, "public": 3.0, "eager": 1.8, "ours": 1.2}
    whisper = [entry("whisper large-v3 training step", name, time, L=2) for name, time in layers.items()]
    return {
        "machine_info": {
            "cpu": {"brand_raw": "A Processor", "count": 2, "simd": "avx2"},
            "threads": 2,
            "device": "cpu",
            "python_version": "3.12.1",
            "versions": {"torch": "2.13.0", "triton": None},
        },
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "datetime": "2031-02-03T04:05:06+00:00",
        "benchmarks": steer + kept + whisper,
    }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "2031-02-03-machine-cpu.json"
    path.write_text(json.dumps(saved()))
    return path


def row(text: str, start: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables_and_plot(report: ModuleType, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new" / "folder"
    assert report.main([str(results), "-o", str(folder)]) == 0
    text = (folder / f"{results.stem}.md").read_text()
    assert (folder / f"{results.stem}.png").read_bytes().startswith(b"\x89PNG")
    assert f"({results.stem}.png)" in text
    assert capsys.readouterr().out.split() == [str(folder / f"{results.stem}.{kind}") for kind in ("md", "png")]
    for fact in (
        "A Processor",
        "2 threads",
        "avx2",
        "Python 3.12.1",
        "torch 2.13.0",
        "2031-02-03",
        "0123456789ab with uncommitted changes",
    ):
        assert fact in text, fact
    assert "triton" not in text
    work = "large-v3, N 1500, D 1280, E 8, L 32, float32"
    after = "1.00x, 0.50x (slower), 20.00x"
    assert row(text, work)[1:] == ["forward", "200 ms", "10 ms", "5 ms", "8 ms", "1.25x", "0.62x (slower)", "25.00x", after, "42%", "20%"]
    assert row(text, "steer |")[2:6] == ["15.4 MB", "7.77 MB", "-", "0.048 MB"]
    assert row(text, "steer |")[-1] == "0.31%"
    assert row(text, work.replace("L 32", "L 2"))[6:11] == ["1.2 s", "1.25x", "-", "2.50x", "1.50x"]


def test_compact_tables_are_printed(report: ModuleType, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(results), "--compact"]) == 0
    text = capsys.readouterr().out
    after_others = "1.00x, 0.50x (slower), 20.00x"
    expected = ["200 ms", "10 ms", "5 ms", "8 ms", "1.25x", "0.62x (slower)", "25.00x", after_others]
    assert row(text, "steer, forward")[1:] == expected
    assert row(text, "forward, against best eager")[1:] == ["1.25x (missed)", "-"]
    assert row(text, "forward, against public formula")[1:] == ["25.00x", "-"]
    assert row(text, "kept for backward, of what")[1:] == ["0.31%", "-"]
    assert row(text, "steer |")[1:] == ["15.4 MB", "7.77 MB", "-", "0.048 MB"]
    assert row(text, "2 layers")[1:] == ["1.5 s", "3 s", "1.8 s", "1.2 s", "1.25x", "1.50x", "2.50x"]
    assert f"`benchmarks/results/{results.name}`" in text
    assert list(results.parent.iterdir()) == [results]


def test_other_sizes_stay_out_of_the_compact_table(report: ModuleType, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = saved()
    content["benchmarks"] = [
        entry("steer tiny forward", "ours", 0.1, model="tiny"),
        entry("steer large-v3 k2 forward", "ours", 0.1, top_k=2),
        entry("steer large-v3 backward", "ours", 0.1, direction="backward"),
    ]
    results.write_text(json.dumps(content))
    assert report.main([str(results), "--compact"]) == 2
    assert "nothing of the compact table" in capsys.readouterr().err


def test_without_matplotlib_the_table_is_written(
    report: ModuleType, results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert report.main([str(results)]) == 0
    assert "matplotlib is missing" in capsys.readouterr().err
    text = results.with_suffix(".md").read_text()
    assert "1.25x" in text and ".png" not in text
    assert not results.with_suffix(".png").exists()


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "cannot be read"),
        ("not { json", "is not JSON"),
        ("[1, 2]", "not a file that pytest-benchmark saved"),
        ('{"benchmarks": 3}', "not a file that pytest-benchmark saved"),
        ('{"benchmarks": []}', "holds no benchmarks"),
        ('{"benchmarks": [{"group": "a", "stats": {"median": 1}, "extra_info": {}}]}', "it lacks 'q1'"),
        ('{"benchmarks": [7]}', "not one of this folder's"),
        (json.dumps({"benchmarks": [entry("another one", "ours", 1.0)]}), "only another one"),
        (json.dumps({"benchmarks": [entry("steer large-v3 forward", "ours", 0.0)]}), "with a median of 0 s: steer large-v3 forward, ours"),
    ],
)
def test_a_file_that_will_not_do(
    report: ModuleType, tmp_path: Path, content: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    before = sorted(tmp_path.iterdir())
    assert report.main([str(path), "-o", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and str(path) in captured.err
    assert captured.err.count("\n") == 1 and not captured.out
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_cannot_be_written_to(report: ModuleType, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(results), "-o", str(results / "below a file")]) == 2
    assert "cannot be written to" in capsys.readouterr().err
