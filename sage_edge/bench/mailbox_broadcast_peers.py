"""Broadcasting with other means: publish and subscribe where there is one, a queue or socket for each reader where not."""

from __future__ import annotations

import ctypes
import multiprocessing
import queue
import socket
import struct
import tempfile
import uuid
from contextlib import suppress
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np

from sage_edge.bench.mailbox_broadcast import DEPTH, RECORD_BYTES
from sage_edge.bench.mailbox_links import Words
from sage_edge.bench.mailbox_peers import words_at

RECORD = struct.Struct(f"<Q{RECORD_BYTES - 8}x")
NUMBER = struct.Struct("<Q")


class Iceoryx2Cast:
    """Publish and subscribe with safe overflow: the newest DEPTH records stay."""

    def prepare(self, readers: int) -> tuple[str, int]:
        return f"sage-edge-bench/{uuid.uuid4().hex}", readers

    def sender(self, shared: tuple[str, int]) -> _Iceoryx2Sender:
        return _Iceoryx2Sender(*_service(*shared))

    def receiver(self, shared: tuple[str, int], index: int) -> _Iceoryx2Receiver:
        return _Iceoryx2Receiver(*_service(*shared))

    def discard(self, shared: tuple[str, int]) -> None:
        """The service goes with its last user."""


def _service(name: str, readers: int) -> tuple[Any, Any]:
    import iceoryx2 as iox2

    iox2.set_log_level(iox2.LogLevel.Error)
    node = iox2.NodeBuilder.new().create(iox2.ServiceType.Ipc)
    builder = node.service_builder(iox2.ServiceName.new(name)).publish_subscribe(iox2.Slice[ctypes.c_uint8])
    builder = builder.payload_alignment(iox2.Alignment.new(64)).enable_safe_overflow(True)
    builder = builder.subscriber_max_buffer_size(DEPTH).max_subscribers(readers).max_nodes(readers + 1)
    return node, builder.open_or_create()


