"""Pictures: noisy, first step, halted, full steps and clean side by side, with the energy curve. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .data import psnr, with_noise
from .drive import answer
from .plugin import Vision
from .scenes import scene

SIDE = 192
LEVELS = (15.0, 50.0)


def draw(plugin: Vision, policy: str, folder: Path) -> Path:
    """Write restored.png: a synthetic scene at two noise levels. The plugin is active."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    clean = scene(SIDE, np.random.default_rng(4))
    figure, axes = pyplot.subplots(len(LEVELS), 6, figsize=(15, 2.7 * len(LEVELS)))
    for row, sigma in zip(axes, LEVELS, strict=True):
        noisy = with_noise(clean, sigma, np.random.default_rng(5))
        found = answer(plugin, noisy, policy, clean)
        shown = {
            f"noisy, sigma {sigma:g}": noisy, "step 1": found.images[0], f"halted at step {found.halted}": found.image,
            f"{plugin.max_steps} steps": found.images[-1], "clean": clean,
        }  # fmt: skip
        for axis, (title, image) in zip(row, shown.items(), strict=False):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255)
            axis.set_title(title if title == "clean" else f"{title}\n{psnr(image, clean):.2f} dB", fontsize=9)
            axis.axis("off")
        row[-1].plot(range(1, plugin.max_steps + 1), found.energies, marker="o")
        row[-1].axvline(found.halted, linestyle="--", color="grey")
        row[-1].set_title("energy, grey levels; dashed: halted", fontsize=9)
        row[-1].set_xlabel("step")
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "restored.png"
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
    return path
