"""Other ways to hand a payload to another process, each as its own documentation would have it done.

What can be kept from one message to the next is kept: sockets, buffers, and array views of addresses that come again.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import queue
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from multiprocessing.queues import Queue
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np

from sage_edge.bench.mailbox_links import TIMEOUT_S, End, Link, LinkError, Read, Words, Write

SPINS = 1 << 12  # between two looks at the clock in a busy loop


def tries(what: str) -> Iterator[int]:
    """As many turns of a busy loop as fit into TIMEOUT_S; then LinkError."""
    until = time.monotonic() + TIMEOUT_S
    while time.monotonic() < until:
        yield from range(SPINS)
    raise silent(what)


def silent(what: str) -> LinkError:
    return LinkError(f"{what}: the other end did not answer within {TIMEOUT_S:.0f} s")


def words_at(address: int, words: int) -> Words:
    """A view of memory at an address; valid as long as the memory is mapped."""
    return np.ctypeslib.as_array((ctypes.c_uint64 * words).from_address(address))


class Iceoryx2:
    """Publish and subscribe with slices of bytes, loaned and written in place; an event service where the reader blocks."""

    def prepare(self, words: int) -> str:
        return f"sage-edge-bench/{uuid.uuid4().hex}"

    def open(self, shared: str, words: int, end: End) -> Link:
        return _Iceoryx2Link(shared, words, end)

    def discard(self, shared: str) -> None:
        """Services go with their last user."""


class _Iceoryx2Link:
    def __init__(self, name: str, words: int, end: End) -> None:
        import iceoryx2 as iox2

        iox2.set_log_level(iox2.LogLevel.Error)
        self.words = words
        self.timeout = iox2.Duration.from_millis(int(TIMEOUT_S * 1e3))
        self.node = iox2.NodeBuilder.new().create(iox2.ServiceType.Ipc)
        other: End = "pong" if end == "ping" else "ping"
        payload = iox2.Slice[ctypes.c_uint8]

        def service(which: str) -> Any:
            name_of = iox2.ServiceName.new(f"{name}/{which}")
            builder = self.node.service_builder(name_of).publish_subscribe(payload)
            return builder.payload_alignment(iox2.Alignment.new(64)).open_or_create()

        def event(which: str) -> Any:
            return self.node.service_builder(iox2.ServiceName.new(f"{name}/{which}")).event().open_or_create()

        self.services = [service(end), service(other), event(end), event(other)]
        self.publisher = self.services[0].publisher_builder().initial_max_slice_len(words * 8).create()
        self.subscriber = self.services[1].subscriber_builder().create()
        self.notifier = self.services[2].notifier_builder().create()
        self.listener = self.services[3].listener_builder().create()
        self.views: dict[int, Words] = {}

    def view(self, address: int) -> Words:
        found = self.views.get(address)
        if found is None:
            found = self.views[address] = words_at(address, self.words)
        return found

    def send(self, write: Write, value: int, poll: bool) -> None:
        loan = self.publisher.loan_slice_uninit(self.words * 8)
        write(self.view(loan.payload_ptr), value)
        loan.assume_init().send()
        if not poll:
            self.notifier.notify()

    def receive(self, read: Read, poll: bool) -> int:
        sample = self.subscriber.receive()
        if sample is None and poll:
            for _ in tries("iceoryx2"):
                sample = self.subscriber.receive()
                if sample is not None:
                    break
        while sample is None:
            # A notification may be that of a message which was found before; then there is nothing to receive yet.
            if not self.listener.timed_wait(self.timeout):
                raise silent("iceoryx2")
            sample = self.subscriber.receive()
        result = read(self.view(sample.payload_ptr))
        sample.delete()
        return result

    def close(self) -> None:
        for part in (self.publisher, self.subscriber, self.notifier, self.listener):
            part.delete()
        self.services.clear()


class ZeroMQ:
    """PAIR sockets over ipc; large payloads without the binding's own copy on either side."""

    def prepare(self, words: int) -> str:
        return tempfile.mkdtemp(prefix="sage-edge-bench-")

    def open(self, shared: str, words: int, end: End) -> Link:
        return _ZeroMQLink(f"ipc://{shared}/pair", words, end)

    def discard(self, shared: str) -> None:
        (Path(shared) / "pair").unlink(missing_ok=True)
        Path(shared).rmdir()


