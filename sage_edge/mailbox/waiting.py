"""Waiting at a port inside an event loop: a FIFO that the loop watches, no thread (LAYOUT.md section 7)."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
import weakref
from collections.abc import Callable
from typing import Protocol

SLICE_S = 0.05  # a peer killed between its change and its wake-up costs at most this


class _Port(Protocol):
    def _pending(self, space: bool) -> bool: ...
    def _open_fifo(self) -> int: ...
    def _arm_fifo(self, space: bool) -> None: ...


class FifoWaiter:
    """The FIFO of one port handle. Any number of coroutines of one loop may wait at once."""

    def __init__(self, port: _Port) -> None:
        self._fd = -1
        self._waiting: set[asyncio.Future[None]] = set()
        self._port = weakref.proxy(port)  # the port has us: a cycle would keep its slots until the next collection
        self._fd = port._open_fifo()

    async def wait(self, space: bool, seconds: float) -> None:
        """Return when there may be something to receive (space: room to loan), at the latest after 50 ms or `seconds`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        if not self._waiting:
            loop.add_reader(self._fd, self._wake)
        self._waiting.add(future)
        try:
            self._port._arm_fifo(space)
            if self._port._pending(space):  # it came before the FIFO was armed
                return
            timer = loop.call_later(min(seconds, SLICE_S), self._wake)
            try:
                await future
            finally:
                timer.cancel()
        finally:
            self._waiting.discard(future)
            if not self._waiting and self._fd >= 0:
                loop.remove_reader(self._fd)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # the timer, not a byte
            os.read(self._fd, 4096)
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    def close(self) -> None:
        """Whoever still waits looks again, and finds the port closed."""
        if self._fd >= 0:
            for future in self._waiting:
                future.get_loop().remove_reader(self._fd)
                if not future.done():
                    future.set_result(None)
            self._waiting.clear()
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()


def remaining(timeout: float | None) -> Callable[[], float]:
    """A function that says how many seconds of `timeout` are left (None: infinitely many)."""
    if timeout is None:
        return lambda: math.inf
    end = time.monotonic() + timeout
    return lambda: end - time.monotonic()
