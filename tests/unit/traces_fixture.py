"""The recorded traces of tests/data as `Traces`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from sage_edge.irp.traces import Traces

CELLS = 81


@cache
def recorded() -> Traces:
    with np.load(Path(__file__).resolve().parents[1] / "data" / "sudoku9-traces.npz", allow_pickle=False) as data:
        names = tuple(str(name) for name in data["names"])
        right = data["right"]
        return Traces(data["signals"].astype(np.float32), right == CELLS, right / CELLS, names)