class _ZeroMQLink:
    def __init__(self, address: str, words: int, end: End) -> None:
        import zmq

        self.zmq = zmq
        self.context = zmq.Context()
        self.socket: Any = self.context.socket(zmq.PAIR)
        self.socket.setsockopt(zmq.RCVTIMEO, int(TIMEOUT_S * 1e3))
        self.socket.setsockopt(zmq.LINGER, 0)
        if end == "ping":
            self.socket.bind(address)
        else:
            self.socket.connect(address)
        self.out: Words = np.zeros(words, np.uint64)
        self.copy = words * 8 <= 1 << 16  # below, one copy is cheaper than the bookkeeping of none

    def send(self, write: Write, value: int, poll: bool) -> None:
        write(self.out, value)
        self.socket.send(self.out, copy=self.copy)

    def receive(self, read: Read, poll: bool) -> int:
        zmq = self.zmq
        try:
            if poll:
                for _ in tries("pyzmq"):
                    try:
                        message = self.socket.recv(zmq.NOBLOCK, copy=self.copy)
                        break
                    except zmq.Again:
                        pass
            else:
                message = self.socket.recv(copy=self.copy)
        except zmq.Again:
            raise silent("pyzmq") from None
        return read(np.frombuffer(message if self.copy else message.buffer, np.uint64))

    def close(self) -> None:
        self.socket.close()
        self.context.term()


class QueueAndMemory:
    """multiprocessing.shared_memory for the payload, multiprocessing.Queue for the word that it is there."""

    def prepare(self, words: int) -> dict[str, tuple[SharedMemory, Queue[int]]]:
        context = multiprocessing.get_context("spawn")
        return {end: (SharedMemory(create=True, size=words * 8), context.Queue()) for end in ("ping", "pong")}

    def open(self, shared: dict[str, tuple[SharedMemory, Queue[int]]], words: int, end: End) -> Link:
        return _QueueLink(shared[end], shared["pong" if end == "ping" else "ping"], words)

    def discard(self, shared: dict[str, tuple[SharedMemory, Queue[int]]]) -> None:
        for memory, _ in shared.values():
            memory.close()
            memory.unlink()


class _QueueLink:
    def __init__(
        self, ours: tuple[SharedMemory, Queue[int]], theirs: tuple[SharedMemory, Queue[int]], words: int
    ) -> None:
        self.queues = ours[1], theirs[1]
        self.out: Words | None = np.ndarray(words, np.uint64, ours[0].buf)
        self.into: Words | None = np.ndarray(words, np.uint64, theirs[0].buf)

    def send(self, write: Write, value: int, poll: bool) -> None:
        assert self.out is not None
        write(self.out, value)
        self.queues[0].put(0)

    def receive(self, read: Read, poll: bool) -> int:
        assert self.into is not None
        try:
            if poll:
                for _ in tries("multiprocessing.Queue"):
                    try:
                        self.queues[1].get_nowait()
                        break
                    except queue.Empty:
                        pass
            else:
                self.queues[1].get(timeout=TIMEOUT_S)
        except queue.Empty:
            raise silent("multiprocessing.Queue") from None
        return read(self.into)

    def close(self) -> None:
        self.out = self.into = None  # a mapping with views cannot be closed
        for one in self.queues:
            one.close()


class UnixSocket:
    """A stream socket pair; payloads are sent from, and received into, one buffer at each end."""

    def prepare(self, words: int) -> dict[str, socket.socket]:
        ping, pong = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        for one in (ping, pong):
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                one.setsockopt(socket.SOL_SOCKET, option, 4 << 20)
        return {"ping": ping, "pong": pong}

    def open(self, shared: dict[str, socket.socket], words: int, end: End) -> Link:
        return _SocketLink(shared[end], words)

    def discard(self, shared: dict[str, socket.socket]) -> None:
        for one in shared.values():
            one.close()


class _SocketLink:
    def __init__(self, connection: socket.socket, words: int) -> None:
        self.socket = connection
        self.out: Words = np.zeros(words, np.uint64)
        self.into: Words = np.zeros(words, np.uint64)
        self.view = self.into.data.cast("B")

    def send(self, write: Write, value: int, poll: bool) -> None:
        write(self.out, value)
        self.socket.settimeout(TIMEOUT_S)
        self.socket.sendall(self.out.data)

    def receive(self, read: Read, poll: bool) -> int:
        got, size = 0, len(self.view)
        self.socket.settimeout(0 if poll else TIMEOUT_S)
        for _ in tries("Unix socket"):
            try:
                count = self.socket.recv_into(self.view[got:])
                if not count:
                    raise LinkError("Unix socket: the other end has gone")
                got += count
                if got == size:
                    break
            except BlockingIOError:
                pass
            except TimeoutError:
                raise silent("Unix socket") from None
        return read(self.into)

    def close(self) -> None:
        self.view.release()
        self.socket.close()
