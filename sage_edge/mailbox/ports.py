"""The two kinds of port: the compiled classes, with iteration, asyncio and context managers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from sage_edge.mailbox import _native
from sage_edge.mailbox.errors import ClosedError, FullError
from sage_edge.mailbox.memory import MemoryKind
from sage_edge.mailbox.spec import PortSpec
from sage_edge.mailbox.view import PortStats, PortView
from sage_edge.mailbox.waiting import FifoWaiter, remaining

T = TypeVar("T")
P = TypeVar("P", bound="Receiving[Any]")


class Receiving(Generic[T]):
    """`for item in port`, `async for item in port`, `with port`: until the port is closed."""

    receive: Callable[..., T | None]
    receive_async: Callable[..., Awaitable[T | None]]
    close: Callable[[], None]

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            item = self.receive()
        except ClosedError:
            raise StopIteration from None
        assert item is not None  # no timeout
        return item

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        try:
            item = await self.receive_async()
        except ClosedError:
            raise StopAsyncIteration from None
        assert item is not None
        return item

    def __enter__(self: P) -> P:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class FocusPort(_native.FocusPort, Receiving[_native.Item]):
    """A focus port: tensors by descriptor, each item to one consumer. Opened by `Mailbox.focus`."""

    def __init__(
        self, arguments: dict[str, Any], spec: PortSpec, directory: Path, spin_us: float, memory: MemoryKind
    ) -> None:
        super().__init__(arguments)
        self.spec = spec
        self.directory = directory
        self.spin_us = spin_us
        self._memory = memory
        self._waiter: FifoWaiter | None = None
        memory.attach(self)

    async def receive_async(self, timeout: float | None = None) -> _native.Item | None:
        """As `receive`, without blocking the event loop and without a thread."""
        item = self.receive(0)
        left = remaining(timeout)
        while item is None and (seconds := left()) > 0:
            await self._fifo().wait(False, seconds)
            item = self.receive(0)
        return item

    async def loan_async(
        self, shape: Any = None, dtype: Any = None, *, trust: float = 1.0, timeout: float | None = None
    ) -> _native.Loan:
        """As `loan`, without blocking the event loop: with the policy `block` it waits for room as long as `timeout`."""
        left = remaining(timeout)
        while True:
            try:
                return self.loan(shape, dtype, trust=trust, timeout=0)
            except FullError:
                seconds = left()
                if self.spec.policy != "block" or seconds <= 0:
                    raise
                await self._fifo().wait(True, seconds)

    def stats(self) -> PortStats:
        """Counts, latency, owners: what `sage-edge mailbox ls` shows."""
        return _stats(self.directory, self.name)

    def close(self) -> None:
        """Give the port up. Loans and items that are still open keep their slots until they end."""
        if self._waiter is not None:
            self._waiter.close()
            self._waiter = None
        if not self.closed:
            self._memory.detach(self)
        super().close()

    def _fifo(self) -> FifoWaiter:
        if self._waiter is None:
            self._waiter = FifoWaiter(self)
        return self._waiter


class BroadcastPort(_native.BroadcastPort, Receiving[_native.Record]):
    """A broadcast port: small records, newest wins, everybody reads all. Opened by `Mailbox.broadcast`."""

    def __init__(self, arguments: dict[str, Any], spec: PortSpec, directory: Path, spin_us: float) -> None:
        super().__init__(arguments)
        self.spec = spec
        self.directory = directory
        self.spin_us = spin_us
        self._waiter: FifoWaiter | None = None

    async def receive_async(self, timeout: float | None = None) -> _native.Record | None:
        """As `receive`, without blocking the event loop and without a thread."""
        record = self.receive(0)
        left = remaining(timeout)
        while record is None and (seconds := left()) > 0:
            if self._waiter is None:
                self._waiter = FifoWaiter(self)
            await self._waiter.wait(False, seconds)
            record = self.receive(0)
        return record

    def stats(self) -> PortStats:
        """Counts, latency, owners: what `sage-edge mailbox ls` shows."""
        return _stats(self.directory, self.name)

    def close(self) -> None:
        """Give the port up; the producer's ring is free for another."""
        if self._waiter is not None:
            self._waiter.close()
            self._waiter = None
        super().close()


def _stats(directory: Path, name: str) -> PortStats:
    import os

    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return PortView(_native.Observer(descriptor, name), name).stats()
    finally:
        os.close(descriptor)
