"""What every way of moving tensors between two processes must do to be timed: the contract, and how payloads are touched.

A payload is an array of 64-bit words. How much of it is touched is one of three:
line    the first word: the cost of the transport alone
page    the first word of every 4 KB, which moves one cache line for each page
full    every word is written by the sender and summed by the receiver
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from sage_edge.device import version
from sage_edge.errors import SageError

Words = npt.NDArray[np.uint64]
Touch = Literal["line", "page", "full"]
End = Literal["ping", "pong"]
Write = Callable[[Words, int], None]
Read = Callable[[Words], int]

PAGE = 512  # words
TIMEOUT_S = 10.0


class LinkError(SageError):
    """A transport failed while it was measured (exit code 1)."""

    exit_code = 1


class Link(Protocol):
    """One end of a two-way connection for payloads of one size. `poll`: wait in a busy loop, not in the kernel.

    Both raise LinkError when the other end does not answer within TIMEOUT_S.
    """

    def send(self, write: Write, value: int, poll: bool) -> None:
        """Have `write` put `value` into a payload, where the transport can in its own memory, and send it."""

    def receive(self, read: Read, poll: bool) -> int:
        """Wait for the next payload, give what `read` makes of it, and hand the memory back."""

    def close(self) -> None: ...


class Transport(Protocol):
    """A way of moving payloads; `prepare` runs in the measuring process and `open` in both."""

    def prepare(self, words: int) -> Any:
        """What both ends need; it is pickled for the other process."""

    def open(self, shared: Any, words: int, end: End) -> Link: ...

    def discard(self, shared: Any) -> None:
        """Remove what `prepare` made, once both ends are closed."""


@dataclass(frozen=True)
class Contestant:
    """A transport by name. package: the distribution that it needs, None for the standard library and for ours.
    maker: module and class of its Transport, imported in whichever process uses it."""

    name: str
    maker: tuple[str, str]
    package: str | None = None

    @property
    def version(self) -> str | None:
        """Of its package; "" when it needs none, None when the package is missing."""
        return "" if self.package is None else version(self.package)

    def transport(self) -> Transport:
        module, name = self.maker
        made: Transport = getattr(importlib.import_module(module), name)()
        return made


_PEERS = "sage_edge.bench.mailbox_peers"
OURS = "sage-edge mailbox"
CONTESTANTS = (
    Contestant(OURS, ("sage_edge.bench.mailbox_ours", "Mailbox")),
    Contestant("iceoryx2", (_PEERS, "Iceoryx2"), "iceoryx2"),
    Contestant("pyzmq ipc", (_PEERS, "ZeroMQ"), "pyzmq"),
    Contestant("shared_memory + Queue", (_PEERS, "QueueAndMemory")),
    Contestant("Unix socket", (_PEERS, "UnixSocket")),
)


def writer(touch: Touch) -> Write:
    """Write a value into the words that `touch` names."""

    def line(words: Words, value: int) -> None:
        words[0] = value

    def page(words: Words, value: int) -> None:
        words[::PAGE] = value

    def full(words: Words, value: int) -> None:
        words[:] = value

    return {"line": line, "page": page, "full": full}[touch]


def reader(touch: Touch) -> Read:
    """The sum of the words that `touch` names: value x touched(words, touch), modulo 2^64."""
    if touch == "line":
        return lambda words: int(words[0])
    if touch == "page":
        return lambda words: int(words[::PAGE].sum()) if len(words) > PAGE else int(words[0])
    return lambda words: int(words.sum())


def touched(words: int, touch: Touch) -> int:
    """How many words of a payload are touched."""
    return {"line": 1, "page": -(words // -PAGE), "full": words}[touch]
