"""Attention: keeps the latest frames, hears what is salient, sends the tiles that deserve a look.

python attention.py NAMESPACE
"""

from __future__ import annotations

import sys
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

from sage_edge.mailbox import Mailbox
from sage_edge.mailbox.attend import Attendant
from sage_edge.mailbox.attention import FocusItem, TrustScheduler

if TYPE_CHECKING:
    import scene

    from sage_edge.mailbox import Item

HERE = Path(__file__).resolve().parent
FRAMES_HELD = 2  # of the six slots: the camera keeps the others


class Frames:
    """The frames that this process holds, by time of capture."""

    def __init__(self) -> None:
        self.items: OrderedDict[int, Item] = OrderedDict()
        self.torn = 0

    def add(self, item: Item) -> None:
        """Keep a frame, give the oldest back. A frame whose checksum is wrong would be a bug of the mailbox."""
        if zlib.crc32(item.array.data) != item.tag:
            self.torn += 1
            print(f"frame {item.generation}: torn", file=sys.stderr, flush=True)
        self.items[item.captured_ns] = item
        while len(self.items) > FRAMES_HELD:
            self.items.popitem(last=False)[1].release()

    def tile(self, item: FocusItem) -> scene.Image | None:
        """The pixels of a tile: every one at level 0, every second one in both directions at level 1."""
        frame = self.items.get(item.captured)
        if frame is None:
            return None
        row, column, height, width = item.rectangle
        step = 1 << item.level
        tile: scene.Image = frame.array[row : row + height : step, column : column + width : step]
        return tile


def main(namespace: str) -> None:
    mailbox = Mailbox(namespace, HERE / "ports.yaml")
    scheduler = TrustScheduler(top=5, budget=4.0, pin_ns=0, patience_ns=1_000_000_000, ttl_ns=200_000_000)
    held = Frames()
    with mailbox.focus("frames") as frames, mailbox.broadcast("salience") as salience, mailbox.focus("tiles") as tiles:
        attendant = Attendant(scheduler, salience, tiles, held.tile)
        for item in frames:
            held.add(item)
            attendant.tick()


if __name__ == "__main__":
    main(*sys.argv[1:])
