"""The log of a training run: log.csv with a column `step`, and its picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sage_edge.files import write_atomic

LOG = "log.csv"


def append_row(log: Path, row: Mapping[str, Any]) -> None:
    """One line more; its names become the header of a new file."""
    new = not log.exists()
    with log.open("a", newline="") as handle:
        writer = csv.DictWriter(handle, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def keep_until(log: Path, step: int) -> None:
    """Drop what was logged after the state was saved: those steps are about to be taken again. No log: nothing to drop."""
    if not log.exists():
        return
    header, *rows = log.read_text().splitlines(keepends=True)
    write_atomic(log, "".join([header, *(row for row in rows if int(row.split(",")[0]) <= step)]))


def plot(log: Path, image: Path, quality: Mapping[str, str], loss: str, title: str = "accuracy") -> None:
    """Learning curve of a log.csv: what validation found (column -> label) above, one loss column below, against step.

    Needs matplotlib (the `train` extra).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with log.open(newline="") as handle:
        rows = list(csv.DictReader(handle))

    def column(name: str) -> tuple[list[int], list[float]]:
        known = [(int(r["step"]), float(r[name])) for r in rows if r[name]]
        return [step for step, _ in known], [value for _, value in known]

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 6))
    for name, label in quality.items():
        above.plot(*column(name), marker="o", markersize=3, label=label)
    above.set_ylabel(f"{title}, validation")
    above.legend()
    below.plot(*column(loss), linewidth=0.8)
    below.set_ylabel(f"{loss.replace('_', ' ')}, training")
    below.set_xlabel("optimiser step")
    figure.tight_layout()
    figure.savefig(image, dpi=120)
    pyplot.close(figure)