class _Iceoryx2Sender:
    def __init__(self, node: Any, service: Any) -> None:
        self.keep = node, service
        self.publisher = service.publisher_builder().initial_max_slice_len(RECORD_BYTES).create()
        self.views: dict[int, Words] = {}

    def send(self, number: int) -> None:
        loan = self.publisher.loan_slice_uninit(RECORD_BYTES)
        address = loan.payload_ptr
        view = self.views.get(address)
        if view is None:
            view = self.views[address] = words_at(address, RECORD_BYTES // 8)
        view[0] = number
        loan.assume_init().send()

    def close(self) -> None:
        self.publisher.delete()


class _Iceoryx2Receiver:
    def __init__(self, node: Any, service: Any) -> None:
        self.keep = node, service
        self.subscriber = service.subscriber_builder().buffer_size(DEPTH).create()
        self.views: dict[int, Words] = {}

    def drain(self) -> Words:
        numbers = []
        while (sample := self.subscriber.receive()) is not None:
            address = sample.payload_ptr
            view = self.views.get(address)
            if view is None:
                view = self.views[address] = words_at(address, RECORD_BYTES // 8)
            numbers.append(view[0])
            sample.delete()
        return np.array(numbers, np.uint64)

    def close(self) -> None:
        self.subscriber.delete()


class ZeroMQCast:
    """PUB and SUB over ipc."""

    def prepare(self, readers: int) -> str:
        return tempfile.mkdtemp(prefix="sage-edge-bench-")

    def sender(self, shared: str) -> _ZeroMQSender:
        return _ZeroMQSender(f"ipc://{shared}/pub")

    def receiver(self, shared: str, index: int) -> _ZeroMQReceiver:
        return _ZeroMQReceiver(f"ipc://{shared}/pub")

    def discard(self, shared: str) -> None:
        (Path(shared) / "pub").unlink(missing_ok=True)
        Path(shared).rmdir()


class _ZeroMQSender:
    def __init__(self, address: str) -> None:
        import zmq

        self.context = zmq.Context()
        self.socket: Any = self.context.socket(zmq.PUB)
        self.socket.setsockopt(zmq.SNDHWM, DEPTH)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(address)

    def send(self, number: int) -> None:
        self.socket.send(RECORD.pack(number))

    def close(self) -> None:
        self.socket.close()
        self.context.term()


class _ZeroMQReceiver:
    def __init__(self, address: str) -> None:
        import zmq

        self.zmq = zmq
        self.context = zmq.Context()
        self.socket: Any = self.context.socket(zmq.SUB)
        self.socket.setsockopt(zmq.RCVHWM, DEPTH)
        self.socket.setsockopt(zmq.SUBSCRIBE, b"")
        self.socket.connect(address)

    def drain(self) -> Words:
        numbers = []
        try:
            while True:
                numbers.append(NUMBER.unpack_from(self.socket.recv(self.zmq.NOBLOCK))[0])
        except self.zmq.Again:
            return np.array(numbers, np.uint64)

    def close(self) -> None:
        self.socket.close()
        self.context.term()


class QueueAndMemoryCast:
    """A multiprocessing.Queue for each reader; a record is small, so it goes through the queue itself."""

    def prepare(self, readers: int) -> list[Queue[bytes]]:
        context = multiprocessing.get_context("spawn")
        return [context.Queue(DEPTH) for _ in range(readers)]

    def sender(self, shared: list[Queue[bytes]]) -> _QueueSender:
        return _QueueSender(shared)

    def receiver(self, shared: list[Queue[bytes]], index: int) -> _QueueReceiver:
        return _QueueReceiver(shared[index])

    def discard(self, shared: list[Queue[bytes]]) -> None:
        for one in shared:
            one.close()


class _QueueSender:
    def __init__(self, queues: list[Queue[bytes]]) -> None:
        self.queues = queues

    def send(self, number: int) -> None:
        record = RECORD.pack(number)
        for one in self.queues:
            with suppress(queue.Full):
                one.put_nowait(record)

    def close(self) -> None:
        for one in self.queues:
            one.cancel_join_thread()


class _QueueReceiver:
    def __init__(self, one: Queue[bytes]) -> None:
        self.queue = one

    def drain(self) -> Words:
        numbers = []
        try:
            while True:
                numbers.append(NUMBER.unpack_from(self.queue.get_nowait())[0])
        except queue.Empty:
            return np.array(numbers, np.uint64)

    def close(self) -> None:
        self.queue.close()


class UnixSocketCast:
    """A datagram socket pair for each reader."""

    def prepare(self, readers: int) -> list[tuple[socket.socket, socket.socket]]:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(readers)]
        for pair in pairs:
            for one in pair:
                one.setblocking(False)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        return pairs

    def sender(self, shared: list[tuple[socket.socket, socket.socket]]) -> _SocketSender:
        return _SocketSender([pair[0] for pair in shared])

    def receiver(self, shared: list[tuple[socket.socket, socket.socket]], index: int) -> _SocketReceiver:
        for other, pair in enumerate(shared):
            if other != index:
                pair[1].close()
            pair[0].close()
        return _SocketReceiver(shared[index][1])

    def discard(self, shared: list[tuple[socket.socket, socket.socket]]) -> None:
        for pair in shared:
            for one in pair:
                one.close()


class _SocketSender:
    def __init__(self, sockets: list[socket.socket]) -> None:
        self.sockets = sockets

    def send(self, number: int) -> None:
        record = RECORD.pack(number)
        for one in self.sockets:
            with suppress(BlockingIOError, ConnectionRefusedError):
                one.send(record)

    def close(self) -> None:
        """The pairs belong to whoever prepared them."""


class _SocketReceiver:
    def __init__(self, one: socket.socket) -> None:
        one.setblocking(False)
        self.socket = one

    def drain(self) -> Words:
        numbers = []
        try:
            while True:
                numbers.append(NUMBER.unpack_from(self.socket.recv(RECORD_BYTES))[0])
        except BlockingIOError:
            return np.array(numbers, np.uint64)

    def close(self) -> None:
        self.socket.close()
