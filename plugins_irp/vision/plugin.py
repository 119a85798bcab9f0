"""vision: an image without its noise, whatever the noise level.

Observation: `image`, [h, w] grey or [h, w, 3] colour, uint8 or floating point in grey levels 0..255. Result: `image` of the
same shape (uint8 for uint8, else float32), `sigma` (the noise that was found, standard deviation in grey levels) and `error`
(the error thought to be left, root mean square in grey levels).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sage_edge.config import load_yaml
from sage_edge.errors import InputError
from sage_edge.irp.engine import EnginePlugin, EngineState
from sage_edge.irp.plugin import Examples, Observation, Result
from sage_edge.irp.slots import Seat
from sage_edge.irp.spec import PluginSpec
from sage_edge.specs import Array

from .data import MAX_SIGMA, psnr, scene_examples
from .facts import MODEL, QUALITY_UNITS, WHITE, ModelFile
from .tiles import Tiling

FOLDER = Path(__file__).resolve().parent
LIMIT = 1 << 26  # pixels of one image
PLANES, ROUND = "note/planes", "note/round"
# One grey model for colour: three orthonormal channels, luma and two of chroma, in which Gaussian noise keeps its level
# (the opponent colours of CBM3D, Dabov et al. 2007). Rows: channels from R, G, B.
OPPONENT = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]], np.float32) / np.sqrt(np.array([[3], [2], [6]], np.float32))


@dataclass(frozen=True, eq=False)
class Note:
    """What `finish` needs of the observation: planes float32 [1 or 3, h, w], and whether it was uint8."""

    planes: npt.NDArray[np.float32]
    whole: bool


class Vision(EnginePlugin):
    """See the module.

    engine: a bundle in the plugin's folder, or whatever `sage_edge.load` takes. overlap: least pixels that neighbouring
    tiles share. rest: a tile is refined no further once all further steps are thought to gain less than this, in dB.
    """

    outputs = ("prediction",)

    def __init__(
        self, spec: PluginSpec, engine: str = "bundle", threads: int | None = None, overlap: int = 8,
        rest: float = 0.005,
    ) -> None:  # fmt: skip
        super().__init__(spec, str(FOLDER / engine) if (FOLDER / engine).is_dir() else engine, threads)
        self.file = load_yaml(FOLDER / MODEL, ModelFile)
        self.overlap, self.rest = overlap, rest
        if not 0 <= overlap <= self.tile // 2:
            raise InputError(f"vision: overlap: expected 0 to {self.tile // 2}, half a tile, found {overlap}")

    @property
    def tile(self) -> int:
        return self.file.config.tile

    def prepare(self, observation: Observation) -> tuple[dict[str, Array], Any]:
        """noisy float32 [tiles of all channels, 1, tile, tile]. Raises InputError for what is no image."""
        planes, whole = _planes(observation.get("image"))
        tiling = self.tiling(planes)
        return {"noisy": np.concatenate([tiling.cut(plane) for plane in planes])[:, None]}, Note(planes, whole)

    def tiling(self, planes: npt.NDArray[np.float32]) -> Tiling:
        return Tiling(planes.shape[1], planes.shape[2], self.tile, self.overlap)

    def step_many(self, states: Sequence[EngineState], indices: Sequence[int]) -> list[EngineState]:
        """One step for every tile that does not rest: a plain sky is done before the grass below it."""
        self.bank.refine([seat for state in states for seat in state.seats if not self.rests(seat)])
        return list(states)

    def rests(self, seat: Seat) -> bool:
        """Whether this tile is done, by the model's own guess of what further steps would gain (never before its first)."""
        return bool(self._done(seat.signals[None])[0])

    def _done(self, signals: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """bool [slots]; False for NaN, which signals are before the first step."""
        now, later = (signals[:, self.runner.model.signal(name)] for name in ("q_halt", "q_continue"))
        return np.asarray((later - now) / QUALITY_UNITS < self.rest, bool)

    def energy_of(self, signals: npt.NDArray[np.float32]) -> float:
        """The error thought to be left plus the change of the estimate in the last step (0 where it rests), both root
        mean squares over all tiles in grey levels."""
        error, change = (signals[:, self.runner.model.signal(name)].astype(np.float64) for name in ("error", "change"))
        change[self._done(signals)] = 0.0
        return float(np.sqrt(np.mean(error**2)) + np.sqrt(np.mean(change**2)))

    def result(self, state: EngineState) -> Result:
        """With `error`, and `sigma` of it: what was taken off and what is left are uncorrelated for a good estimate."""
        found = super().result(state)
        signals = np.stack([seat.signals for seat in state.seats]).astype(np.float64)
        error = float(np.sqrt(np.mean(signals[:, self.runner.model.signal("error")] ** 2)))
        return {**found, "sigma": float(np.hypot(found["sigma"], error)), "error": error}

    def finish(self, outputs: dict[str, Array], note: Note) -> Result:
        planes, tiling = note.planes, self.tiling(note.planes)
        noise = outputs["prediction"][:, 0].reshape(len(planes), -1, self.tile, self.tile)
        found = np.stack([tiling.blend(tiles) for tiles in noise])
        clean = planes - found
        image = clean[0] if len(clean) == 1 else np.tensordot(clean, OPPONENT, axes=(0, 0))
        image = image.clip(0, WHITE)
        return {
            "image": image.round().astype(np.uint8) if note.whole else image.astype(np.float32),
            "sigma": float(np.sqrt(np.mean(found.astype(np.float64) ** 2))),
        }

    def pack(self, state: EngineState) -> dict[str, Array]:
        return {**self.pack_seats(state), PLANES: state.note.planes.copy(), ROUND: np.array([state.note.whole])}

    def unpack(self, arrays: dict[str, Array]) -> EngineState:
        rest = {name: array for name, array in arrays.items() if name not in (PLANES, ROUND)}
        note = Note(arrays[PLANES].astype(np.float32), bool(arrays[ROUND][0]))
        return self.unpack_seats(rest, note)

    def samples(self, count: int) -> list[Observation]:
        """Of different sizes, so that the check meets padding and several tiles: the check must not need the data."""
        sides = [self.tile, self.tile // 2, self.tile + self.tile // 2]
        return [scene_examples("report", i + 1, sides[i % 3]).observations[i] for i in range(count)]

    def examples(self, source: str, limit: int | None = None) -> Examples:
        """`calibration` or `report`: synthetic scenes of one tile from a seed, each with its own noise level (group
        `sigma`), 512 unless limited; the two have no scene in common."""
        return scene_examples(source, 512 if limit is None else limit, self.tile)

    def quality(self, result: Result, reference: Any) -> float:
        """PSNR in dB."""
        return psnr(result["image"], reference)


def _planes(image: Any) -> tuple[npt.NDArray[np.float32], bool]:
    """float32 [1 or 3, h, w], and whether the image was uint8. Raises InputError."""
    expected = "vision: `image`: expected an array [h, w] or [h, w, 3], uint8 or floating point in grey levels 0..255"
    if not isinstance(image, np.ndarray):
        raise InputError(f"{expected}, found {type(image).__name__}")
    if image.dtype != np.uint8 and image.dtype.kind != "f":
        raise InputError(f"{expected}, found {image.dtype}")
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3) or not 0 < image.size <= 3 * LIMIT:
        raise InputError(f"{expected}, found shape {list(image.shape)}")
    if image.dtype != np.uint8 and not (np.isfinite(image).all() and float(np.abs(image).max()) < 4096):
        raise InputError(f"{expected}, found NaN, Inf or values far outside")
    values = image.astype(np.float32)
    planes = values[None] if values.ndim == 2 else np.einsum("kc,hwc->khw", OPPONENT, values)
    return np.ascontiguousarray(planes, np.float32), image.dtype == np.uint8


__all__ = ["FOLDER", "MAX_SIGMA", "Vision"]
