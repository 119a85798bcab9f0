"""One image through the plugin by hand, for measurements, pictures and tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sage_edge.irp.halting import History

from .data import Bytes, psnr
from .plugin import Vision


@dataclass(frozen=True, eq=False)
class Answer:
    """image: of the step `halted` (counted from 1), where the policy stops. With a clean image to compare with, all steps
    are taken: quality in dB, images, energies and the mean number of steps that a tile took, after each step."""

    image: npt.NDArray[Any]
    halted: int
    quality: list[float]
    images: list[npt.NDArray[Any]]
    energies: list[float]
    tile_steps: list[float]


def answer(plugin: Vision, image: npt.NDArray[Any], policy: str = "full", clean: Bytes | None = None) -> Answer:
    """Restore `image`, until `policy` halts or, with `clean`, to the last step all the same."""
    compiled = plugin.policy(policy)
    state = plugin.init_state({"image": image})
    table = np.empty((1, plugin.max_steps, len(plugin.signals)), np.float32)
    halted = 0
    quality, images, energies, tile_steps = [], [], [], []
    worked = np.zeros(len(state.seats))
    for index in range(plugin.max_steps):
        worked += [not plugin.rests(seat) for seat in state.seats]
        state = plugin.step(state, index)
        energies.append(plugin.energy(state))
        table[0, index] = [energies[-1], *plugin.read_signals(state)]
        tile_steps.append(float(worked.mean()))
        if clean is not None:
            images.append(plugin.result(state)["image"])
            quality.append(psnr(images[-1], clean))
        if not halted and plugin.halt(
            History(table, np.array([index + 1]), np.zeros(1), plugin.signals), compiled
        ):  # fmt: skip
            halted = index + 1
            if clean is None:
                break
    halted = halted or plugin.max_steps
    final = images[halted - 1] if clean is not None else plugin.result(state)["image"]
    plugin.release(state)
    return Answer(final, halted, quality, images, energies, tile_steps)
