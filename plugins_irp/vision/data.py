"""Images and noise: the training data, the sets to choose and to measure with. Needs NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sage_edge.errors import InputError

MAX_SIGMA = 55.0


@dataclass(frozen=True, eq=False)
class Sets:
    """train uint8 [360, 180, 180] and held uint8 [40, 180, 180]: train400 but every tenth image, and those; chosen: Set12,
    uint8 [h, w] each."""

    train: np.ndarray
    held: np.ndarray
    chosen: tuple[np.ndarray, ...]


def load_sets(folder: Path) -> Sets:
    """Raises InputError where the files are missing or not what they should be."""
    try:
        with np.load(folder / "train400.npz") as file:
            images = file["images"]
        with np.load(folder / "set12.npz") as file:
            chosen = tuple(file[name] for name in sorted(file.files))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: expected train400.npz (`images`) and set12.npz: {error}") from error
    held = np.arange(len(images)) % 10 == 9
    return Sets(images[~held], images[held], chosen)


def psnr(restored: np.ndarray, clean: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of images in grey levels 0..255."""
    error = float(np.mean((restored.astype(np.float64) - clean.astype(np.float64)) ** 2))
    return 10 * float(np.log10(255.0**2 / max(error, 1e-10)))
