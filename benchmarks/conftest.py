"""How a comparison runs under pytest-benchmark: its variants are tests of one group, proved equal, then timed taking turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from machine import DEVICE, copy_bandwidth, describe
from timing import Times, Work, advance, interleave, replayed_time

_HERE = Path(__file__).parent
_QUICK_SECONDS, _QUICK_ROUNDS = 0.15, 3


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="benchmarks: only a small representative part, briefly")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: part of what --quick runs")


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.benchmark(timer=replayed_time))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        left_out = [item for item in items if item.path.is_relative_to(_HERE) and not item.get_closest_marker("quick")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


# --- results files ------------------------------------------------------------------------------------------------------------------------


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    found = describe(machine_info)
    machine_info.clear()
    machine_info.update(found)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict[str, Any]) -> None:
    """Statistics only: the single durations, and what names and ``extra_info`` say already, would be most of the file."""
    for entry in output_json["benchmarks"]:
        for key in ("options", "params", "param", "fullname"):
            entry.pop(key, None)
        entry["stats"] = {name: entry["stats"][name] for name in ("min", "q1", "median", "q3", "max", "rounds")}


# --- comparisons --------------------------------------------------------------------------------------------------------------------------


@dataclass
class _Outcome:
    times: dict[str, Times]
    faults: Mapping[str, str | None]
    notes: Mapping[str, dict[str, Any]]


@pytest.fixture(scope="session")
def outcomes() -> dict[str, _Outcome]:
    """The comparisons run so far, by group: the first variant's test runs it for all."""
    return {}


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any, outcomes: dict[str, _Outcome]) -> Callable[..., None]:
    """``compare(group, variant, make, info)``: report the variant's part of the comparison ``group``.

    ``make(variants)`` sets up the `Work` of the variants that were selected for this session, or fewer.
    """

    def report(group: str, variant: str, make: Callable[[list[str]], Work], info: dict[str, Any]) -> None:
        if group not in outcomes:
            outcomes[group] = _run(make(_selected(request.node)), request.config, benchmark.enabled)
        outcome = outcomes[group]
        if (fault := outcome.faults.get(variant)) is not None:
            benchmark.skipped = True
            pytest.fail(f"{variant} is not timed, its results are wrong: {fault}", pytrace=False)
        times = outcome.times[variant]
        seconds = times.usual
        benchmark.group = group
        benchmark.extra_info.update(info, **outcome.notes.get(variant, {}))
        if times.in_a_row:
            benchmark.extra_info["after_others_s"] = statistics.median(times.after_others)
        if benchmark.enabled and (moved := info.get("bytes_to_move")):
            median = statistics.median(seconds)
            benchmark.extra_info["percent_of_copy_bandwidth"] = round(100 * moved / median / copy_bandwidth(), 1)
            if DEVICE.type == "cuda":
                benchmark.extra_info["device_time_s"] = median
        turns = iter(seconds)
        benchmark.pedantic(lambda: advance(next(turns)), rounds=len(seconds))

    return report


def _selected(node: pytest.Function) -> list[str]:
    """The variants of this test's comparison in this session: the tests that differ from it in ``variant`` alone."""

    def comparison(item: pytest.Function) -> tuple:
        others = {name: value for name, value in item.callspec.params.items() if name != "variant"}
        return item.path, item.originalname, others

    items = [item for item in node.session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    return [str(item.callspec.params["variant"]) for item in items if comparison(item) == comparison(node)]


def _run(work: Work, config: pytest.Config, enabled: bool) -> _Outcome:
    seconds, min_rounds = float(config.getoption("benchmark_max_time")), config.getoption("benchmark_min_rounds")
    if config.getoption("--quick"):
        seconds, min_rounds = min(seconds, _QUICK_SECONDS), min(min_rounds, _QUICK_ROUNDS)
    if not enabled:
        seconds, min_rounds = 0.0, 1
    right = {name: prepare for name, prepare in work.preparations.items() if work.faults.get(name) is None}
    times = interleave(right, DEVICE, seconds, min_rounds, work.queued, work.calls)
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    return _Outcome(times, work.faults, work.notes)
