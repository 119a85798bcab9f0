"""Round trips between two Python processes, transport by transport in turn: time, CPU use, and pages touched.

The measuring process is `ping`; each transport has a `pong` in a process of its own, which waits on a pipe, in the kernel,
while others are measured. Every answer is checked: pong adds 2 to what it read.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from sage_edge.bench.mailbox_links import TIMEOUT_S, Contestant, Link, LinkError, Touch, reader, touched, writer
from sage_edge.bench.mailbox_pages import Pages
from sage_edge.bench.timing import Latency

SIZES = (64, 4096, 1 << 20, 8 << 20)
MASK = (1 << 64) - 1
LEAST = 5  # exchanges of a block, however long they take
Progress = Callable[[str, float], None]


def touches(size: int) -> tuple[Touch, ...]:
    """The ways to touch a payload of `size` bytes that differ."""
    if size <= 64:
        return ("page", "full")
    return ("line", "page", "full") if size > 4096 else ("page", "full")


@dataclass(frozen=True)
class Block:
    """What pong is told: how payloads are touched and waited for. seconds: how long ping goes on, for at least LEAST exchanges.
    pages: one exchange only, and count the pages that are touched."""

    touch: Touch
    poll: bool
    seconds: float = 0.0
    pages: bool = False


def exchange(link: Link, block: Block, words: int, seconds: list[float]) -> None:
    """Ping's side of a block; appends the time of each round trip. Raises LinkError when an answer is not what it must be."""
    write, read, parts = writer(block.touch), reader(block.touch), touched(words, block.touch)
    least = 1 if block.pages else LEAST
    until = time.perf_counter() + block.seconds
    number, last = 0, False
    while not last:
        last = number + 1 >= least and time.perf_counter() >= until
        value = 2 * number + last  # an odd one ends the block
        began = time.perf_counter()
        link.send(write, value, block.poll)
        answer = link.receive(read, block.poll)
        seconds.append(time.perf_counter() - began)
        if answer != (value + 2) * parts & MASK:
            raise LinkError(
                f"message {number}: read {answer}, not {(value + 2) * parts}: the payload was torn or mixed up"
            )
        number += 1


def echo(link: Link, block: Block, words: int) -> None:
    """Pong's side of a block."""
    write, read, parts = writer(block.touch), reader(block.touch), touched(words, block.touch)
    value = 0
    while value % 2 == 0:
        value = link.receive(read, block.poll) // parts
        link.send(write, value + 2, block.poll)


def pong(control: Connection, contestant: Contestant, shared: Any, words: int, core: int | None) -> None:
    """The other process: one block after the other until the pipe is closed; answers with CPU seconds and pages touched."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    link = contestant.transport().open(shared, words, "pong")
    control.send(None)
    try:
        while (block := control.recv()) is not None:
            pages = Pages() if block.pages else None
            control.send(None)
            began = time.process_time()
            echo(link, block, words)
            control.send((time.process_time() - began, pages.touched() if pages else None))
    except EOFError:
        pass
    except LinkError as error:
        control.send(error)
    finally:
        link.close()


class Pair:
    """Ping's end of a link, and the process at the other end."""

    def __init__(self, contestant: Contestant, size: int, cores: tuple[int, int] | None) -> None:
        self.name = contestant.name
        self.words = size // 8
        self.transport = contestant.transport()
        self.shared = self.transport.prepare(self.words)
        self.link = self.transport.open(self.shared, self.words, "ping")
        context = multiprocessing.get_context("spawn")
        self.control, theirs = context.Pipe()
        core = cores[1] if cores else None
        self.process = context.Process(
            target=pong, args=(theirs, contestant, self.shared, self.words, core), daemon=True
        )
        self.process.start()
        theirs.close()
        self._reply()
        self.seconds: list[float] = []
        self.wall = self.cpu_ping = self.cpu_pong = 0.0

    def _reply(self) -> Any:
        if not self.control.poll(6 * TIMEOUT_S):
            raise LinkError(f"{self.name}: the other process does not answer")
        try:
            reply = self.control.recv()
        except EOFError:
            raise LinkError(f"{self.name}: the other process ended") from None
        if isinstance(reply, Exception):
            raise reply
        return reply

    def run(self, block: Block) -> int | None:
        """One block; with `pages`, the pages that both processes touched. Keeps times for `taken`."""
        self.control.send(block)
        self._reply()
        pages = Pages() if block.pages else None
        wall, cpu = time.perf_counter(), time.process_time()
        exchange(self.link, block, self.words, self.seconds)
        self.wall += time.perf_counter() - wall
        self.cpu_ping += time.process_time() - cpu
        mine = pages.touched() if pages else None
        cpu_pong, theirs = self._reply()
        self.cpu_pong += cpu_pong
        return None if mine is None or theirs is None else mine + theirs

    def taken(self) -> dict[str, Any]:
        """Latency of a round trip in ms, and CPU use (1 = one core) of each process, since the last call."""
        result = {
            "latency": asdict(Latency.of(self.seconds)), "cpu_ping": self.cpu_ping / self.wall,
            "cpu_pong": self.cpu_pong / self.wall,
        }  # fmt: skip
        self.seconds, self.wall, self.cpu_ping, self.cpu_pong = [], 0.0, 0.0, 0.0
        return result

    def close(self) -> None:
        with suppress(OSError):
            self.control.send(None)
        self.process.join(TIMEOUT_S)
        if self.process.is_alive():
            self.process.kill()
        self.control.close()
        self.link.close()
        self.transport.discard(self.shared)


