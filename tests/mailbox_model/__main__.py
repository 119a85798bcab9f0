"""The models at sizes that take minutes: `python -m tests.mailbox_model` (the test suite runs smaller ones)."""

from __future__ import annotations

import sys
import time

from tests.mailbox_model.explore import explore
from tests.mailbox_model.focus import Focus
from tests.mailbox_model.ring import Ring
from tests.mailbox_model.waiting import Waiting

LARGE: dict[str, Focus | Ring | Waiting] = {
    "focus: 2 producers, 1 consumer, a kill and a restart": Focus(2, 1, 1, 1, 2, 3, 1, 1),
    "focus: 1 producer, 2 consumers, 2 sweepers, a kill": Focus(1, 2, 2, 2, 2, 3, 1),
    "focus: drop-oldest with a kill": Focus(2, 1, 1, 1, 1, 3, 1, drop_oldest=True),
    "focus: cancels, a tap, a kill and a restart": Focus(1, 1, 1, 2, 1, 2, 1, 1, cancels=True, taps=1),
    "ring: 4 cells, 2 writers, 2 readers, a kill": Ring(4, 2, 3, 2, 1, 1),
    "waiting: 3 signallers, 2 waiters, a kill": Waiting(3, 2, 1),
}


def main() -> int:
    for name, model in LARGE.items():
        begin = time.monotonic()
        result = explore(model.start(), model.successors, model.check, limit=8_000_000)  # type: ignore[arg-type]
        print(f"{name}: {result} ({time.monotonic() - begin:.0f} s)", flush=True)
        if result.violation:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
