"""`sage-edge run --pipeline`: mailbox ports → plugins → ports."""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sage_edge.cli.output import print_json, print_table, stages


def run_with_pipeline(arguments: argparse.Namespace) -> int:
    from sage_edge.pipeline import Limits, run_pipeline

    limits = Limits(arguments.answers, arguments.seconds, arguments.record, arguments.telemetry)
    with _stopping() as stop, stages("pipeline") as progress:
        report = run_pipeline(arguments.pipeline, limits, stop, tuple(arguments.plugins), progress)
    if arguments.json:
        print_json(report)
    else:
        _show(report, arguments.pipeline)
        for path in (arguments.record, arguments.telemetry):
            if path:
                print(f"written: {path}")
    return 0


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second SIGINT interrupts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals belong to the main thread
        return

    def handler(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _show(report: dict[str, Any], path: Path) -> None:
    print_table(
        f"{path}: {report['seconds']:.1f} s, ended by {report['ended']}",
        ("route", "received", "lost", "answered", "at deadline", "refused", "failed", "sent", "p50 ms", "p99 ms"),
        [(f"{r['take']} → {r['plugin']} → {r['give']}", r["received"], r["lost"], r["answered"], r["deadline"], r["refused"],
          r["failed"], r["sent"], *(None if r[k] is None else f"{r[k]:.1f}" for k in ("p50_ms", "p99_ms")))
         for r in report["routes"]],
    )  # fmt: skip
    for route in report["routes"]:
        for text, count in route["errors"].items():
            print(f"{route['take']}: {count} × {text}")
