"""One sender at full speed, N readers that look every millisecond: how many records leave, and how many arrive.

A record is 64 bytes; every transport may keep up to DEPTH of them for a reader. A reader that is too slow loses records and the
sender never waits: in the peers, too, the sender drops what a full reader cannot take.
"""

from __future__ import annotations

import importlib
import multiprocessing
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from sage_edge.bench.mailbox_links import TIMEOUT_S, Contestant, LinkError, Words

READERS = (1, 4, 8)
DEPTH = 1023  # the most that a port of ours keeps
RECORD_BYTES = 64
PAUSE_S = 1e-3
Progress = Callable[[str, float], None]


class Sender(Protocol):
    def send(self, number: int) -> None:
        """Publish a record whose first word is `number`, without waiting for any reader."""

    def close(self) -> None: ...


class Receiver(Protocol):
    def drain(self) -> Words:
        """The first words of all records that have arrived, without waiting for more."""

    def close(self) -> None: ...


class Caster(Protocol):
    """A way of sending records to many; `prepare` runs in the measuring process."""

    def prepare(self, readers: int) -> Any:
        """What sender and readers need; it is pickled for the readers."""

    def sender(self, shared: Any) -> Sender: ...

    def receiver(self, shared: Any, index: int) -> Receiver: ...

    def discard(self, shared: Any) -> None:
        """Remove what `prepare` made, once everybody has closed."""


_MODULES = {
    "sage_edge.bench.mailbox_ours": "sage_edge.bench.mailbox_ours",
    "sage_edge.bench.mailbox_peers": "sage_edge.bench.mailbox_broadcast_peers",
}


@dataclass(frozen=True)
class Read:
    """What a reader got: records, whether all of them came in order, CPU seconds."""

    records: int
    ordered: bool
    cpu_s: float


def caster(contestant: Contestant) -> Caster:
    """The contestant's way of broadcasting."""
    module, name = contestant.maker
    made: Caster = getattr(importlib.import_module(_MODULES[module]), f"{name}Cast")()
    return made


def read(control: Connection, contestant: Contestant, shared: Any, index: int, seconds: float) -> None:
    """A reader process: opens, says so, and after the word to go drains until the sender is done and nothing is left."""
    receiver = caster(contestant).receiver(shared, index)
    control.send(None)
    control.recv()
    began, last, records, ordered = time.process_time(), -1, 0, True
    until = time.monotonic() + seconds + 0.2
    while time.monotonic() < until:
        numbers = receiver.drain()
        if len(numbers):
            records += len(numbers)
            ordered &= int(numbers[0]) > last and bool((numbers[1:] > numbers[:-1]).all())
            last = int(numbers[-1])
        else:
            time.sleep(PAUSE_S)
    control.send(Read(records, ordered, time.process_time() - began))
    receiver.close()


def send(sender: Sender, seconds: float) -> int:
    """As many records as leave in `seconds`; the clock is asked every 64 records."""
    number, until = 0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        for _ in range(64):
            sender.send(number)
            number += 1
    return number


def broadcast(contestant: Contestant, readers: int, seconds: float) -> dict[str, Any]:
    """One transport with so many readers. Raises LinkError when a reader ends, or gets records out of order."""
    way = caster(contestant)
    context = multiprocessing.get_context("spawn")
    shared = way.prepare(readers)
    with ExitStack() as stack:
        stack.callback(way.discard, shared)
        sender = way.sender(shared)
        stack.callback(sender.close)
        controls = []
        for index in range(readers):
            mine, theirs = context.Pipe()
            process = context.Process(target=read, args=(theirs, contestant, shared, index, seconds), daemon=True)
            process.start()
            theirs.close()
            controls.append(mine)
            stack.callback(process.join, TIMEOUT_S)
        for control in controls:
            _reply(contestant, control)
        for control in controls:
            control.send(None)
        cpu, wall = time.process_time(), time.perf_counter()
        sent = send(sender, seconds)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        got: list[Read] = [_reply(contestant, control) for control in controls]
    if not all(one.ordered for one in got):
        raise LinkError(f"{contestant.name}: records of one sender arrived out of order, or twice")
    arrived = np.array([one.records for one in got])
    return {
        "transport": contestant.name, "readers": readers, "sent_per_s": sent / wall,
        "received_per_s": float(arrived.mean() / wall), "slowest_reader_per_s": float(arrived.min() / wall),
        "lost": float(1 - arrived.mean() / sent), "cpu_sender": cpu / wall,
        "cpu_readers": float(sum(one.cpu_s for one in got) / wall),
    }  # fmt: skip


def broadcasts(contestants: tuple[Contestant, ...], seconds: float, progress: Progress) -> list[dict[str, Any]]:
    """A row for each number of readers and each transport, one after the other."""
    cells = [(readers, contestant) for readers in READERS for contestant in contestants]
    rows = []
    for number, (readers, contestant) in enumerate(cells):
        progress(f"broadcast to {readers} readers", number / len(cells))
        rows.append(broadcast(contestant, readers, seconds))
    return rows


def _reply(contestant: Contestant, control: Connection) -> Any:
    if not control.poll(6 * TIMEOUT_S):
        raise LinkError(f"{contestant.name}: a reader does not answer")
    try:
        return control.recv()
    except EOFError:
        raise LinkError(f"{contestant.name}: a reader ended") from None
