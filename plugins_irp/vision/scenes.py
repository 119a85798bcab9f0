"""Synthetic scenes from a seed: what tests, certificate and bench can use on any machine.

Dead leaves (Lee, Mumford, Huang, IJCV 2001): shapes that occlude each other, radius r with a density of r ** -3, which
have the scale invariance and the edges of natural images; some carry a texture. Made here, so they may be shipped.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
SMALLEST = 3.0  # radius in pixels
AREA = 32  # pixels for each shape that is placed; what none covers keeps its ground


def scene(size: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """uint8 [size, size]."""
    slopes = np.linspace(0, 1, size, dtype=np.float32)
    image = np.full((size, size), rng.uniform(20, 235), np.float32)
    image += rng.uniform(-30, 30) * slopes + rng.uniform(-30, 30) * slopes[:, None]
    free = np.ones((size, size), bool)
    for _ in range(size * size // AREA):  # from front to back: a shape shows where none before it does
        _place(image, free, rng)
    return np.asarray(_softened(image, rng.uniform(0.0, 0.5)).clip(0, 255).round(), np.uint8)


def _place(image: Floats, free: npt.NDArray[np.bool_], rng: np.random.Generator) -> None:
    """One ellipse or rectangle, in place: `image` where `free`, and `free` itself."""
    size = len(image)
    radius = SMALLEST / np.sqrt(max(rng.random(), (SMALLEST / size) ** 2))
    turn, stretch = rng.uniform(0, np.pi), rng.uniform(0.3, 1.0)
    row, column = rng.uniform(0, size, 2)
    reach = 1.5 * radius  # beyond the corners of a turned square
    top, left = max(0, int(row - reach)), max(0, int(column - reach))
    window = (slice(top, int(row + reach) + 2), slice(left, int(column + reach) + 2))
    here = free[window]
    dy = np.arange(top, top + here.shape[0], dtype=np.float32)[:, None] - np.float32(row)
    dx = np.arange(left, left + here.shape[1], dtype=np.float32) - np.float32(column)
    along, across = dx * np.cos(turn) + dy * np.sin(turn), (dy * np.cos(turn) - dx * np.sin(turn)) / stretch
    disc, grey = rng.random() < 0.5, rng.uniform(10, 245)
    inside = along**2 + across**2 < radius**2 if disc else np.maximum(abs(along), abs(across)) < radius
    shown = inside & here
    if shown.any():
        image[window][shown] = (grey + _texture(along, across, radius, rng))[shown]
    here &= ~inside


def _texture(along: Floats, across: Floats, radius: float, rng: np.random.Generator) -> Floats:
    """Stripes or a slope on two shapes of three."""
    kind = rng.integers(3)
    if kind == 0:
        return np.zeros_like(along)
    if kind == 1:
        return np.asarray((rng.uniform(-40, 40) * along / max(radius, 1.0)).clip(-60, 60), np.float32)
    wave = np.sin(along * (2 * np.pi / rng.uniform(3, 12)) + rng.uniform(0, 6))
    return np.asarray(rng.uniform(5, 35) * wave * (1 + 0.5 * np.sin(across / rng.uniform(2, 9))), np.float32)


def _softened(image: Floats, weight: float) -> Floats:
    """Edges as a lens makes them: each pixel shares `weight` with its four neighbours."""
    wide = np.pad(image, 1, mode="edge")
    near = (wide[:-2, 1:-1] + wide[2:, 1:-1] + wide[1:-1, :-2] + wide[1:-1, 2:]) / 4
    return np.asarray((1 - weight) * image + weight * near, np.float32)
