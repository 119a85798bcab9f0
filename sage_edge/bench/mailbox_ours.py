"""The mailbox as a contestant of its own benchmark: two focus ports for round trips, one broadcast port for broadcasts."""

from __future__ import annotations

import math
import uuid

import numpy as np

from sage_edge.bench.mailbox_broadcast import DEPTH, RECORD_BYTES
from sage_edge.bench.mailbox_links import TIMEOUT_S, End, Link, Read, Words, Write
from sage_edge.bench.mailbox_peers import silent
from sage_edge.mailbox import Mailbox as Ports
from sage_edge.mailbox import PortSpec

RECORD = PortSpec(kind="broadcast", depth=DEPTH, producers=1, fields={"words": f"({RECORD_BYTES // 8},)uint64"})


class Mailbox:
    """Loan, write in place, send; receive a view, release. Blocking waits sleep at once: no spinning before."""

    def prepare(self, words: int) -> str:
        return f"bench-{uuid.uuid4().hex}"

    def open(self, shared: str, words: int, end: End) -> Link:
        return _MailboxLink(shared, words, end)

    def discard(self, shared: str) -> None:
        clear(shared)


class _MailboxLink:
    def __init__(self, namespace: str, words: int, end: End) -> None:
        spec = PortSpec(kind="focus", dtype="uint64", shape=(words,), depth=4)
        ports = Ports(namespace)
        self.out = ports.focus(end, spec)
        self.into = ports.focus("pong" if end == "ping" else "ping", spec)
        self.poll: bool | None = None

    def send(self, write: Write, value: int, poll: bool) -> None:
        loan = self.out.loan()
        write(loan.array, value)
        loan.send()

    def receive(self, read: Read, poll: bool) -> int:
        if poll is not self.poll:
            self.poll = poll
            self.into.spin_us = math.inf if poll else 0.0
        item = self.into.receive(TIMEOUT_S)
        if item is None:
            raise silent("mailbox")
        result = read(item.array)
        item.release()
        return result

    def close(self) -> None:
        self.out.close()
        self.into.close()


class MailboxCast:
    """One broadcast port; a reader drains it."""

    def prepare(self, readers: int) -> str:
        return f"bench-{uuid.uuid4().hex}"

    def sender(self, shared: str) -> _MailboxSender:
        return _MailboxSender(shared)

    def receiver(self, shared: str, index: int) -> _MailboxReceiver:
        return _MailboxReceiver(shared)

    def discard(self, shared: str) -> None:
        clear(shared)


class _MailboxSender:
    def __init__(self, namespace: str) -> None:
        self.port = Ports(namespace).broadcast("records", RECORD)
        self.record: Words = np.zeros(RECORD_BYTES // 8, np.uint64)

    def send(self, number: int) -> None:
        self.record[0] = number
        self.port.send(self.record)

    def close(self) -> None:
        self.port.close()


class _MailboxReceiver:
    def __init__(self, namespace: str) -> None:
        self.port = Ports(namespace).broadcast("records", RECORD)

    def drain(self) -> Words:
        content = bytearray()
        while (record := self.port.receive(0)) is not None:
            content += record.data
        return np.frombuffer(bytes(content), np.uint64)[:: RECORD_BYTES // 8]

    def close(self) -> None:
        self.port.close()


def clear(namespace: str) -> None:
    """Remove all ports of a namespace that was made for a measurement."""
    ports = Ports(namespace)
    for name in ports.names():
        ports.remove(name)
