"""Timing of several contestants in turn, so that a machine that slows down slows them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Latency:
    """Milliseconds over `samples` calls: the median to quote, the tail, the fastest, and the mean for throughput."""

    samples: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    min_ms: float
    mean_ms: float

    @classmethod
    def of(cls, seconds: list[float]) -> Latency:
        ms = np.asarray(seconds) * 1e3
        p50, p95, p99 = (float(v) for v in np.percentile(ms, [50, 95, 99]))
        return cls(len(ms), p50, p95, p99, float(ms.min()), float(ms.mean()))


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    budget_s: float,
    minimum_rounds: int = 5,
    calls: int = 4,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Latency]:
    """Time each contestant `calls` times in a row, then the next, round after round, for about `budget_s` seconds.

    One untimed call comes before each row of calls: what the one before left in caches and thread pools is not ours.
    """
    for run in contestants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    began = time.perf_counter()
    rounds = 0
    while rounds < minimum_rounds or time.perf_counter() - began < budget_s:
        for name, run in contestants.items():
            run()
            for _ in range(calls):
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
        rounds += 1
        if progress:
            progress(min(1.0, max(rounds / minimum_rounds / 2, (time.perf_counter() - began) / budget_s)))
    return {name: Latency.of(values) for name, values in seconds.items()}
