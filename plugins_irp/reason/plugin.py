"""reason: the sudoku9 HRM as a plugin. All of the work is done by `EnginePlugin`; here are only the puzzles.

Observation: `puzzle`, 81 characters with 1-9 for givens and `.` or 0 for blanks; or `inputs`, int32 [81] of the model's tokens
(1 = blank, 2..10 = digits). Result: `grid`, 81 digits, and `prediction`, int32 [81] of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sage_edge.dataset import load_dataset
from sage_edge.errors import InputError
from sage_edge.irp.engine import EnginePlugin
from sage_edge.irp.plugin import Examples, Observation, Result
from sage_edge.models import shipped
from sage_edge.specs import Array

CELLS = 81
BLANK = 1  # token of an empty cell; digit d is token d + 1


class Reason(EnginePlugin):
    """See the module."""

    def prepare(self, observation: Observation) -> tuple[dict[str, Array], Any]:
        if "puzzle" in observation:
            return {"inputs": tokens(observation["puzzle"])[None]}, None
        if "inputs" not in observation:
            found = ", ".join(observation) or "nothing"
            raise InputError(f"reason: expected `puzzle` (81 characters) or `inputs`, found {found}")
        return super().prepare(observation)

    def finish(self, outputs: dict[str, Array], note: Any) -> Result:
        prediction = outputs["prediction"][0]
        return {"prediction": prediction, "grid": "".join(str(max(0, int(token) - BLANK)) for token in prediction)}

    def examples(self, source: str, limit: int | None = None) -> Examples:
        """Puzzles of the shipped model's split `source` (calibration, test); a reference is int32 [81], -1 where none."""
        folder = shipped(self.engine)
        if folder is None:
            raise InputError(f"reason: engine {self.engine}: only a shipped model comes with puzzles")
        data = load_dataset(folder / "data" / source).first(limit)
        groups: dict[str, Sequence[float]] = {name: values.tolist() for name, values in data.attributes.items()}
        return Examples([{"inputs": row} for row in data.inputs], list(data.labels), groups)

    def quality(self, result: Result, reference: Any) -> float:
        """1 where every cell is right, else 0."""
        return float(((result["prediction"] == reference) | (reference < 0)).all())


def tokens(puzzle: object) -> Array:
    """int32 [81] of the model's tokens. Raises InputError for what is no puzzle."""
    text = "".join(puzzle.split()) if isinstance(puzzle, str) else ""
    if len(text) != CELLS or not set(text) <= set("0123456789."):
        raise InputError(
            f"puzzle: expected {CELLS} characters of 1-9 and . or 0 for blanks, found {str(puzzle)[:100]!r}"
        )
    return np.array([BLANK if c in ".0" else int(c) + BLANK for c in text], np.int32)
