"""A small world to look at: a bright disc on its way over a dim, noisy background, as PGM files; and where it is.

PGM (https://netpbm.sourceforge.net/doc/pgm.html) needs no library: `P5 WIDTH HEIGHT 255` and the pixels.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sage_edge.errors import InputError
from sage_edge.files import write_atomic

HEIGHT, WIDTH = 240, 320
TILE = 40  # pixels on a side; 6 x 8 tiles
PERIOD = 90  # frames until the disc is back
RADIUS = 9.0

Image = npt.NDArray[np.uint8]


def position(frame: int) -> tuple[float, float]:
    """Row and column of the disc's centre in a frame."""
    angle = 2 * math.pi * frame / PERIOD
    return HEIGHT / 2 + 0.33 * HEIGHT * math.sin(2 * angle), WIDTH / 2 + 0.36 * WIDTH * math.sin(angle)


def draw(frame: int) -> Image:
    """uint8 [240, 320]: the world at a frame; frames PERIOD apart differ in their noise alone."""
    noise = np.random.default_rng(frame).integers(0, 40, (HEIGHT, WIDTH))
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    row, column = position(frame)
    disc = np.clip(RADIUS + 0.5 - np.hypot(rows - row, columns - column), 0, 1)
    return np.asarray(noise + 200 * disc, np.uint8)


def write(folder: Path, frames: int = PERIOD) -> None:
    """The world as folder/0000.pgm, 0001.pgm, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for frame in range(frames):
        write_atomic(folder / f"{frame:04d}.pgm", b"P5 %d %d 255\n" % (WIDTH, HEIGHT) + draw(frame).tobytes())


def read(path: Path) -> Image:
    """A binary PGM file of 240 x 320 pixels. Raises InputError when it is something else."""
    content = path.read_bytes()
    fields = content[:64].split(maxsplit=4)
    if len(fields) < 5 or fields[0] != b"P5" or fields[1:4] != [b"%d" % WIDTH, b"%d" % HEIGHT, b"255"]:
        raise InputError(f"{path}: expected a binary PGM (P5) of {WIDTH} x {HEIGHT} pixels with maximum 255")
    # One white-space byte ends the header; pixels may look like white space, so they are counted from the end.
    if len(content) < HEIGHT * WIDTH:
        raise InputError(f"{path}: {len(content)} bytes, {HEIGHT * WIDTH} pixels were expected")
    return np.frombuffer(content, np.uint8, offset=len(content) - HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)


def load(folder: Path) -> list[Image]:
    """All PGM files of a folder in the order of their names. Raises InputError when there are none."""
    paths = sorted(folder.glob("*.pgm"))
    if not paths:
        raise InputError(f"{folder}: holds no .pgm files; `run.py` makes some when no folder is given")
    return [read(path) for path in paths]
