"""The device interface: what the logic around an engine needs of an accelerator, and nothing more.

    with NullDevice() as device:                     # or CudaDevice()
        stream = device.stream("normal")
        memory = device.allocate(1 << 20)
        stream.upload(memory.address, array)         # returns at once; the stream works in its own time
        event = stream.record()
        event.synchronize()

Two implementations: `accelerator_null` (host memory, streams that work only when somebody waits) and `accelerator_cuda`.
Addresses are plain integers, as TensorRT and ONNX Runtime take them. After tinygrad's devices: few methods, and a null
device on which the logic is tested (DESIGN.md, house rules).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeVar

import numpy.typing as npt

from sage_edge.errors import EngineError

D = TypeVar("D", bound="Device")
Priority = Literal["high", "normal"]
Bytes = npt.NDArray[Any]


class OutOfMemoryError(EngineError):
    """The device has no room for an allocation (exit code 1). Giving memory back and trying again makes sense."""


class CaptureError(EngineError):
    """A stream could not be captured as a graph; the work runs without one."""


@dataclass(frozen=True)
class DeviceInfo:
    """Facts about a device. capability: compute capability (major, minor), None where the notion does not exist.

    l2_bytes: second-level cache, None where unknown; integrated: shares its memory with the CPU, as on a Jetson.
    """

    kind: Literal["null", "cuda"]
    name: str
    capability: tuple[int, int] | None
    memory_bytes: int
    l2_bytes: int | None
    processors: int | None
    integrated: bool
    versions: dict[str, str]

    @property
    def key(self) -> str:
        """What an engine for this device depends on: GPUs of one name and capability take the same plan."""
        capability = f" sm_{self.capability[0]}{self.capability[1]}" if self.capability else ""
        return f"{self.kind}/{self.name}{capability}"


class Memory(ABC):
    """`nbytes` bytes on the device from `address` on; contents undefined. `free` may be called twice."""

    address: int
    nbytes: int

    @abstractmethod
    def free(self) -> None: ...


class Pinned(Memory):
    """Host memory that the device writes to by itself: `array` (uint8 [nbytes]) here, `address` there."""

    array: Bytes


class Event(ABC):
    """A point in a stream's work."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the stream has come to this point. Raises what the work before it raised."""

    @abstractmethod
    def done(self) -> bool:
        """Whether the stream has come to this point; never waits."""


class Graph(ABC):
    """Captured work that one call starts."""

    @abstractmethod
    def launch(self, stream: Stream) -> None: ...

    @abstractmethod
    def free(self) -> None: ...


class Stream(ABC):
    """A queue of work, done in order. Every method only enqueues, except those that say that they wait."""

    handle: int

    @abstractmethod
    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Device to device, or between device and pinned memory by its device address."""

    @abstractmethod
    def upload(self, target: int, array: Bytes) -> None:
        """Host to device. `array` (C-contiguous) may be changed as soon as this returns."""

    @abstractmethod
    def zero(self, target: int, nbytes: int) -> None: ...

    @abstractmethod
    def record(self) -> Event:
        """An event at the current end of the queue."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """Work enqueued from now on begins after `event`, which may belong to another stream."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for everything enqueued so far."""

    @abstractmethod
    def capture(self, work: Callable[[], None]) -> Graph:
        """What `work` enqueues on this stream, as a graph; nothing of it is done now. Raises CaptureError."""


class Device(ABC):
    """One device; nothing is touched before `open`. Not thread-safe, but any one thread at a time may use it."""

    def __enter__(self: D) -> D:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def open(self) -> None:
        """Raises MissingDependencyError when there is no driver, no binding or no device; it says which."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back. May be called twice."""

    @abstractmethod
    def enter_thread(self) -> None:
        """Make the device current for the calling thread; cheap."""

    @property
    @abstractmethod
    def info(self) -> DeviceInfo: ...

    @abstractmethod
    def free_bytes(self) -> int:
        """Memory that is free now, bytes."""

    @abstractmethod
    def allocate(self, nbytes: int) -> Memory:
        """Raises OutOfMemoryError."""

    @abstractmethod
    def pinned(self, nbytes: int) -> Pinned:
        """Mapped, page-locked host memory. Raises OutOfMemoryError."""

    @abstractmethod
    def stream(self, priority: Priority) -> Stream: ...
