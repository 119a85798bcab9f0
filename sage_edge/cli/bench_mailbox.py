"""The report of `sage-edge bench --suite mailbox` as tables."""

from __future__ import annotations

from typing import Any

from sage_edge.cli.output import print_table

TOUCHES = {"line": "one line", "page": "a line per 4 KB", "full": "all, summed"}
WAITS = {"poll": "busy poll", "block": "blocking"}


def show_mailbox(report: dict[str, Any]) -> None:
    """Round trips, pages, broadcasts, and the goals beside them."""
    print(f"{report['machine']['cpu'] or report['machine']['architecture']}, {report['machine']['cores']} cores, kernel "
          f"{report['machine']['kernel']}, commit {(report['commit'] or 'none')[:10]}")  # fmt: skip
    for package in report["missing"]:
        print(f"{package}: not installed, not measured; pip install 'sage-edge[mailbox-peers]'")
    for touch, title in TOUCHES.items():
        rows = [
            (size_text(row["bytes"]), WAITS[row["wait"]], row["transport"],
             *(f"{row['latency'][name] * 1e3:.1f}" for name in ("p50_ms", "p99_ms")),
             f"{row['cpu_ping']:.0%}", f"{row['cpu_pong']:.0%}", row["latency"]["samples"])
            for row in report["trips"] if row["touch"] == touch
        ]  # fmt: skip
        columns = ("payload", "wait", "transport", "p50", "p99", "CPU ping", "CPU pong", "trips")
        print_table(f"round trip between two Python processes, µs; touched: {title}", columns, rows)
    goals = report["goals"]
    pages = goals["pages_per_message"]
    print_table(
        f"pages touched per message beyond those of a 64-byte one; the payload has {goals['pages_of_message']}",
        ("transport", "pages"),
        [(name, None if value is None else f"{value:.0f}") for name, value in pages.items()],
    )
    rows = [(row["readers"], row["transport"], f"{row['sent_per_s']:.0f}", f"{row['received_per_s']:.0f}",
             f"{row['slowest_reader_per_s']:.0f}", f"{row['lost']:.0%}", f"{row['cpu_sender']:.0%}",
             f"{row['cpu_readers']:.0%}") for row in report["broadcast"]]  # fmt: skip
    print_table(
        "broadcast of 64-byte records, records a second",
        ("readers", "transport", "sent", "each reader got", "slowest", "lost", "CPU sender", "CPU readers"),
        rows,
    )
    _show_goals(goals)


def _show_goals(goals: dict[str, Any]) -> None:
    def verdict(met: bool | None) -> str:
        return "not measured" if met is None else "met" if met else "not met"

    light = [row["times_rival"] for row in goals["times_rival"] if row["touch"] != "full"]
    if light:
        print(f"time / iceoryx2's where lines are touched: {min(light):.2f} to {max(light):.2f} (goal: at most 0.5 at every "
              f"size: {verdict(goals['half_of_rival'])})")  # fmt: skip
    hops = ", ".join(
        f"{size_text(row['bytes'])} ({TOUCHES[row['touch']]}) {row['hop_us']:.1f}" for row in goals["hops"]
    )
    print(f"blocking hop, µs p50: {hops} (goal: at most 15 for the transport: {verdict(goals['hop_within_15_us'])})")
    if goals["flat"] is not None:
        print(f"time at the largest payload over that at 4 KB, one line touched: {goals['flat']:.2f} (goal: about 1)")


def size_text(size: int) -> str:
    """1048576 -> '1 MB'."""
    for unit, name in ((1 << 20, "MB"), (1 << 10, "KB")):
        if size >= unit and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} B"
