"""Images of any size as overlapping tiles of one size, and back without seams."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Tiling:
    """Where the tiles of an image of height x width lie. Neighbours share at least `overlap` pixels and are blended there
    linearly; an image smaller than a tile is continued by its mirror image."""

    height: int
    width: int
    tile: int
    overlap: int

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.tile:
            raise ValueError(f"overlap: expected 0 to {self.tile - 1} (less than a tile), found {self.overlap}")

    @cached_property
    def corners(self) -> tuple[tuple[int, int], ...]:
        """(top, left) of each tile, row by row."""
        return tuple((top, left) for top in self._starts(self.height) for left in self._starts(self.width))

    def _starts(self, size: int) -> list[int]:
        """Evenly spread; the first at 0, the last ends with the image."""
        count = max(1, -(-(size - self.overlap) // (self.tile - self.overlap)))
        return [round(i * (size - self.tile) / max(1, count - 1)) for i in range(count)] if count > 1 else [0]

    def cut(self, image: Floats) -> Floats:
        """float32 [tiles, tile, tile] of an image [height, width]."""
        below, beside = max(0, self.tile - self.height), max(0, self.tile - self.width)
        padded = np.pad(image, ((0, below), (0, beside)), mode="symmetric")
        return np.stack([padded[t : t + self.tile, x : x + self.tile] for t, x in self.corners]).astype(np.float32)

    def blend(self, tiles: Floats) -> Floats:
        """float32 [height, width] of tiles [tiles, tile, tile]: where they overlap, the mean by their weights."""
        shape = (max(self.height, self.tile), max(self.width, self.tile))
        total, weight = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for (top, left), tile in zip(self.corners, tiles, strict=True):
            window = np.outer(self._ramp(top, self.height), self._ramp(left, self.width))
            part = (slice(top, top + self.tile), slice(left, left + self.tile))
            total[part] += window * tile
            weight[part] += window
        return (total / weight)[: self.height, : self.width]

    def _ramp(self, start: int, size: int) -> Floats:
        """Weights along one side: they rise over the overlap, but stay 1 where the image ends."""
        ramp = np.ones(self.tile, np.float32)
        rise = (np.arange(self.overlap, dtype=np.float32) + 1) / (self.overlap + 1)
        if start > 0:
            ramp[: self.overlap] = rise
        if start + self.tile < size:
            ramp[self.tile - self.overlap :] *= rise[::-1]
        return ramp
