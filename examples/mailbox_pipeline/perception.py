"""Perception: looks into the tiles it is given for something bright, and says where it is.

python perception.py NAMESPACE
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import scene

from sage_edge.mailbox import Mailbox
from sage_edge.mailbox.attend import Tag

HERE = Path(__file__).resolve().parent
BRIGHT = 120
ENOUGH = 12  # bright pixels


def bright_spot(tile: scene.Image) -> tuple[float, float, int] | None:
    """Centre (row, column) of the bright pixels of a tile and their number; None when there are too few."""
    rows, columns = np.nonzero(tile > BRIGHT)
    if len(rows) < ENOUGH:
        return None
    return float(rows.mean()), float(columns.mean()), len(rows)


def main(namespace: str) -> None:
    mailbox = Mailbox(namespace, HERE / "ports.yaml")
    per_row = scene.WIDTH // scene.TILE
    with mailbox.focus("tiles") as tiles, mailbox.broadcast("objects") as objects:
        record = np.zeros((), objects.spec.record_dtype)
        for item in tiles:
            with item:
                tag = Tag.unpack(item.tag)
                found = bright_spot(item.array)
                captured = item.captured_ns
            if found is None:
                continue
            step = 1 << tag.level
            record["frame"], record["captured_ns"] = tag.frame, captured
            record["row"] = tag.place.tile // per_row * scene.TILE + found[0] * step
            record["column"] = tag.place.tile % per_row * scene.TILE + found[1] * step
            record["confidence"] = min(1.0, found[2] * step * step / 250)
            objects.send(record)


if __name__ == "__main__":
    main(*sys.argv[1:])
