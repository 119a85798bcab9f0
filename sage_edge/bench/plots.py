"""Pictures of recorded traces: what a threshold trades, how the energy falls, how many steps are taken. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path as File
from typing import Any

import numpy as np

from sage_edge.errors import MissingDependencyError
from sage_edge.files import replacing
from sage_edge.irp.certificate import Certificate
from sage_edge.irp.families import Path, paths
from sage_edge.irp.traces import Traces, steps_taken

FAMILIES = ("learned", "entropy", "entropy_max")
ENERGY = "entropy_mean"
LABELS = {
    "learned": "q_halt − q_continue >",
    "entropy": "mean entropy (nats) <",
    "entropy_max": "largest entropy (nats) <",
}
POINTS = 60  # of a path's grid: enough for a curve
INK, RED, GREY = "#1f4e79", "#c0392b", "#7f8c8d"


def draw(traces: Traces, certificate: Certificate | None, folder: File, title: str) -> list[File]:
    """Write threshold.png, energy.png and steps.png into `folder`; returns their paths.

    Raises MissingDependencyError without matplotlib.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise MissingDependencyError("plots need matplotlib: pip install 'sage-edge[plots]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, make in (("threshold", _threshold), ("energy", _energy), ("steps", _steps)):
        figure = make(pyplot, traces, certificate)
        figure.suptitle(title, fontsize=10)
        with replacing(folder / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=120)
        pyplot.close(figure)
        written.append(folder / f"{name}.png")
    return written


def _first_right(traces: Traces) -> Any:
    """The first step whose answer is right, int [n]; 0 where none is."""
    return np.where(traces.exact.any(1), traces.exact.argmax(1) + 1, 0)


def _threshold(pyplot: Any, traces: Traces, certificate: Certificate | None) -> Any:
    """Accuracy and mean steps against the threshold, a column for each signal."""
    shown = [name for name in FAMILIES if {"learned": "q_halt", "entropy": ENERGY}.get(name, name) in traces.names]
    figure, axes = pyplot.subplots(2, len(shown), figsize=(4 * len(shown), 5.5), squeeze=False, layout="constrained",
                                   sharey="row")  # fmt: skip
    certified = {c.family: c.threshold for c in certificate.families} if certificate else {}
    for column, name in enumerate(shown):
        (path,) = paths(name, traces.steps)
        x, exact, mean = _curve(traces, path)
        full = 100 * float(traces.exact[:, -1].mean())
        for row, (values, label, level) in enumerate(((exact, "exact, %", full), (mean, "mean steps", traces.steps))):
            axis = axes[row, column]
            axis.plot(x, values, color=INK)
            axis.axhline(level, color=GREY, linewidth=1, linestyle=":", label="full steps")
            if certified.get(name) is not None:
                axis.axvline(certified[name], color=RED, linewidth=1, label=f"certified: {certified[name]:g}")
            axis.set_xscale("log" if name != "learned" else "symlog", **({} if name != "learned" else {"linthresh": 1}))
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(label)
        axes[0, column].legend(fontsize=8)
        axes[1, column].set_xlabel(LABELS[name])
    return figure


def _curve(traces: Traces, path: Path) -> tuple[list[float], list[float], list[float]]:
    rows = [i for i, threshold in enumerate(path.thresholds) if threshold is not None]
    x, exact, mean = [], [], []
    for i in rows[:: max(1, len(rows) // POINTS)]:
        taken = steps_taken(traces, path.policies[i])
        x.append(float(path.thresholds[i] or 0.0))
        exact.append(100 * float(traces.exact[np.arange(len(traces)), taken - 1].mean()))
        mean.append(float(taken.mean()))
    return x, exact, mean


def _energy(pyplot: Any, traces: Traces, certificate: Certificate | None) -> Any:
    """Energy (mean token entropy) against step: median and quartiles of items by how soon their answer is right."""
    figure, axis = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    first = _first_right(traces)
    half = int(np.median(first[first > 0])) if first.any() else 1
    groups = (
        (f"easy: right by step {half}", (first > 0) & (first <= half), INK),
        ("hard: right later", first > half, "#e67e22"),
        ("never right", first == 0, RED),
    )
    steps = np.arange(1, traces.steps + 1)
    for label, rows, colour in groups:
        if rows.any():
            # A logarithmic axis has no place for the 0 of a model that is entirely sure.
            values = np.maximum(traces.signals[rows][:, :, traces.names.index(ENERGY)], 1e-8)
            low, middle, high = np.percentile(values, [25, 50, 75], axis=0)
            axis.plot(steps, middle, color=colour, marker="o", markersize=3, label=f"{label} (n = {int(rows.sum())})")
            axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("energy: mean token entropy (nats)\nmedian, quartiles")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def _steps(pyplot: Any, traces: Traces, certificate: Certificate | None) -> Any:
    """How many items take how many steps, by rule."""
    first = _first_right(traces)
    rules = [("learned", steps_taken(traces, "learned"), GREY)] if "q_halt" in traces.names else []
    if certificate is not None:
        rules.append((f"certified: {certificate.policy}", steps_taken(traces, certificate.policy), INK))
    rules.append(("oracle (first right step)", np.where(first > 0, first, traces.steps), "#27ae60"))
    figure, axis = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    width = 0.8 / len(rules)
    for index, (label, taken, colour) in enumerate(rules):
        share = 100 * np.bincount(taken, minlength=traces.steps + 1)[1 : traces.steps + 1] / len(traces)
        at = np.arange(1, traces.steps + 1) + (index - (len(rules) - 1) / 2) * width
        axis.bar(at, share, width, color=colour, label=f"{label}, mean {taken.mean():.2f}")
    axis.set_xticks(range(1, traces.steps + 1))
    axis.set_xlabel("steps taken")
    axis.set_ylabel("items, %")
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize=8)
    return figure
