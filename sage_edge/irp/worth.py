"""What the next steps of a request are worth: expected fall of its loss, learned from traces. Pure.

A table with a cell for each stage (steps taken) and band (its energy now). A cell holds, for every later stage, the mean
fall of the loss over the requests seen there, with count and variance. From these follow what its next steps are worth: the
slopes of the least concave majorant of the mean falls, never below zero. Pooling to a majorant makes the estimates
monotone, as isotonic regression does, and it looks ahead: a step that brings nothing by itself but opens the way for the
next two is worth a third of what the three bring together.

The loss is the normalised energy (EnergyRange.normalise), 1 before the first step; or, from traces that know the right
answers, any loss in the same unit. Then energy is only what tells the cells apart, and the table does not learn on.

Uncertainty: a worth is raised by `exploration` standard errors of its cell. A cell that nothing is known of falls by half
with every step and is as uncertain as that is large, so that a new plugin is tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
STAGES, BANDS = 16, 8
Cell = tuple[int, int]
Pieces = tuple[tuple[float, int], ...]
NEGLIGIBLE = 1e-6  # a step that is expected to lower the loss by less than this is worth nothing
PRIOR_WEIGHT = 1.0  # as much as one request
MEMORY = 30.0  # requests that a cell remembers, divided by the rate of adaptation


@dataclass(frozen=True, eq=False)
class WorthTable:
    """stride: steps a stage. edges float [stages + 1, bands - 1]: energies between the bands, rising. counts, sums, squares
    float [stages, bands, stages + 1]: over requests in the cell, of the fall of the loss from there to each later stage.
    priced: what follows from them, worked out when it is asked for the first time; see `_price`.
    """

    max_steps: int
    stride: int
    edges: Floats
    counts: Floats
    sums: Floats
    squares: Floats
    learns: bool = True
    priced: dict[Cell, tuple[Pieces, float]] = field(default_factory=dict, repr=False)

    @property
    def stages(self) -> int:
        return len(self.counts)

    def ahead(self, steps: int, energy: float, exploration: float) -> Pieces:
        """The next steps of a request that took `steps` steps and stands at `energy` (normalised)."""
        stage = min(steps // self.stride, self.stages - 1)
        cell = stage, int(np.searchsorted(self.edges[stage], energy)) if stage else 0
        if cell not in self.priced:
            self.priced[cell] = _price(self, *cell)
        pieces, error = self.priced[cell]
        return tuple((worth + exploration * error, count) for worth, count in pieces)


def blank(max_steps: int) -> WorthTable:
    """A table that knows nothing yet; bands at powers of ten."""
    stride = -(-max_steps // STAGES)
    stages = -(-max_steps // stride)
    edges = np.tile(10.0 ** np.linspace(-4, -0.5, BANDS - 1), (stages + 1, 1))
    return _empty(max_steps, stride, edges, learns=True)


def fitted(energies: Floats, losses: Floats | None = None) -> WorthTable:
    """A table from whole traces.

    energies: normalised, [n, steps], after each step. losses: [n, steps], in the unit of 1 = untouched; without them, the
    energies themselves, and the table goes on learning.
    """
    count, max_steps = energies.shape
    table = blank(max_steps)
    stages, stride = table.stages, table.stride
    known = _staged(np.concatenate((np.ones((count, 1)), energies), axis=1), stages, stride)
    target = known if losses is None else _staged(np.concatenate((np.ones((count, 1)), losses), axis=1), stages, stride)
    edges = np.quantile(known, np.arange(1, BANDS) / BANDS, axis=0).T
    table = _empty(max_steps, stride, edges, learns=losses is None)
    for row in range(count):
        _add(table, known[row], target[row], stages)
    return table


def learned(table: WorthTable, energies: Sequence[float], finished: bool, adaptation: float) -> WorthTable:
    """The table after one more request.

    energies: normalised, after each of its steps. finished: its policy stopped it, so that more steps would have changed
    nothing worth having; one that a deadline cut short says nothing of the steps it did not take.
    """
    if not table.learns or not len(energies):
        return table
    path = np.concatenate(([1.0], energies))
    taken = (len(path) - 1) // table.stride
    if finished:
        path = np.concatenate((path, np.full(max(0, table.stages * table.stride + 1 - len(path)), path[-1])))
    known = _staged(path[None], table.stages if finished else taken, table.stride)[0]
    copies = {name: getattr(table, name).copy() for name in ("counts", "sums", "squares")}
    fresh = replace(table, **copies, priced=dict(table.priced))
    limit = MEMORY / max(adaptation, 1e-3)
    for cell in _add(fresh, known, known, len(known) - 1, limit):
        fresh.priced.pop(cell, None)
    return fresh


def _empty(max_steps: int, stride: int, edges: Floats, learns: bool) -> WorthTable:
    stages = len(edges) - 1
    shape = (stages, edges.shape[1] + 1, stages + 1)
    return WorthTable(max_steps, stride, edges, np.zeros(shape), np.zeros(shape), np.zeros(shape), learns)


def _staged(paths: Floats, stages: int, stride: int) -> Floats:
    """[n, stages + 1] from [n, 1 + steps]: every stride-th, the last one standing for what is beyond it."""
    at = np.minimum(np.arange(stages + 1) * stride, paths.shape[1] - 1)
    return paths[:, at]


def _add(table: WorthTable, known: Floats, target: Floats, stages: int, limit: float = np.inf) -> list[Cell]:
    """Count one request in every cell that it passed through; changes the arrays of `table`."""
    cells = []
    for stage in range(min(stages, table.stages)):
        band = int(np.searchsorted(table.edges[stage], known[stage])) if stage else 0
        later = slice(stage + 1, stages + 1)
        fall = target[stage] - target[later]
        counts = table.counts[stage, band, later]
        keep = np.minimum(1.0, limit / np.maximum(counts, 1.0))
        for array, new in ((table.counts, 1.0), (table.sums, fall), (table.squares, fall**2)):
            array[stage, band, later] = array[stage, band, later] * keep + new
        cells.append((stage, band))
    return cells


def _price(table: WorthTable, stage: int, band: int) -> tuple[Pieces, float]:
    """Of one cell: the next steps, as (worth of a step, how many steps), falling; the standard error of the first worth."""
    left = table.stages - stage
    level = _middle(table, stage, band)
    fall = level * (1 - 0.5 ** (np.arange(1, left + 1) * table.stride))  # the prior's: half with every step
    counts = table.counts[stage, band, stage + 1 :] + PRIOR_WEIGHT
    means = (table.sums[stage, band, stage + 1 :] + PRIOR_WEIGHT * fall) / counts
    squares = (table.squares[stage, band, stage + 1 :] + PRIOR_WEIGHT * (fall**2 + fall**2)) / counts
    slopes = _majorant(means)
    first = slopes[0][1] if slopes else 1
    error = float(np.sqrt(max(squares[first - 1] - means[first - 1] ** 2, 0.0) / counts[first - 1]))
    pieces = tuple((slope / table.stride, count * table.stride) for slope, count in slopes)
    return pieces, error / (first * table.stride)


def _middle(table: WorthTable, stage: int, band: int) -> float:
    """An energy that stands for a band."""
    if stage == 0:
        return 1.0
    edges = table.edges[stage]
    low = edges[band - 1] if band > 0 else 0.0
    high = edges[band] if band < len(edges) else 1.0
    return float(min(1.0, (low + max(low, high)) / 2))


def _majorant(means: Floats) -> list[tuple[float, int]]:
    """Pieces (slope, length) of the least concave majorant of 0, means[0], means[1], ..., down to NEGLIGIBLE slopes; what
    comes after the first two pieces is one, with their mean slope."""
    points = np.concatenate(([0.0], means))
    pieces: list[tuple[float, int]] = []
    at = 0
    while at < len(means):
        ahead = (points[at + 1 :] - points[at]) / np.arange(1, len(points) - at)
        best = int(ahead.argmax())
        if ahead[best] <= NEGLIGIBLE:
            break
        pieces.append((float(ahead[best]), best + 1))
        at += best + 1
    tail = pieces[2:]
    if len(tail) > 1:
        length = sum(count for _, count in tail)
        pieces[2:] = [(sum(slope * count for slope, count in tail) / length, length)]
    return pieces


def to_arrays(table: WorthTable) -> dict[str, npt.NDArray[np.float64]]:
    """The table as arrays, for a file."""
    facts = np.array([table.max_steps, table.stride, table.learns], np.float64)
    return {"facts": facts, **{name: getattr(table, name) for name in ("edges", "counts", "sums", "squares")}}


def from_arrays(arrays: dict[str, npt.NDArray[np.float64]]) -> WorthTable:
    """The table that `to_arrays` wrote. Raises KeyError or ValueError for arrays that are none."""
    max_steps, stride, learns = (int(v) for v in arrays["facts"])
    parts = {name: np.asarray(arrays[name], np.float64) for name in ("edges", "counts", "sums", "squares")}
    stages, bands = -(-max_steps // max(stride, 1)), parts["edges"].shape[-1] + 1
    shapes = {name: array.shape for name, array in parts.items()}
    cells = (stages, bands, stages + 1)
    if shapes != {"edges": (stages + 1, bands - 1), "counts": cells, "sums": cells, "squares": cells}:
        raise ValueError(f"shapes {shapes} do not fit {max_steps} steps")
    if not all(np.isfinite(array).all() for array in parts.values()):
        raise ValueError("the arrays hold NaN or Inf")
    made = _empty(max_steps, stride, parts["edges"], bool(learns))
    return replace(made, counts=parts["counts"], sums=parts["sums"], squares=parts["squares"])
