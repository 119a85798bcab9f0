"""What a port's memory asks of a device: register, allocate, share, order. The contract, and what was found on a machine.

Two drivers keep it: `sage_edge.mailbox.cuda.CudaDriver`, and `sage_edge.mailbox.null_driver.NullDriver`, which needs no device
and on which everything above is tested. Constructing a driver is the only thing that touches hardware.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from sage_edge.errors import SageError
from sage_edge.mailbox.spec import Memory

HANDLE_BYTES = 64  # an event's name for other processes (sizeof CUipcEventHandle, cuda.h)


class DeviceError(SageError):
    """A device is missing, cannot do what a memory kind needs, or failed; says which call and what to do (exit code 2)."""


@dataclass(frozen=True)
class DeviceFacts:
    """What a device can do. host_register: existing host memory can be mapped (cudaDevAttrHostRegisterSupported).
    native_atomics: CPU and GPU agree on compare-and-swap (cudaDevAttrHostNativeAtomicSupported): kernels may change slot words.
    shares_memory: allocations can be exported as file descriptors. shares_events: events can be opened by other processes.
    host_address: registered memory has the same address on both sides."""

    name: str
    host_register: bool
    native_atomics: bool
    shares_memory: bool
    shares_events: bool
    integrated: bool
    host_address: bool


@dataclass(frozen=True)
class Allocation:
    """Device memory: `handle` means something to the driver alone; size in bytes, rounded up by the driver."""

    handle: Any
    size: int


class Driver(Protocol):
    """A device, seen from one process. Calls raise DeviceError. `stream`: the driver's own handle, None: its default one."""

    device_type: int  # DLPack's: 1 CPU, 2 CUDA, 3 CUDA host
    device: int

    def facts(self) -> DeviceFacts: ...

    def register(self, address: int, size: int) -> int:
        """Make mapped host memory visible to the device; returns where the device sees it."""

    def unregister(self, address: int) -> None: ...

    def allocate(self, size: int) -> Allocation: ...

    def export(self, allocation: Allocation) -> int:
        """A new file descriptor that stands for the allocation in other processes; the caller closes it."""

    def adopt(self, descriptor: int, size: int) -> Allocation:
        """The allocation that another process exported; `descriptor` stays the caller's."""

    def map(self, allocation: Allocation) -> int: ...

    def unmap(self, address: int, allocation: Allocation) -> None:
        """Undo `map`, and free this process's share of the allocation."""

    def new_event(self) -> Any: ...

    def event_handle(self, event: Any) -> bytes:
        """HANDLE_BYTES that name the event in other processes."""

    def open_event(self, handle: bytes) -> Any:
        """The event of another process. DeviceError when that process is gone."""

    def close_event(self, event: Any) -> None: ...

    def record(self, event: Any, stream: Any) -> None:
        """The event is reached when all work so far in `stream` is done."""

    def wait(self, event: Any, stream: Any) -> None:
        """Work that `stream` gets from now on waits for the event; returns at once."""

    def synchronize_event(self, event: Any) -> None:
        """Wait here, in the CPU, for the event."""

    def synchronize(self, stream: Any) -> None:
        """Wait here, in the CPU, for all work in `stream`."""


def lacks_register(facts: DeviceFacts) -> str | None:
    """Why this device cannot carry the kind `shm+cuda`, or None."""
    return None if facts.host_register else f"{facts.name} cannot register host memory (compute capability below 7.2?)"


def lacks_sharing(facts: DeviceFacts) -> str | None:
    """Why this device cannot carry the kind `vmm`, or None."""
    wanted = (
        (facts.shares_memory, "file descriptors for its memory"),
        (facts.shares_events, "events for other processes"),
    )
    missing = [text for has, text in wanted if not has]
    return f"{facts.name} has no {' and no '.join(missing)}" if missing else None


def choose(facts: DeviceFacts | None) -> Memory:
    """The kind for tensors that CPU and GPU share on such a machine: registered host memory where both share DRAM (Jetson), the
    device's own memory where it can be shared, host memory else. One choice for a machine; ports.yaml may say otherwise."""
    if facts is None:
        return "shm"
    registers, shares = lacks_register(facts) is None, lacks_sharing(facts) is None
    if facts.integrated and registers:
        return "shm+cuda"
    if shares:
        return "vmm"
    return "shm+cuda" if registers else "shm"