def round_trips(
    contestants: tuple[Contestant, ...], seconds: float, sizes: tuple[int, ...], progress: Progress, rounds: int = 4
) -> dict[str, list[dict[str, Any]]]:
    """`trips`: a row for each transport, size, touch and way of waiting; `pages`: one for each transport and size.

    seconds: for each row of `trips`, over all `rounds`. Where there are two cores, ping and pong have one each.
    """
    before = os.sched_getaffinity(0)
    cores = (min(before), max(before)) if len(before) > 1 else None
    trips: list[dict[str, Any]] = []
    pages: list[dict[str, Any]] = []
    cells = [(size, touch, poll) for size in sizes for touch in touches(size) for poll in (True, False)]
    try:
        if cores:
            os.sched_setaffinity(0, {cores[0]})
        for size in sizes:
            with ExitStack() as stack:
                pairs = []
                for contestant in contestants:
                    pairs.append(Pair(contestant, size, cores))
                    stack.callback(pairs[-1].close)
                for _, touch, poll in (cell for cell in cells if cell[0] == size):
                    done = len(trips) / len(contestants) / len(cells)
                    progress(f"round trips of {size} bytes, {'polling' if poll else 'blocking'}", done)
                    trips += _in_turn(pairs, size, touch, poll, seconds, rounds)
                pages += [{"transport": pair.name, "bytes": size, "pages": _pages(pair)} for pair in pairs]
    finally:
        os.sched_setaffinity(0, before)
    return {"trips": trips, "pages": pages}


def _in_turn(
    pairs: list[Pair], size: int, touch: Touch, poll: bool, seconds: float, rounds: int
) -> list[dict[str, Any]]:  # fmt: skip
    """All pairs in turn, round after round, in blocks of seconds / rounds; a short one comes first and is not counted."""
    for pair in pairs:
        pair.run(Block(touch, poll))
        pair.taken()
    for _ in range(rounds):
        for pair in pairs:
            pair.run(Block(touch, poll, seconds / rounds))
    wait = "poll" if poll else "block"
    return [{"transport": pair.name, "bytes": size, "touch": touch, "wait": wait, **pair.taken()} for pair in pairs]


def _pages(pair: Pair, repeats: int = 5) -> float | None:
    """Median of the pages touched by both processes in one blocking round trip that touches one line at each end."""
    found = [pair.run(Block("line", False, pages=True)) for _ in range(repeats)]
    pair.taken()
    counted = [pages for pages in found if pages is not None]
    return float(np.median(counted)) if counted else None
