"""The compiled core (C++17, nanobind). Times are CLOCK_MONOTONIC nanoseconds (`time.monotonic_ns`) or seconds as float.

A port object is used by one thread at a time (the GIL takes care of it, and is released while waiting).
"""

from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

Array = npt.NDArray[Any]
VERSION: int

class _Tensor:
    @property
    def slot(self) -> int: ...
    @property
    def generation(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A DLPack capsule without a copy; it counts as a reference to `array`. BufferError for a stream, device or copy."""
    def __dlpack_device__(self) -> tuple[int, int]: ...
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Only where a GPU sees the memory; AttributeError elsewhere, so that `hasattr` tells."""

class Loan(_Tensor):
    """A slot that this producer may write. Ends with `send` or `cancel`; leaving the `with` block without send cancels."""

    @property
    def array(self) -> Array:
        """The slot as a writable NumPy array of the loaned shape and dtype (not cleared). ClosedError after the end."""
    def send(
        self,
        view: Array | None = None,
        *,
        tag: int = 0,
        trust: float | None = None,
        captured_ns: int | None = None,
        ttl_ms: float | None = None,
        event: int = 0,
    ) -> int:
        """Hand the tensor over; returns its generation.

        view: send this view of `array` instead (same first element; up to 4 axes when strided). tag: 0..2^32-1, the
        sender's. trust: 0..1, default what the loan was asked with. captured_ns: default now. ttl_ms: default the port's,
        0 for ever. event: index of a stream or event (memory kinds with a device).

        Warns ViewsAliveWarning when `array` is referenced elsewhere. Raises InputError for a view that does not fit,
        ClosedError, StaleError when the slot is no longer ours.
        """
    def cancel(self) -> None:
        """Give the slot back unsent; after the end nothing. With `array` referenced elsewhere: when the last reference goes."""

class Item(_Tensor):
    """A received tensor. Its slot stays held until `release`, the end of the `with` block, or the object's death."""

    @property
    def tag(self) -> int: ...
    @property
    def trust(self) -> float: ...
    @property
    def captured_ns(self) -> int: ...
    @property
    def sent_ns(self) -> int: ...
    @property
    def ttl_ms(self) -> float: ...
    @property
    def event(self) -> int: ...
    @property
    def producer(self) -> int:
        """Index of the sender's handle among the port's participants."""
    @property
    def descriptor(self) -> bytes:
        """The 64 bytes of LAYOUT.md section 5; `layout.unpack_descriptor` reads them, `FocusPort.claim` takes them."""
    @property
    def array(self) -> Array:
        """The producer's bytes as a read-only NumPy array: no copy. ClosedError after release."""
    def release(self) -> bool:
        """Give the slot back. False (and a ViewsAliveWarning) when arrays are still referenced: it goes back with the last."""

class Record:
    """A broadcast record: a private copy."""

    @property
    def sent_ns(self) -> int: ...
    @property
    def producer(self) -> int:
        """Number of the ring it came from: one producer at a time."""
    @property
    def sequence(self) -> int:
        """Number of the record in its ring, from 0."""
    @property
    def lost(self) -> int:
        """How many records this reader lost between the one it received before and this one."""
    @property
    def data(self) -> bytes: ...
    @property
    def array(self) -> Array:
        """The record as a 0-d structured array over this object's memory."""
    def __getitem__(self, field: str) -> Any: ...

class _Port:
    def __init__(self, arguments: dict[str, Any]) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def closed(self) -> bool: ...
    @property
    def spin_us(self) -> float:
        """How long a wait spins before it sleeps, microseconds; infinity: it never sleeps."""
    @spin_us.setter
    def spin_us(self, value: float) -> None: ...
    def close(self) -> None: ...
    def _pending(self, space: bool = False) -> bool: ...
    def _open_fifo(self) -> int: ...
    def _arm_fifo(self, space: bool = False) -> None: ...

class FocusPort(_Port):
    device_base: int  # address at which a device sees the mapping; 0: not at all

    def loan(
        self,
        shape: tuple[int, ...] | int | None = None,
        dtype: npt.DTypeLike | None = None,
        *,
        trust: float = 1.0,
        timeout: float | None = None,
    ) -> Loan:
        """A slot to write. shape, dtype: default the port's. timeout: seconds, for the policy `block`; None waits for ever.

        Raises FullError (see there), InputError for a shape or dtype that the port does not take, ClosedError.
        """
    def receive(self, timeout: float | None = None) -> Item | None:
        """The oldest item, or None after `timeout` seconds (0: look once; None: wait for ever). Each goes to one consumer.

        Raises IntegrityError for an item whose descriptor is impossible (it is dropped), ClosedError.
        """
    def claim(self, descriptor: bytes) -> Item:
        """Exactly the waiting item with this descriptor. Raises StaleError when it is no longer there."""

class BroadcastPort(_Port):
    @property
    def lost(self) -> int:
        """How many records this reader lost in all."""
    @property
    def record_dtype(self) -> np.dtype[Any]: ...
    def send(self, record: Any) -> int:
        """Publish one record: anything with a buffer of exactly the record's size. Returns its number in the producer's ring.

        Never waits for a reader. Raises FullError (reason "producers") when all rings have living owners, InputError for
        another size, ClosedError.
        """
    def receive(self, timeout: float | None = None) -> Record | None:
        """The next record this reader has not seen (of one producer in order, producers in turn), or None after `timeout`."""
    def latest(self) -> Record | None:
        """The newest record of all producers, seen or not; does not move the reader. None when there is none yet."""

class Observer:
    """A read-only mapping of a port, for `view.py`."""

    def __init__(self, directory: int, name: str) -> None: ...
    def header(self) -> bytes: ...
    def tables(self) -> bytes: ...
    def copy_slot(self, slot: int) -> tuple[bytes, int, bytes] | None: ...
    def copy_record(self, ring: int, number: int) -> tuple[int, bytes] | None: ...
    @property
    def removed(self) -> bool: ...

def remove_port(directory: int, name: str) -> None: ...
def is_dead(identity: int) -> bool: ...
def own_identity() -> int: ...
def latency_bucket(ns: int) -> int: ...
def layout() -> dict[str, tuple[int, int]]: ...

# --- for memory kinds and device code (mailbox/python/device.cpp)

def mapping(port: FocusPort | BroadcastPort) -> tuple[int, int, int, int, int, int]:
    """(address, bytes, payload_offset, participant, identity, created_ns) of an open port."""

def participant(port: FocusPort, index: int) -> tuple[int, int]:
    """(identity, opened_ns) of an entry; identity 0: nobody."""

def pinned(port: FocusPort) -> bool:
    """Do loans, items or their views still refer to the mapping?"""

def place(port: FocusPort, *, payload: int, device_base: int, device_type: int, device: int) -> None:
    """Say where payloads lie: `payload` is the address of slot 0, 0 to leave them in the file; `device_base` is where a device
    sees the mapping, 0 when the payload's address is the device's own. device_type, device: DLPack's."""

def signal(port: FocusPort | BroadcastPort) -> None:
    """Wake whoever waits at the port, as after a change."""
