"""Synthetic scenes from a seed: what tests, certificate and bench can use on any machine.

Dead leaves (Lee, Mumford, Huang, IJCV 2001): shapes that occlude each other, radius r with a density of r ** -3, which
have the scale invariance and the edges of natural images; some carry a texture. Made here, so they may be shipped.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

SMALLEST = 3.0
SHAPES = 400  # the rest of the canvas keeps its ground


def scene(size: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """uint8 [size, size]."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    image = np.full((size, size), rng.uniform(20, 235), np.float32)
    image += rng.uniform(-30, 30) * (x / size) + rng.uniform(-30, 30) * (y / size)
    free = np.ones((size, size), bool)
    for _ in range(SHAPES):  # from front to back: a shape shows where none before it does
        radius = SMALLEST / np.sqrt(max(rng.random(), (SMALLEST / size) ** 2))
        turn, stretch = rng.uniform(0, np.pi), rng.uniform(0.3, 1.0)
        dx, dy = x - rng.uniform(0, size), y - rng.uniform(0, size)
        along, across = dx * np.cos(turn) + dy * np.sin(turn), (dy * np.cos(turn) - dx * np.sin(turn)) / stretch
        round_ = rng.random() < 0.5
        inside = along**2 + across**2 < radius**2 if round_ else np.maximum(abs(along), abs(across)) < radius
        shown = inside & free
        if shown.any():
            image[shown] = (rng.uniform(10, 245) + _texture(along, across, radius, rng))[shown]
            free &= ~inside
    return _softened(image, rng.uniform(0.0, 0.5)).clip(0, 255).round().astype(np.uint8)


def _texture(
    along: npt.NDArray[np.float32], across: npt.NDArray[np.float32], radius: float, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Stripes or a slope on two shapes of three."""
    kind = rng.integers(3)
    if kind == 0:
        return np.zeros_like(along)
    if kind == 1:
        return (rng.uniform(-40, 40) * along / max(radius, 1.0)).clip(-60, 60)
    wave = np.sin(along * (2 * np.pi / rng.uniform(3, 12)) + rng.uniform(0, 6))
    return np.asarray(rng.uniform(5, 35) * wave * (1 + 0.5 * np.sin(across / rng.uniform(2, 9))), np.float32)


def _softened(image: npt.NDArray[np.float32], weight: float) -> npt.NDArray[np.float32]:
    """Edges as a lens makes them: each pixel shares `weight` with its four neighbours."""
    wide = np.pad(image, 1, mode="edge")
    near = (wide[:-2, 1:-1] + wide[2:, 1:-1] + wide[1:-1, :-2] + wide[1:-1, 2:]) / 4
    return (1 - weight) * image + weight * near
