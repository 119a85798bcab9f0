"""Processes that are killed with SIGKILL at random moments, while they hand each other checked tensors and records.

    python -m tests.stress.mailbox_kills --kills 10000

Producers send on a focus port that blocks, on one that drops the oldest, and on a broadcast port; consumers receive from all
three, one of them in an event loop. Every payload carries its producer's run, a number and a CRC. At the end: no torn payload,
no item twice, no item of a run out of order, no slot lost, and never a standstill. Exit code 0 when all of that held, else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from sage_edge.mailbox import BroadcastPort, FocusPort, FullError, Item, Mailbox, PortSpec, PortTable

PAYLOAD = 16 * 1024
HEAD = struct.Struct("<III")  # run, number, CRC of what follows
TABLE = PortTable(
    {
        "block": PortSpec("focus", 8, dtype="uint8", shape=(None,), max_bytes=PAYLOAD, per_producer=4),
        "drop": PortSpec("focus", 6, dtype="uint8", shape=(None,), max_bytes=PAYLOAD, policy="drop-oldest"),
        "state": PortSpec("broadcast", 16, fields={"head": "(3,)u4", "body": "(29,)u4"}, producers=6),
    }
)
STANDSTILL_S = 20.0


@dataclass
class Report:
    """What happened. `errors` is empty when every promise held."""

    kills: int = 0
    seconds: float = 0.0
    received: int = 0
    records: int = 0
    reclaimed: int = 0
    dropped: int = 0
    leaked_slots: int = 0
    twice: int = 0
    errors: list[str] = field(default_factory=list)


def body(run: int, number: int, size: int) -> bytes:
    """Bytes that differ from item to item in every part."""
    return (run * 2654435761 + number * 40503).to_bytes(8, "little") * (size // 8)


def produce(run: int, seed: int) -> None:
    mailbox, rng = Mailbox("kills", TABLE), random.Random(seed)
    block, drop = mailbox.focus("block"), mailbox.focus("drop")
    state = mailbox.broadcast("state")
    record = np.zeros((), state.record_dtype)
    for number in range(1 << 31):
        port = block if rng.random() < 0.5 else drop
        content = body(run, number, 8 * rng.randrange(1, PAYLOAD // 8 - 1))
        try:
            with port.loan(len(content) + HEAD.size, timeout=0.2) as loan:
                loan.array[HEAD.size :] = np.frombuffer(content, np.uint8)
                if rng.random() < 0.1:
                    time.sleep(0.001)  # half written: a good moment to be killed
                loan.array[: HEAD.size] = np.frombuffer(HEAD.pack(run, number, zlib.crc32(content)), np.uint8)
                if rng.random() < 0.95:  # else the loan is cancelled by leaving the block
                    loan.send()
        except FullError:
            pass
        record["body"] = np.frombuffer(body(run, number, 116) + b"\0\0\0\0", np.uint32)
        record["head"] = run, number, zlib.crc32(record["body"].tobytes())
        state.send(record)


class Checker:
    """Checks what a consumer receives; writes what it got to `log` and what is wrong to `errors`."""

    def __init__(self, folder: Path, number: int) -> None:
        self.log = os.open(folder / f"{number}.received", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.errors = folder / f"{number}.errors"
        self.last: dict[tuple[str, int], int] = {}

    def fail(self, text: str) -> None:
        with self.errors.open("a") as file:
            file.write(text + "\n")
        os._exit(3)

    def item(self, port: str, item: Item) -> None:
        data = item.array.tobytes()
        run, number, crc = HEAD.unpack(data[: HEAD.size])
        if zlib.crc32(data[HEAD.size :]) != crc or data[HEAD.size :] != body(run, number, len(data) - HEAD.size):
            self.fail(f"{port}: torn payload of run {run}, number {number}")
        self.order(port, run, number)
        if number % 8 == 0:
            time.sleep(0.001)
        item.release()
        os.write(self.log, struct.pack("<II", run, number))

    def record(self, array: np.ndarray[tuple[()], np.dtype[np.void]]) -> None:
        run, number, crc = (int(n) for n in array["head"])
        if zlib.crc32(array["body"].tobytes()) != crc:
            self.fail(f"state: torn record of run {run}, number {number}")
        self.order("state", run, number)

    def order(self, port: str, run: int, number: int) -> None:
        if number <= self.last.get((port, run), -1):
            self.fail(f"{port}: run {run}: {number} after {self.last[port, run]}")
        self.last[port, run] = number


def consume(number: int, folder: Path) -> None:
    mailbox, checker = Mailbox("kills", TABLE), Checker(folder, number)
    block, drop = mailbox.focus("block"), mailbox.focus("drop")
    state = mailbox.broadcast("state")
    if number == 0:
        asyncio.run(_consume_async(checker, block, drop, state))
    while True:
        for name, port, timeout in (("block", block, 0.005), ("drop", drop, 0.0)):
            if (item := port.receive(timeout)) is not None:
                checker.item(name, item)
        while (record := state.receive(0)) is not None:
            checker.record(record.array)


async def _consume_async(checker: Checker, block: FocusPort, drop: FocusPort, state: BroadcastPort) -> None:
    async def items(name: str, port: FocusPort) -> None:
        async for item in port:
            checker.item(name, item)

    async def records() -> None:
        async for record in state:
            checker.record(record.array)

    await asyncio.gather(items("block", block), items("drop", drop), records())


class Crowd:
    """The worker processes: forked from a parent that has imported everything and opened nothing."""

    def __init__(self, producers: int, consumers: int, folder: Path, seed: int) -> None:
        self.producers, self.consumers, self.folder = producers, consumers, folder
        self.rng = random.Random(seed)
        self.workers: dict[int, int] = {}  # number → pid
        self.unreaped: list[int] = []
        self.runs = 0
        for number in range(producers + consumers):
            self.start(number)

    def start(self, number: int) -> None:
        self.runs += 1
        run, seed = self.runs, self.rng.randrange(1 << 30)
        pid = os.fork()
        if pid == 0:
            try:
                if number < self.producers:
                    produce(run, seed)
                else:
                    consume(number - self.producers, self.folder)
            except BaseException as error:
                (self.folder / f"{run}.crash").write_text(f"worker {number}: {type(error).__name__}: {error}")
            finally:
                os._exit(4)
        self.workers[number] = pid

    def kill_one(self) -> None:
        """SIGKILL to a random worker, and a new one in its place. Every second corpse stays a zombie for a while."""
        number = self.rng.randrange(len(self.workers))
        os.kill(self.workers[number], signal.SIGKILL)
        self.unreaped.append(self.workers[number])
        if self.rng.random() < 0.5 or len(self.unreaped) > 8:
            self.reap()
        self.start(number)

    def reap(self) -> None:
        for pid in self.unreaped:
            os.waitpid(pid, 0)
        self.unreaped.clear()

    def end(self) -> None:
        for pid in self.workers.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self.unreaped.append(pid)
        self.workers.clear()
        self.reap()


def complaints(folder: Path) -> list[str]:
    found = [line for file in sorted(folder.glob("*.errors")) for line in file.read_text().splitlines()]
    return found + [file.read_text() for file in sorted(folder.glob("*.crash"))]


def settle(mailbox: Mailbox, report: Report, folder: Path) -> None:
    """After everybody is dead: one opening of each port must bring every slot back; what waits must be whole."""
    checker = Checker(folder, 99)
    for name in ("block", "drop"):
        with mailbox.focus(name) as port:
            before = port.stats()
            while (item := port.receive(0)) is not None:
                checker.item(name, item)
            after = port.stats()
            report.leaked_slots += before.loaned + before.held + after.depth - after.free
            report.received += after.counts["received"]
            report.reclaimed += after.counts["reclaimed"]
            report.dropped += after.counts["dropped"]
            if after.counts["corrupt"]:
                report.errors.append(f"{name}: {after.counts['corrupt']} corrupt descriptors")
            if len(after.owners) != 1:
                report.errors.append(f"{name}: {len(after.owners) - 1} entries of the dead are left")
    with mailbox.broadcast("state") as state:
        stats = state.stats()
        report.records = stats.counts["received"]
        if stats.producers:
            report.errors.append(f"state: {stats.producers} rings of the dead are left")
    logs = [np.fromfile(file, np.uint64) for file in folder.glob("*.received")]
    taken = np.concatenate(logs) if logs else np.zeros(0, np.uint64)
    report.twice = len(taken) - len(np.unique(taken))


def stress(kills: int, producers: int, consumers: int, seed: int, pause_ms: float, verbose: bool = False) -> Report:
    """Run the whole; the ports live in a directory of their own that is removed afterwards."""
    report = Report()
    folder = Path(tempfile.mkdtemp(prefix="sage-edge-kills-"))
    memory = tempfile.mkdtemp(prefix="sage-edge-kills-", dir="/dev/shm")
    before = os.environ.get("SAGE_EDGE_SHM")
    os.environ["SAGE_EDGE_SHM"] = memory
    begin = time.monotonic()
    mailbox = Mailbox("kills", TABLE)
    crowd = Crowd(producers, consumers, folder, seed)
    try:
        progress, moved = -1, time.monotonic()
        while report.kills < kills and not report.errors:
            time.sleep(crowd.rng.random() * 2 * pause_ms / 1000)
            crowd.kill_one()
            report.kills += 1
            if report.kills % 50 == 0 or kills - report.kills < 1:
                report.errors += complaints(folder)
                counted = sum(mailbox.stats(name).counts["received"] for name in mailbox.names())
                if counted != progress:
                    progress, moved = counted, time.monotonic()
                elif time.monotonic() - moved > STANDSTILL_S:
                    report.errors.append(f"standstill: nothing was received for {STANDSTILL_S:.0f} s")
                if verbose:
                    print(f"\r{report.kills} kills, {counted} received ", end="", file=sys.stderr, flush=True)
        crowd.end()
        settle(mailbox, report, folder)
        report.errors += [text for text in complaints(folder) if text not in report.errors]
    finally:
        crowd.end()
        if before is None:
            del os.environ["SAGE_EDGE_SHM"]
        else:
            os.environ["SAGE_EDGE_SHM"] = before
        shutil.rmtree(memory, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
    if report.leaked_slots:
        report.errors.append(f"{report.leaked_slots} slots leaked")
    if report.twice:
        report.errors.append(f"{report.twice} items were received twice")
    report.seconds = time.monotonic() - begin
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10_000)
    parser.add_argument("--producers", type=int, default=4)
    parser.add_argument("--consumers", type=int, default=4)
    parser.add_argument("--pause-ms", type=float, default=5.0, help="mean time between two kills")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    report = stress(
        arguments.kills, arguments.producers, arguments.consumers, arguments.seed, arguments.pause_ms, verbose=True
    )
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(file=sys.stderr)
    print(json.dumps({**asdict(report), "cpu_seconds": round(cpu.ru_utime + cpu.ru_stime, 1)}, indent=2))
    return 1 if report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
