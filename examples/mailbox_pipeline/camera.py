"""The camera: reads image files at its rate, writes each frame in place into a slot, broadcasts how salient each tile is.

python camera.py NAMESPACE FOLDER [FPS]
"""

from __future__ import annotations

import sys
import time
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import scene

from sage_edge.mailbox import Mailbox
from sage_edge.mailbox.attention import SALIENCE, snarc_score

HERE = Path(__file__).resolve().parent
WEIGHTS = (2.0, 1.0, 1.0, 4.0, 0.0)  # surprise, novelty, arousal, reward, conflict
TILE_ROWS, TILE_COLUMNS = scene.HEIGHT // scene.TILE, scene.WIDTH // scene.TILE


class Salience:
    """How much each tile deserves a look, from the last two frames and a slow mean."""

    def __init__(self) -> None:
        self.before: npt.NDArray[np.float32] | None = None
        self.mean: npt.NDArray[np.float32] | None = None

    def records(self, image: scene.Image, frame: int, captured_ns: int) -> npt.NDArray[np.void]:
        """SALIENCE [48]: surprise: change since the last frame; novelty: distance from the slow mean; arousal: contrast;
        reward: how bright the brightest pixel is, which is what this robot looks for."""
        tiles = image.reshape(TILE_ROWS, scene.TILE, TILE_COLUMNS, scene.TILE).transpose(0, 2, 1, 3).astype(np.float32)
        tiles = tiles.reshape(TILE_ROWS * TILE_COLUMNS, -1) / 255
        level = tiles.mean(1)
        before = level if self.before is None else self.before
        mean = level if self.mean is None else self.mean
        self.before, self.mean = level, 0.95 * mean + 0.05 * level
        out = np.zeros(len(tiles), SALIENCE)
        out["tile"], out["frame"], out["captured_ns"] = np.arange(len(tiles)), frame, captured_ns
        out["cost"], out["trust"] = 1.0, 1.0
        out["surprise"] = np.clip(8 * np.abs(level - before), 0, 1)
        out["novelty"] = np.clip(8 * np.abs(level - mean), 0, 1)
        out["arousal"] = np.clip(4 * tiles.std(1), 0, 1)
        out["reward"] = tiles.max(1) ** 2
        out["row"] = np.repeat(np.arange(TILE_ROWS) * scene.TILE, TILE_COLUMNS)
        out["column"] = np.tile(np.arange(TILE_COLUMNS) * scene.TILE, TILE_ROWS)
        out["height"] = out["width"] = scene.TILE
        out["score"] = snarc_score(out, WEIGHTS)
        return out


def main(namespace: str, folder: str, fps: str = "30") -> None:
    mailbox = Mailbox(namespace, HERE / "ports.yaml")
    images = scene.load(Path(folder))
    salience = Salience()
    period = 1e9 / float(fps)
    with mailbox.focus("frames") as frames, mailbox.broadcast("salience") as broadcast:
        while True:
            # The frame's number is that of the time, not of this process: a restarted camera goes on where the world is.
            now = time.monotonic_ns()
            frame = int(now // period)
            image = images[frame % len(images)]
            with frames.loan() as slot:
                np.copyto(slot.array, image)  # a driver would write here by itself
                slot.send(tag=zlib.crc32(image.data), captured_ns=now)
            for record in salience.records(image, frame, now):
                broadcast.send(record)
            time.sleep(max(0.0, ((frame + 1) * period - time.monotonic_ns()) / 1e9))


if __name__ == "__main__":
    main(*sys.argv[1:])
