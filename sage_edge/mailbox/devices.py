"""The memory kinds that a device sees: `shm+cuda` (the port's own file, registered) and `vmm` (device memory, by descriptor).

`vmm`: the first process that opens the port allocates; every process that has it open answers for it (exchange.py), so the
memory lives as long as anybody has the port open, and an item that waited in a port which nobody has open any more is gone.
Opening is one at a time, under a lock of the file system that ends with its holder.
"""

from __future__ import annotations

import fcntl
import functools
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sage_edge.errors import SageError
from sage_edge.mailbox import _native
from sage_edge.mailbox.cuda import CudaDriver
from sage_edge.mailbox.driver import Allocation, Driver, lacks_register, lacks_sharing
from sage_edge.mailbox.exchange import EVENT, MEMORY, Answer, Exchange, ask, note_closed, participants

if TYPE_CHECKING:
    from sage_edge.mailbox.ports import FocusPort

DLPACK_CPU, DLPACK_CUDA_HOST = 1, 3

make_driver: Callable[[], Driver] = CudaDriver  # tests put another one here


@functools.cache
def driver_of(make: Callable[[], Driver]) -> Driver:
    """This process's device: one for all ports."""
    return make()


class DeviceMemory:
    """What both kinds have in common: the driver, and events that other processes can ask for."""

    name = ""

    def __init__(self) -> None:
        self._exchange: Exchange | None = None
        self._events: dict[int, Any] = {}
        self._lock = threading.Lock()
        self.address = self.created = self.opened = 0
        self.index = -1

    @property
    def driver(self) -> Driver:
        return driver_of(make_driver)

    def probe(self) -> str | None:
        """None when this machine has the kind, else why not; never raises."""
        try:
            return self._lacks()
        except SageError as error:
            return str(error)

    def _lacks(self) -> str | None:
        raise NotImplementedError

    def event(self, slot: int) -> Any:
        """This process's event for a slot; other processes may ask for it by `slot + 1`."""
        with self._lock:
            if slot not in self._events:
                self._events[slot] = self.driver.new_event()
            return self._events[slot]

    def _until_unused(self, port: FocusPort, free: Callable[[], None]) -> None:
        """Call `free` when no loan, item or view of the port is left: each of them keeps the port object alive."""
        if _native.pinned(port):
            weakref.finalize(port, free)
        else:
            free()

    def _open(self, port: FocusPort) -> int:
        """Learn where the port is mapped; its size in bytes."""
        self.address, size, _, self.index, _, self.created = _native.mapping(port)
        _, self.opened = _native.participant(port, self.index)
        return size

    def _provide(self, what: int, number: int) -> Answer | None:
        if what != EVENT:
            return None
        with self._lock:
            event = self._events.get(number - 1)
            if event is None:
                return None
            return Answer(self.created, self.opened, handle=self.driver.event_handle(event))

    def detach(self, port: FocusPort) -> None:
        if self._exchange is not None:
            self._exchange.close()
            self._exchange = None
        with self._lock:
            for event in self._events.values():
                self.driver.synchronize_event(event)
            note_closed(port.directory, port.name, self.index, self.opened, time.monotonic_ns())
            for event in self._events.values():
                self.driver.close_event(event)
            self._events.clear()


class RegisteredMemory(DeviceMemory):
    """`shm+cuda`: cudaHostRegister of the mapped file. CPU and device see the same bytes; on Jetson it is the same DRAM."""

    name = "shm+cuda"

    def _lacks(self) -> str | None:
        return lacks_register(self.driver.facts())

    def attach(self, port: FocusPort) -> None:
        size = self._open(port)
        seen = self.driver.register(self.address, size)
        kind = DLPACK_CPU if self.driver.device_type == DLPACK_CPU else DLPACK_CUDA_HOST
        _native.place(port, payload=0, device_base=seen, device_type=kind, device=self.driver.device)
        try:
            self._exchange = Exchange(port.directory, port.name, self.index, self._provide)
        except BaseException:
            self.driver.unregister(self.address)
            raise

    def detach(self, port: FocusPort) -> None:
        super().detach(port)
        self._until_unused(port, functools.partial(self.driver.unregister, self.address))


class VmmMemory(DeviceMemory):
    """`vmm`: cuMemCreate, exported as a file descriptor. The CPU does not see it."""

    name = "vmm"

    def __init__(self) -> None:
        super().__init__()
        self._allocation: Allocation | None = None
        self._payload = 0

    def _lacks(self) -> str | None:
        return lacks_sharing(self.driver.facts())

    def attach(self, port: FocusPort) -> None:
        self._open(port)
        bytes_wanted = port.spec.depth * _slot_bytes(port)
        with _alone(port.directory / f".exchange.{port.name}@lock"):
            self._allocation = self._adopt(port, bytes_wanted)
            fresh = self._allocation is None
            if self._allocation is None:
                self._allocation = self.driver.allocate(bytes_wanted)
            self._payload = self.driver.map(self._allocation)
            device = self.driver
            try:
                _native.place(
                    port, payload=self._payload, device_base=0, device_type=device.device_type, device=device.device
                )
                if fresh:
                    _drain(port)
                self._exchange = Exchange(port.directory, port.name, self.index, self._provide)
            except BaseException:
                device.unmap(self._payload, self._allocation)
                raise

    def detach(self, port: FocusPort) -> None:
        super().detach(port)
        if self._allocation is not None:
            self._until_unused(port, functools.partial(self.driver.unmap, self._payload, self._allocation))
            self._allocation = None

    def _adopt(self, port: FocusPort, size: int) -> Allocation | None:
        """The allocation that others use already, or None when nobody has one. DeviceError when somebody should but is silent."""
        for index in participants(port.directory, port.name):
            answer = None if index == self.index else ask(port.directory, port.name, index, MEMORY)
            if answer is None or answer.descriptor < 0:
                continue
            try:
                if answer.created == self.created:  # else: of a port of the same name that was removed
                    return self.driver.adopt(answer.descriptor, size)
            finally:
                os.close(answer.descriptor)
        return None

    def _provide(self, what: int, number: int) -> Answer | None:
        allocation = self._allocation
        if what != MEMORY or allocation is None:
            return super()._provide(what, number)
        return Answer(self.created, self.opened, size=allocation.size, descriptor=self.driver.export(allocation))


def _slot_bytes(port: FocusPort) -> int:
    from sage_edge.mailbox import layout

    return layout.round_up(port.spec.slot_bytes, layout.HUGE_PAGE if port.spec.hugepages else layout.PAGE)


def _drain(port: FocusPort) -> None:
    """Take out what refers to memory that is gone with the last process that had it."""
    while True:
        with suppress(SageError):
            item = port.receive(0)
            if item is None:
                return
            item.release()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; a lock of flock(2) ends with its holder, however that ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
