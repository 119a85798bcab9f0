"""Peers for tests of the mailbox: forked processes that do something at a port, and are watched or killed."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sage_edge.mailbox import PortSpec, PortTable

TENSOR = PortSpec("focus", 4, dtype="uint8", shape=(64,))
RECORD = PortSpec("broadcast", 4, fields={"number": "u4", "values": "(4,)f4"}, producers=2)
TABLE = PortTable({"tensor": TENSOR, "record": RECORD})


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Poll until the condition holds. Fails after a time that is only long because the machine may be busy."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


class Peer:
    """A forked process that runs `work`; `go` lets it pass its next `pause()`."""

    def __init__(self, work: Callable[[Peer], object]) -> None:
        self._said, say = os.pipe()
        hear, self._tell = os.pipe()
        self.pid = os.fork()
        self.status: int | None = None
        if self.pid == 0:
            self._say, self._hear = say, hear
            code = 1
            try:
                work(self)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(say)
        os.close(hear)

    def pause(self, word: bytes = b"!") -> None:
        """In the peer: say that this point is reached, then wait for `go` (or for being killed)."""
        os.write(self._say, word)
        os.read(self._hear, 1)

    def reached(self) -> bytes:
        """In the test: wait until the peer is at its `pause`; the word it said. Empty when it has ended."""
        return os.read(self._said, 1)

    def go(self) -> None:
        os.write(self._tell, b".")

    def kill(self, reap: bool = True) -> None:
        os.kill(self.pid, signal.SIGKILL)
        if reap:
            self.join()
        else:  # it is a zombie as soon as the kernel is done with it
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def join(self) -> int:
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._said)
            os.close(self._tell)
        return self.status


@contextmanager
def peer(work: Callable[[Peer], object]) -> Iterator[Peer]:
    """A peer for the length of a block; it is killed at the end if it still runs."""
    process = Peer(work)
    try:
        yield process
    finally:
        if process.status is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
