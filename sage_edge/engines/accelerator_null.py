"""A device without hardware: memory is host memory, and a stream works only when somebody waits for it.

That laziness is the point. Whoever reads a result without waiting for its event sees what was there before; whoever
overwrites a buffer that enqueued work still needs spoils that work. New memory holds 0xFF bytes (NaN as float32), and
an address outside of live memory is an error. So the logic around an engine shows its mistakes without a GPU, and every
time. It also carries engines that run on the CPU, for which a queue is as good as a loop.
"""

from __future__ import annotations

import bisect
import ctypes
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from sage_edge.engines.accelerator import (
    Bytes,
    CaptureError,
    Device,
    DeviceInfo,
    Event,
    Graph,
    OutOfMemoryError,
    Pinned,
    Priority,
    Stream,
)

Work = Callable[[], None]
POISON = 0xFF


class NullMemory(Pinned):
    def __init__(self, device: NullDevice, nbytes: int) -> None:
        self.array = np.full(nbytes, POISON, np.uint8)
        self.address = self.array.ctypes.data
        self.nbytes = nbytes
        self._device = device

    def free(self) -> None:
        self._device.release(self)


class NullEvent(Event):
    def __init__(self, stream: NullStream) -> None:
        self._stream = stream
        self.reached = False

    def synchronize(self) -> None:
        while not self.reached:
            self._stream.work_once()

    def done(self) -> bool:
        return self.reached


class NullGraph(Graph):
    def __init__(self, work: list[Work]) -> None:
        self._work = work

    def launch(self, stream: Stream) -> None:
        assert isinstance(stream, NullStream)
        for item in self._work:
            stream.enqueue(item)

    def free(self) -> None:
        self._work = []


class NullStream(Stream):
    def __init__(self, device: NullDevice, handle: int) -> None:
        self.device = device
        self.handle = handle
        self._queue: deque[Work] = deque()
        self._capturing: list[Work] | None = None

    def enqueue(self, work: Work, touches: Sequence[tuple[int, int]] = ()) -> None:
        """Programs of this device enqueue their arithmetic here. touches: (address, bytes) that the work reads or writes.

        They must lie in live memory now, and still when the work is done.
        """

        def checked() -> None:
            for address, nbytes in touches:
                self.device.check(address, nbytes)
            work()

        for address, nbytes in touches:
            self.device.check(address, nbytes)
        (self._queue if self._capturing is None else self._capturing).append(checked)

    def work_once(self) -> None:
        """Do the oldest piece of work. A piece that raises is done: what came after it goes on, as on a GPU."""
        if not self._queue:
            raise RuntimeError("a wait for an event that nothing enqueued will reach: a deadlock on a GPU")
        self._queue.popleft()()

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self.enqueue(lambda: _move(target, source, nbytes), ((target, nbytes), (source, nbytes)))

    def upload(self, target: int, array: Bytes) -> None:
        staged = array.tobytes()
        self.enqueue(lambda: _move(target, staged, len(staged)), ((target, len(staged)),))

    def zero(self, target: int, nbytes: int) -> None:
        self.enqueue(lambda: _move(target, bytes(nbytes), nbytes), ((target, nbytes),))

    def record(self) -> NullEvent:
        event = NullEvent(self)

        def reach() -> None:
            event.reached = True

        self.enqueue(reach)
        return event

    def wait(self, event: Event) -> None:
        self.enqueue(event.synchronize)

    def synchronize(self) -> None:
        if self._capturing is not None:
            raise CaptureError("a wait while the stream is captured")
        while self._queue:
            self.work_once()

    def capture(self, work: Callable[[], None]) -> Graph:
        self._capturing = []
        try:
            work()
            return NullGraph(self._capturing)
        finally:
            self._capturing = None


def _move(target: int, source: int | bytes, nbytes: int) -> None:
    ctypes.memmove(target, source, nbytes)


class NullDevice(Device):
    """memory_bytes: allocations beyond it raise OutOfMemoryError, as on a device of that size."""

    def __init__(self, memory_bytes: int = 1 << 40) -> None:
        self.memory_bytes = memory_bytes
        self.allocations = 0
        self._live: dict[int, NullMemory] = {}
        self._starts: list[int] = []
        self._streams = 0

    def open(self) -> None: ...

    def close(self) -> None:
        self._live.clear()
        self._starts.clear()

    def enter_thread(self) -> None: ...

    @property
    def info(self) -> DeviceInfo:
        return DeviceInfo("null", "host memory", None, self.memory_bytes, None, None, True, {})

    def used_bytes(self) -> int:
        return sum(memory.nbytes for memory in self._live.values())

    def free_bytes(self) -> int:
        return self.memory_bytes - self.used_bytes()

    def allocate(self, nbytes: int) -> NullMemory:
        if nbytes > self.free_bytes():
            raise OutOfMemoryError(f"{nbytes} bytes wanted, {self.free_bytes()} of {self.memory_bytes} free")
        memory = NullMemory(self, nbytes)
        self.allocations += 1
        self._live[memory.address] = memory
        bisect.insort(self._starts, memory.address)
        return memory

    def pinned(self, nbytes: int) -> NullMemory:
        return self.allocate(nbytes)

    def release(self, memory: NullMemory) -> None:
        if self._live.get(memory.address) is memory:
            del self._live[memory.address]
            self._starts.remove(memory.address)

    def stream(self, priority: Priority) -> NullStream:
        self._streams += 1
        return NullStream(self, self._streams)

    def check(self, address: int, nbytes: int) -> None:
        """Raise RuntimeError unless the bytes lie within one live allocation (an illegal address on a GPU)."""
        index = bisect.bisect_right(self._starts, address) - 1
        owner = self._live[self._starts[index]] if index >= 0 else None
        if owner is None or address + nbytes > owner.address + owner.nbytes:
            raise RuntimeError(f"illegal address: {nbytes} bytes at {address:#x} are not within live memory")
