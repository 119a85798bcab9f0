"""Images and noise: the training data, the sets to choose and to measure with. Needs NumPy alone.

`train400.npz` and `set12.npz` hold the standard sets of the denoising literature (cszn/DnCNN). No licence is stated for
them: they are used, not passed on. Everything that must run without them uses `scenes`, made from a seed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sage_edge.errors import InputError
from sage_edge.irp.plugin import Examples

from .scenes import scene

MAX_SIGMA = 55.0
VARIABLE = "SAGE_EDGE_DATA"
SEEDS = {"calibration": 1, "report": 2}
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Sets:
    """train uint8 [360, 180, 180] and held uint8 [40, 180, 180]: train400 but every tenth image, and those; chosen: Set12,
    uint8 [h, w] each."""

    train: Bytes
    held: Bytes
    chosen: tuple[Bytes, ...]


def data_folder() -> Path:
    """$SAGE_EDGE_DATA/denoise, else ../shared/data/denoise beside the repository."""
    if own := os.environ.get(VARIABLE):
        return Path(own) / "denoise"
    return Path(__file__).resolve().parents[3] / "shared" / "data" / "denoise"


def load_sets(folder: Path) -> Sets:
    """Raises InputError where the files are missing or not what they should be."""
    try:
        with np.load(folder / "train400.npz") as file:
            images = file["images"]
        with np.load(folder / "set12.npz") as file:
            chosen = tuple(file[name] for name in sorted(file.files))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder}: expected train400.npz (`images` uint8 [n, h, w]) and set12.npz (uint8 [h, w] each), made of "
            f"github.com/cszn/DnCNN, in a folder `denoise` of the one that ${VARIABLE} names: {error}"
        ) from error
    held = np.arange(len(images)) % 10 == 9
    return Sets(images[~held], images[held], chosen)


def with_noise(clean: Bytes, sigma: float, rng: np.random.Generator) -> Floats:
    """`clean` plus Gaussian noise, neither clipped nor rounded (the literature's convention), float32."""
    noise = rng.standard_normal(clean.shape, dtype=np.float32)
    return np.asarray(clean + np.float32(sigma) * noise, np.float32)


def psnr(restored: npt.NDArray[np.generic], clean: npt.NDArray[np.generic]) -> float:
    """Peak signal-to-noise ratio in dB of images in grey levels 0..255."""
    error = float(np.mean((restored.astype(np.float64) - clean.astype(np.float64)) ** 2))
    return 10 * float(np.log10(255.0**2 / max(error, 1e-10)))


def noisy_examples(images: Iterable[Bytes], seed: int) -> Examples:
    """Each image with noise of its own level, drawn evenly from 0 to MAX_SIGMA (group `sigma`)."""
    rng = np.random.default_rng(seed)
    clean = list(images)
    sigmas, noisy = [], []
    for image in clean:
        sigmas.append(float(MAX_SIGMA * rng.random()))
        noisy.append(with_noise(image, sigmas[-1], rng))
    return Examples([{"image": image} for image in noisy], clean, {"sigma": sigmas})


def crops(images: Iterable[Bytes], size: int) -> list[Bytes]:
    """All disjoint squares of the images, from their upper left corner."""
    return [
        image[top : top + size, left : left + size]
        for image in images
        for top in range(0, image.shape[0] - size + 1, size)
        for left in range(0, image.shape[1] - size + 1, size)
    ]


def scene_examples(source: str, count: int, size: int) -> Examples:
    """`calibration` or `report`: seeded scenes with noise; the first ones are the same whatever `count` is."""
    if source not in SEEDS:
        raise InputError(f"vision: examples {source!r}: expected {' or '.join(SEEDS)}")
    rng = np.random.default_rng(SEEDS[source])
    return noisy_examples([scene(size, rng) for _ in range(count)], 100 + SEEDS[source])
