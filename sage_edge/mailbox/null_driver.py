"""A device without hardware: memory files instead of device memory, a list of calls instead of a stream.

Everything above the driver contract is tested on it, between real processes: allocations pass as file descriptors, and an
event is a byte in a file that every process can see. A stream does its work only when told to (`NullStream.run`), so that a
test decides how far the "device" has come.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sage_edge.mailbox.driver import HANDLE_BYTES, Allocation, DeviceError, DeviceFacts

WAIT_S = 30.0  # after which a wait for an event is an error


@dataclass
class NullStream:
    """Work in order. `run` does it; a wait for an event that is not reached stops there, as a real stream would."""

    work: list[Callable[[], bool]] = field(default_factory=list)

    def submit(self, call: Callable[[], object]) -> None:
        def always() -> bool:
            call()
            return True

        self.work.append(always)

    def run(self) -> None:
        """Do what can be done now."""
        while self.work and self.work[0]():
            self.work.pop(0)


@dataclass(frozen=True)
class NullEvent:
    """A file whose first byte counts records (modulo 256) and whose second byte is the last one that was reached."""

    path: Path

    def get(self) -> tuple[int, int]:
        try:
            recorded, reached = self.path.read_bytes()
        except FileNotFoundError as error:
            raise DeviceError("null device: the event is gone, with the process that made it") from error
        return recorded, reached

    def put(self, index: int, value: int) -> None:
        with self.path.open("r+b") as handle:
            handle.seek(index)
            handle.write(bytes([value]))


class NullDriver:
    """See the module. native_atomics and the other facts are those of this CPU: everything works."""

    device_type = 1
    device = 0

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="sage-edge-null-")
        self._maps: dict[int, mmap.mmap] = {}
        self.registered: dict[int, int] = {}

    def facts(self) -> DeviceFacts:
        return DeviceFacts("null device", True, True, True, True, True, True)

    def register(self, address: int, size: int) -> int:
        if address in self.registered:
            raise DeviceError("null device: this memory is registered already")
        self.registered[address] = size
        return address

    def unregister(self, address: int) -> None:
        if self.registered.pop(address, None) is None:
            raise DeviceError("null device: this memory is not registered")

    def allocate(self, size: int) -> Allocation:
        descriptor = os.memfd_create("sage-edge-null", os.MFD_CLOEXEC)
        rounded = -(size // -mmap.PAGESIZE) * mmap.PAGESIZE
        os.ftruncate(descriptor, rounded)
        return Allocation(descriptor, rounded)

    def export(self, allocation: Allocation) -> int:
        return os.dup(allocation.handle)

    def adopt(self, descriptor: int, size: int) -> Allocation:
        return Allocation(os.dup(descriptor), -(size // -mmap.PAGESIZE) * mmap.PAGESIZE)

    def map(self, allocation: Allocation) -> int:
        mapping = mmap.mmap(allocation.handle, allocation.size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        self._maps[address] = mapping
        return address

    def unmap(self, address: int, allocation: Allocation) -> None:
        del self._maps[address]  # unmapped with the last view
        os.close(allocation.handle)

    def new_event(self) -> NullEvent:
        handle, name = tempfile.mkstemp(dir=self._folder.name)
        os.write(handle, b"\0\0")
        os.close(handle)
        return NullEvent(Path(name))

    def event_handle(self, event: NullEvent) -> bytes:
        name = str(event.path).encode()
        if len(name) > HANDLE_BYTES:
            raise DeviceError(
                f"null device: {event.path} is longer than {HANDLE_BYTES} bytes; set TMPDIR to a shorter one"
            )
        return name.ljust(HANDLE_BYTES, b"\0")

    def open_event(self, handle: bytes) -> NullEvent:
        event = NullEvent(Path(handle.rstrip(b"\0").decode()))
        event.get()
        return event

    def close_event(self, event: NullEvent) -> None:
        if str(event.path).startswith(self._folder.name):
            event.path.unlink(missing_ok=True)

    def record(self, event: NullEvent, stream: NullStream | None) -> None:
        number = (event.get()[0] + 1) % 256
        event.put(0, number)
        if stream is None:
            event.put(1, number)
        else:
            stream.submit(lambda: event.put(1, number))

    def wait(self, event: NullEvent, stream: NullStream | None) -> None:
        number = event.get()[0]
        if stream is None:
            self._until(event, number)
        else:
            stream.work.append(lambda: event.get()[1] == number)

    def synchronize_event(self, event: NullEvent) -> None:
        self._until(event, event.get()[0])

    def synchronize(self, stream: NullStream | None) -> None:
        until = time.monotonic() + WAIT_S
        while stream is not None and stream.work:
            stream.run()
            if time.monotonic() > until:
                raise DeviceError(f"null device: a stream waited for {WAIT_S:.0f} s")
            time.sleep(0.0005)

    def _until(self, event: NullEvent, number: int) -> None:
        until = time.monotonic() + WAIT_S
        while event.get()[1] != number:
            if time.monotonic() > until:
                raise DeviceError(f"null device: an event was not reached for {WAIT_S:.0f} s")
            time.sleep(0.0005)
