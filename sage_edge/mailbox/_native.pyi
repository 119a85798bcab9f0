"""The compiled core (C++17, nanobind). Times are CLOCK_MONOTONIC nanoseconds (`time.monotonic_ns`) or seconds as float.

A port object is used by one thread at a time (the GIL takes care of it, and is released while waiting).
"""

from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

class Loan:
    """A slot that this producer may write. Ends with `send` or `cancel`; leaving the `with` block without send cancels."""

    slot: int
    generation: int
    @property
    def array(self) -> Array:
        """The slot as a writable NumPy array of the loaned shape and dtype (not cleared). ClosedError after send."""
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

        view: send this view of `array` instead (same first element; up to 4 axes when strided). trust: 0..1, default what
        the loan was asked with. captured_ns: default now. ttl_ms: default the port's, 0 for ever.
        """
    def cancel(self) -> None: ...
    def __enter__(self) -> Loan: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

class Item:
    """A received tensor. Its slot stays held until `release`, the end of the `with` block, or the object's death."""

    slot: int
    generation: int
    tag: int
    trust: float
    captured_ns: int
    sent_ns: int
    ttl_ms: float
    event: int
    producer: int
    descriptor: bytes  # 64 bytes, LAYOUT.md section 5
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    @property
    def array(self) -> Array:
        """The producer's bytes as a read-only NumPy array: no copy. ClosedError after release."""
    def release(self) -> bool:
        """Give the slot back. False (and a ViewsAliveWarning) when arrays are still referenced: it goes back with the last."""
    def __enter__(self) -> Item: ...
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
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

class Record:
    """A broadcast record: a private copy. `lost`: how many of this reader's records were overwritten just before it."""

    sent_ns: int
    producer: int
    sequence: int
    lost: int
    data: bytes
    array: Array  # the record as a 0-d structured array: record.array["score"]
    def __getitem__(self, field: str) -> Any: ...

class FocusPort:
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
        """The oldest item, or None after `timeout` seconds (0: look once; None: wait for ever). Each goes to one consumer."""
    def claim(self, descriptor: bytes) -> Item:
        """Exactly the waiting item with this descriptor. Raises StaleError when it is no longer there."""
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...

class BroadcastPort:
    lost: int  # records this reader lost in all
    def send(self, record: Any) -> int:
        """Publish one record (anything with a buffer of exactly the record's size); returns its number in this producer's ring.

        Never waits for a reader. Raises FullError (reason "producers") when all rings have living owners.
        """
    def receive(self, timeout: float | None = None) -> Record | None:
        """The next record this reader has not seen (of one producer in order, producers in turn), or None after `timeout`."""
    def latest(self) -> Record | None:
        """The newest record of all producers, seen or not; does not move the reader. None when there is none yet."""
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...

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
