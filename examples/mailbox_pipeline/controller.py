"""The controller: turns towards what was seen, at a fixed rate; without news for a while it stops.

python controller.py NAMESPACE
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import scene

from sage_edge.mailbox import Mailbox

HERE = Path(__file__).resolve().parent
RATE_HZ = 50.0
GAIN = 0.5
BLIND_NS = 250_000_000


def main(namespace: str) -> None:
    mailbox = Mailbox(namespace, HERE / "ports.yaml")
    with mailbox.broadcast("objects") as objects, mailbox.broadcast("commands") as commands:
        command = np.zeros((), commands.spec.record_dtype)
        due = time.monotonic()
        moving = False
        while True:
            seen = []
            while (record := objects.receive(0)) is not None:
                seen.append(record.array)
            if seen:
                # A disc that lies over several tiles is seen in each of them: the mean by confidence, of the newest frame.
                newest = max(int(one["captured_ns"]) for one in seen)
                parts = [one for one in seen if int(one["captured_ns"]) == newest]
                weight = sum(float(one["confidence"]) for one in parts)
                row = sum(float(one["row"]) * float(one["confidence"]) for one in parts) / weight
                column = sum(float(one["column"]) * float(one["confidence"]) for one in parts) / weight
                command["frame"], command["captured_ns"] = parts[0]["frame"], newest
                command["pan"] = GAIN * (column / scene.WIDTH - 0.5)
                command["tilt"] = GAIN * (row / scene.HEIGHT - 0.5)
                moving = True
                commands.send(command)
            elif moving and time.monotonic_ns() - int(command["captured_ns"]) > BLIND_NS:
                command["pan"] = command["tilt"] = 0
                moving = False
                commands.send(command)
            due += 1 / RATE_HZ
            time.sleep(max(0.0, due - time.monotonic()))


if __name__ == "__main__":
    main(*sys.argv[1:])
