"""Interleaved timing: the variants of one comparison take turns, so that a machine shared with others slows all of them alike."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

__all__ = ["Preparation", "Thunk", "Times", "Work", "advance", "interleave", "replayed_time"]

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
    calls: int = 1


@dataclass
class Times:
    """Seconds per thunk, of every call: of those that came after another variant's, and of those after one of the same variant."""

    after_others: list[float] = field(default_factory=list)
    in_a_row: list[float] = field(default_factory=list)

    @property
    def usual(self) -> list[float]:
        """What stands for the variant: its calls in a row, if turns had several."""
        return self.in_a_row or self.after_others


def interleave(
    variants: Mapping[str, Preparation], device: torch.device, seconds: float, min_rounds: int, queued: bool = True, calls: int = 1
) -> dict[str, Times]:
    """Every variant's times: each round gives all of them a turn, in an order drawn anew, of ``calls`` calls.

    As many rounds as fit into ``seconds`` a variant, and at least ``min_rounds``. The first call of a turn finds in the caches what others
    have left there; the next ones find their own. On a GPU, times are the device's own, from events; the launches of one measurement queue
    up behind a delay, or else the events would see the host. With ``queued=False`` they are wall times up to the end of the work, host
    included, which is what one waits for where many launches make up a pass.
    """
    on_gpu = device.type == "cuda"
    head_starts = {name: _warm_up(prepare, on_gpu) for name, prepare in variants.items()}
    results = {name: Times() for name in variants}

    def measure(name: str) -> float:
        thunks = variants[name]()
        if on_gpu and queued:
            return _device_seconds(thunks, head_starts[name]) / len(thunks)
        return _wall_seconds(thunks, on_gpu) / len(thunks)

    def turn(name: str) -> float:
        first, *others = (measure(name) for _ in range(calls))
        results[name].after_others.append(first)
        results[name].in_a_row += others
        return first + sum(others)

    round_seconds = sum(turn(name) for name in variants)
    rounds = max(min_rounds, math.ceil(len(variants) * seconds / max(round_seconds, 1e-9)))
    results = {name: Times() for name in variants}
    order, shuffled = list(variants), random.Random(0)
    for _ in range(min(rounds, 1000)):
        *_, last = order
        shuffled.shuffle(order)
        if order[0] == last:  # it would come after itself
            order.append(order.pop(0))
        for name in order:
            turn(name)
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
