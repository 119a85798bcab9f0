"""The contract of a port, one suite for every kind of memory and every way to share it: one handle, two, two processes.

A new kind of memory joins by its name in `sage_edge.mailbox.memory.KINDS`; where its probe says no, it is skipped with the
reason.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sage_edge.errors import MissingDependencyError
from sage_edge.mailbox import BroadcastPort, FocusPort, FullError, Mailbox, PortSpec, StaleError
from sage_edge.mailbox.memory import KINDS, memory_kind

FOCUS = PortSpec("focus", 3, dtype="int32", shape=(None,), max_bytes=8192, policy="refuse")
RING = PortSpec("broadcast", 4, fields={"n": "i4"}, producers=2)
VARIANTS = [*((name, False) for name in KINDS), ("shm", True)]


class End:
    """One end of a port, here."""

    def __init__(self, focus: FocusPort, ring: BroadcastPort) -> None:
        self.focus, self.ring = focus, ring
        self.items: dict[int, Any] = {}
        self.loans: dict[int, Any] = {}

    def loan(self, length: int, value: int) -> int:
        """Loan and fill; a number that stands for it."""
        loan = self.focus.loan(length)
        loan.array[:] = value
        self.loans[id(loan)] = loan
        return id(loan)

    def send(self, loan: int, **how: Any) -> int:
        return self.loans.pop(loan).send(**how)  # type: ignore[no-any-return]

    def cancel(self, loan: int) -> None:
        self.loans.pop(loan).cancel()

    def receive(self, timeout: float = 0) -> tuple[int, list[int], int, int, bytes] | None:
        """A number that stands for the item, its values, tag, generation, descriptor."""
        item = self.focus.receive(timeout)
        if item is None:
            return None
        self.items[id(item)] = item
        return id(item), item.array.tolist(), item.tag, item.generation, item.descriptor

    def claim(self, descriptor: bytes) -> int:
        item = self.focus.claim(descriptor)
        self.items[id(item)] = item
        return id(item)

    def release(self, item: int) -> bool:
        return self.items.pop(item).release()  # type: ignore[no-any-return]

    def publish(self, n: int) -> int:
        return self.ring.send(np.array([(n,)], self.ring.record_dtype))

    def read(self, timeout: float = 0) -> tuple[int, int, int] | None:
        record = self.ring.receive(timeout)
        return None if record is None else (int(record["n"]), record.lost, record.producer)

    def latest(self) -> int | None:
        record = self.ring.latest()
        return None if record is None else int(record["n"])


class RemoteEnd:
    """The same, in a process of its own."""

    def __init__(self, mailbox: Mailbox, focus: PortSpec, ring: PortSpec) -> None:
        self.line, other = multiprocessing.Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self.line.close()  # else the end of the line never comes
            try:
                _serve(other, End(mailbox.focus("f", focus), mailbox.broadcast("r", ring)))
            finally:
                os._exit(0)
        other.close()
        self.publish_nothing()

    def publish_nothing(self) -> None:
        """A round trip: from here on the end is open."""
        self.latest()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **how: Any) -> Any:
            self.line.send((name, arguments, how))
            good, value = self.line.recv()
            if not good:
                raise value
            return value

        return call

    def end(self) -> None:
        self.line.close()
        os.waitpid(self.pid, 0)


def _serve(line: Connection, end: End) -> None:
    while True:
        try:
            name, arguments, how = line.recv()
        except EOFError:
            return
        try:
            line.send((True, getattr(end, name)(*arguments, **how)))
        except FullError as error:
            line.send((False, _portable(error)))
        except Exception as error:
            line.send((False, error))


class _portable:  # noqa: N801
    """An error with two arguments, which pickle would rebuild with one."""

    def __init__(self, error: FullError) -> None:
        self.arguments = error.reason, str(error)

    def __reduce__(self) -> Any:
        return FullError, self.arguments


@pytest.fixture(params=VARIANTS, ids=lambda v: v[0] + ("+hugepages" if v[1] else ""))
def specs(request: pytest.FixtureRequest) -> tuple[PortSpec, PortSpec]:
    name, hugepages = request.param
    try:
        memory_kind(name)
    except MissingDependencyError as error:
        pytest.skip(str(error))
    return replace(FOCUS, memory=name, hugepages=hugepages), RING


@pytest.fixture(params=["one handle", "two handles", "producer elsewhere", "consumer elsewhere"])
def ends(
    request: pytest.FixtureRequest, specs: tuple[PortSpec, PortSpec], mailbox_memory: Path
) -> Iterator[tuple[Any, Any]]:
    """Producer and consumer."""
    mailbox = Mailbox("conformance")
    focus, ring = specs
    remote = RemoteEnd(mailbox, focus, ring) if "elsewhere" in request.param else None
    here = End(mailbox.focus("f", focus), mailbox.broadcast("r", ring))
    if remote is not None:
        yield (remote, here) if request.param.startswith("producer") else (here, remote)
        remote.end()
    elif request.param == "one handle":
        yield here, here
    else:
        other = End(mailbox.focus("f", focus), mailbox.broadcast("r", ring))
        yield here, other
        other.focus.close()
        other.ring.close()
    here.focus.close()
    here.ring.close()


def states() -> tuple[int, int, int, int]:
    stats = Mailbox("conformance").stats("f")
    return stats.free, stats.loaned, stats.ready, stats.held


def test_loan_send_receive_release(ends: tuple[Any, Any]) -> None:
    producer, consumer = ends
    assert consumer.receive() is None
    loan = producer.loan(5, 7)
    assert states() == (2, 1, 0, 0)
    assert consumer.receive() is None  # what is not sent is not there
    generation = producer.send(loan, tag=3)
    assert states() == (2, 0, 1, 0)
    item, values, tag, seen, _ = consumer.receive()
    assert (values, tag, seen) == ([7] * 5, 3, generation)
    assert states() == (2, 0, 0, 1)
    assert consumer.receive() is None  # once
    assert consumer.release(item) is True
    assert states() == (3, 0, 0, 0)


def test_order_and_size_of_each_item(ends: tuple[Any, Any]) -> None:
    producer, consumer = ends
    for length in (1, 2048, 17):
        producer.send(producer.loan(length, length))
    for length in (1, 2048, 17):
        item, values, *_ = consumer.receive()
        assert values == [length] * length
        consumer.release(item)


def test_a_full_port_refuses_and_recovers(ends: tuple[Any, Any]) -> None:
    producer, consumer = ends
    for value in range(3):
        producer.send(producer.loan(1, value))
    with pytest.raises(FullError) as caught:
        producer.loan(1, 3)
    assert caught.value.reason == "full"
    held, values, *_ = consumer.receive()
    with pytest.raises(FullError):
        producer.loan(1, 3)  # a held slot is not free
    consumer.release(held)
    producer.cancel(producer.loan(1, 3))
    producer.send(producer.loan(1, 4))
    assert [consumer.receive()[1] for _ in range(3)] == [[1], [2], [4]]
    assert values == [0]


def test_a_cancelled_loan_was_never_there(ends: tuple[Any, Any]) -> None:
    producer, consumer = ends
    producer.cancel(producer.loan(4, 1))
    assert consumer.receive() is None
    assert states() == (3, 0, 0, 0)


def test_what_is_held_does_not_change(ends: tuple[Any, Any]) -> None:
    producer, consumer = ends
    producer.send(producer.loan(100, 1))
    item, before, *_ = consumer.receive()
    for value in range(2, 12):
        producer.send(producer.loan(100, value))
        other, values, *_ = consumer.receive()
        assert values == [value] * 100
        consumer.release(other)
    assert before == [1] * 100
    assert consumer.release(item) is True


def test_generations_rise_and_a_stale_descriptor_is_an_error(ends: tuple[Any, Any]) -> None:
    producer, consumer = ends
    last = 0
    descriptors = []
    for value in range(8):
        generation = producer.send(producer.loan(1, value))
        assert generation > last
        last = generation
        item, _, _, _, descriptor = consumer.receive()
        descriptors.append(descriptor)
        consumer.release(item)
    producer.send(producer.loan(1, 99))  # in a slot that some of them name
    for descriptor in descriptors:
        with pytest.raises(StaleError):
            consumer.claim(descriptor)
    assert consumer.receive()[1] == [99]


def test_time_to_live(ends: tuple[Any, Any]) -> None:
    producer, consumer = ends
    producer.send(producer.loan(1, 1), ttl_ms=1)
    producer.send(producer.loan(1, 2))
    time.sleep(0.01)
    assert consumer.receive()[1] == [2]
    assert consumer.receive() is None
    assert Mailbox("conformance").stats("f").counts["stale"] == 1


def test_broadcast_newest_wins(ends: tuple[Any, Any]) -> None:
    producer, consumer = ends
    assert consumer.read() is None
    assert consumer.latest() is None
    producer.publish(0)
    assert consumer.read() == (0, 0, 0)
    for n in range(1, 30):
        producer.publish(n)
    assert consumer.latest() == 29
    got = []
    while (record := consumer.read()) is not None:
        got.append(record)
    assert [n for n, _, _ in got] == list(range(30 - len(got), 30))
    assert len(got) >= RING.depth
    assert sum(lost for _, lost, _ in got) + len(got) == 29


def test_counts_and_owners(ends: tuple[Any, Any]) -> None:
    producer, consumer = ends
    for value in range(4):
        producer.send(producer.loan(1, value))
        consumer.release(consumer.receive()[0])
    stats = Mailbox("conformance").stats("f")
    assert (stats.counts["sent"], stats.counts["received"], stats.latency.count) == (4, 4, 4)
    assert sum(owner.counts["sent"] for owner in stats.owners if owner.sends) == 4
    assert sum(owner.counts["received"] for owner in stats.owners if owner.receives) == 4
    assert all(owner.alive for owner in stats.owners)
    quantile = stats.latency.quantile(0.5)
    assert quantile is not None
    assert 0 < quantile < 60e9
