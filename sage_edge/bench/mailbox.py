"""`sage-edge bench --suite mailbox`: the mailbox beside other ways to hand tensors to another process, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sage_edge.bench.header import header
from sage_edge.bench.mailbox_broadcast import broadcasts
from sage_edge.bench.mailbox_links import CONTESTANTS, OURS, Contestant
from sage_edge.bench.mailbox_trips import SIZES, round_trips
from sage_edge.device import usable_cores

RIVAL = "iceoryx2"
HOP_US = 15.0
SMALLEST = 64
Progress = Callable[[str, float], None]
Report = dict[str, Any]


def run_mailbox(seconds: float, progress: Progress, contestants: tuple[Contestant, ...] = CONTESTANTS) -> Report:
    """The report. seconds: for each transport in each table row of round trips (four rounds in turn) and each broadcast.

    Transports whose package is not installed are left out and named in `missing`. Raises LinkError when one fails.
    """
    began = time.perf_counter()
    present = tuple(one for one in contestants if one.version is not None)
    versions = {one.package: one.version for one in present if one.package}
    report = header("mailbox", usable_cores(), versions)
    report["missing"] = [one.package for one in contestants if one not in present]
    report["seconds_each"] = seconds
    report |= round_trips(present, seconds, SIZES, progress)
    report["broadcast"] = broadcasts(present, seconds, progress)
    report["goals"] = goals(report)
    report["seconds"] = time.perf_counter() - began
    return report


def goals(report: Report) -> Report:
    """What was aimed at beside what was measured; a part that could not be measured is None.

    times_rival: p50 of a round trip over iceoryx2's, by size, touch and way of waiting (goal: at most 0.5 each, where only
    lines are touched). hop_us: half of a blocking round trip (goal: at most 15). flat: p50 at the largest size over that at
    4 KB, polling, one line touched (goal: about 1). pages_per_message: pages touched by both processes for the largest size
    beyond those for 64 bytes, per message (goal: 0; a copy touches all of `pages_of_message`).
    """
    p50 = {
        (row["transport"], row["bytes"], row["touch"], row["wait"]): row["latency"]["p50_ms"] for row in report["trips"]
    }
    ratios = [
        {"bytes": size, "touch": touch, "wait": wait, "times_rival": value / p50[RIVAL, size, touch, wait]}
        for (name, size, touch, wait), value in p50.items()
        if name == OURS and (RIVAL, size, touch, wait) in p50
    ]
    light = [row["times_rival"] for row in ratios if row["touch"] != "full"]
    hops = [{"bytes": size, "touch": touch, "hop_us": 500 * value} for (name, size, touch, wait), value in p50.items()
            if name == OURS and wait == "block" and touch != "full"]  # fmt: skip
    lines = [row["hop_us"] for row in hops if row["touch"] == "line" or row["bytes"] <= 4096]
    largest = max(row["bytes"] for row in report["trips"])
    touch = "line" if largest > 4096 else "page"
    base = p50.get((OURS, 4096, "page", "poll"))
    return {
        "times_rival": ratios,
        "half_of_rival": max(light) <= 0.5 if light else None,
        "hops": hops,
        "hop_within_15_us": max(lines) <= HOP_US if lines else None,
        "flat": p50[OURS, largest, touch, "poll"] / base if base else None,
        "pages_per_message": _pages_per_message(report["pages"], largest),
        "pages_of_message": largest // 4096,
    }


def _pages_per_message(rows: list[Report], largest: int) -> dict[str, float | None]:
    """By transport. A round trip is two messages."""
    pages = {(row["transport"], row["bytes"]): row["pages"] for row in rows}
    result: dict[str, float | None] = {}
    for name, size in pages:
        if size == largest:
            small, large = pages.get((name, SMALLEST)), pages[name, size]
            result[name] = None if small is None or large is None else (large - small) / 2
    return result
