"""Interleaved timing: the variants of one comparison take turns, so that a machine shared with others slows all of them alike."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

__all__ = ["Preparation", "Thunk", "Work", "advance", "interleave", "replayed_time"]

Thunk = Callable[[], object]
Preparation = Callable[[], Sequence[Thunk]]
"""Makes what is timed: the same work on one or more copies of the inputs. What it computes itself is not timed."""

_CYCLES_PER_SECOND = 2e9  # above any GPU's clock, for a head start that is never too short by that


@dataclass
class Work:
    """What a comparison is made of: how to prepare each variant's calls, and what is wrong with its results, if anything is."""

    preparations: Mapping[str, Preparation]
    faults: Mapping[str, str | None]
    notes: Mapping[str, dict[str, int]] = field(default_factory=dict)
    queued: bool = True


def interleave(
    variants: Mapping[str, Preparation], device: torch.device, seconds: float, min_rounds: int, queued: bool = True
) -> dict[str, list[float]]:
    """Seconds per thunk of every variant, one entry a round: each round runs all variants once, in an order drawn anew.

    As many rounds as fit into ``seconds`` a variant, and at least ``min_rounds``. On a GPU, times are the device's own, from events; the
    launches of one measurement queue up behind a delay, or else the events would see the host. With ``queued=False`` they are wall times
    up to the end of the work, host included, which is what one waits for where many launches make up a pass.
    """
    on_gpu = device.type == "cuda"
    head_starts = {name: _warm_up(prepare, on_gpu) for name, prepare in variants.items()}

    def measure(name: str) -> float:
        thunks = variants[name]()
        if on_gpu and queued:
            return _device_seconds(thunks, head_starts[name]) / len(thunks)
        return _wall_seconds(thunks, on_gpu) / len(thunks)

    first = {name: [measure(name)] for name in variants}
    rounds = max(min_rounds, math.ceil(len(variants) * seconds / max(sum(times[0] for times in first.values()), 1e-9)))
    results: dict[str, list[float]] = {name: [] for name in variants}
    order, shuffled = list(variants), random.Random(0)
    for _ in range(min(rounds, 1000)):
        shuffled.shuffle(order)
        for name in order:
            results[name].append(measure(name))
    return results


def _warm_up(prepare: Preparation, on_gpu: bool) -> float:
    """Run it twice, which compiles and tunes what is still to be, and return the seconds the host took to launch it."""
    for thunk in prepare():
        thunk()
    thunks = prepare()
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for thunk in thunks:
        thunk()
    launched = time.perf_counter() - start
    if on_gpu:
        torch.cuda.synchronize()
    return launched


def _wall_seconds(thunks: Sequence[Thunk], on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for thunk in thunks:
        thunk()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _device_seconds(thunks: Sequence[Thunk], head_start: float) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(int(2 * head_start * _CYCLES_PER_SECOND))
    start.record()
    for thunk in thunks:
        thunk()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


# --- handing the times to pytest-benchmark ----------------------------------------------------------------------------------------------
# It times one function after another. Its clock can be chosen, though: with this one, "running" a variant is to let the clock advance by
# what the variant took when its turn came.

_now = 0.0


def replayed_time() -> float:
    return _now


def advance(seconds: float) -> None:
    global _now
    _now += seconds
