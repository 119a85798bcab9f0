"""How processes that share a device port hand each other what a file cannot hold: descriptors of device memory, names of events.

Every process that has such a port open answers on a Unix socket beside the port's file, `.exchange.PORT@INDEX` (INDEX: its
participant), from one thread. A question is one datagram of 16 bytes, the answer one of 104, with at most one file
descriptor (SCM_RIGHTS, unix(7)). Both sides check that the other has the same user (SO_PEERCRED). The socket of a
process that was killed refuses connections, so the dead are told from the living without a timeout.
"""

from __future__ import annotations

import array
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sage_edge.mailbox.driver import HANDLE_BYTES, DeviceError

MEMORY, EVENT = 1, 2
ANSWER_S = 2.0  # how long a living process may take
_QUESTION = struct.Struct("<8sII")
_ANSWER = struct.Struct(f"<8sIIQQQ{HANDLE_BYTES}s")
_MAGIC = b"SAGEXCH1"
_SPAN = struct.Struct("<QQ")
_SPANS_KEPT = 256


@dataclass(frozen=True)
class Answer:
    """created: of the port's file (header, `created_ns`), so that a namesake is noticed. opened: when the answering participant
    opened the port (CLOCK_MONOTONIC ns). size: of the memory, bytes. handle: of the event. descriptor: of the memory, owned by
    who gets the answer; -1 without."""

    created: int
    opened: int
    size: int = 0
    handle: bytes = b""
    descriptor: int = -1


Provide = Callable[
    [int, int], Answer | None
]  # (MEMORY or EVENT, index) -> answer; the descriptor is closed after sending


def socket_name(port: str, index: int) -> str:
    return f".exchange.{port}@{index}"  # no port has an @ in its name


class Exchange:
    """Answers questions until closed. directory: of the port's namespace. Raises OSError when the socket cannot be made."""

    def __init__(self, directory: Path, port: str, index: int, provide: Provide) -> None:
        self._provide = provide
        self._path = directory / socket_name(port, index)
        self._path.unlink(missing_ok=True)  # of a dead process: the participant's index is ours now
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with _short(directory) as short:
            self._socket.bind(f"{short}/{self._path.name}")
        self._path.chmod(0o600)
        self._socket.listen(16)
        self._thread = threading.Thread(target=self._serve, name=f"exchange {port}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering; returns when the thread has ended."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._thread.join()
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, suppress(OSError, ValueError):
                connection.settimeout(ANSWER_S)
                if _same_user(connection):
                    self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        question = connection.recv(_QUESTION.size)
        if len(question) != _QUESTION.size:
            return
        magic, what, index = _QUESTION.unpack(question)
        if magic != _MAGIC:
            return
        found = self._provide(what, index)
        if found is None:
            connection.send(_ANSWER.pack(_MAGIC, 0, 0, 0, 0, 0, b""))
            return
        try:
            data = _ANSWER.pack(_MAGIC, 1, 0, found.created, found.opened, found.size, found.handle)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [found.descriptor]))]
            connection.sendmsg([data], rights if found.descriptor >= 0 else [])
        finally:
            if found.descriptor >= 0:
                os.close(found.descriptor)


def ask(directory: Path, port: str, index: int, what: int, number: int = 0) -> Answer | None:
    """What participant `index` of `port` says; None when nobody is there (any more), or it has no such thing.

    Raises DeviceError when somebody is there and does not answer: a stopped process must not be taken for a dead one.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(ANSWER_S)
        try:
            with _short(directory) as short:
                connection.connect(f"{short}/{socket_name(port, index)}")
            if not _same_user(connection):
                raise DeviceError(f"port {port}: the socket of participant {index} belongs to another user")
            connection.send(_QUESTION.pack(_MAGIC, what, number))
            data, ancillary, _, _ = connection.recvmsg(_ANSWER.size, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError, BrokenPipeError):
            return None
        except TimeoutError:
            raise DeviceError(
                f"port {port}: participant {index} holds the port's device memory but does not answer; is its process stopped?"
            ) from None
        descriptor = -1
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                (descriptor,) = struct.unpack("i", content[:4])
        if not data:  # it ended between our question and its answer
            return None
        if len(data) != _ANSWER.size or data[:8] != _MAGIC:
            if descriptor >= 0:
                os.close(descriptor)
            raise DeviceError(f"port {port}: participant {index} gave an answer that is none; is it another version?")
        _, known, _, created, opened, size, handle = _ANSWER.unpack(data)
        return Answer(created, opened, size, handle, descriptor) if known else None


def participants(directory: Path, port: str) -> list[int]:
    """The participants that have, or had, a socket."""
    prefix = socket_name(port, 0)[:-1]
    names = [path.name for path in directory.glob(f"{prefix}*")]
    return sorted(int(name[len(prefix) :]) for name in names if name[len(prefix) :].isdigit())


def _same_user(connection: socket.socket) -> bool:
    size = struct.calcsize("3i")
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return bool(user == os.geteuid())


def note_closed(directory: Path, port: str, index: int, opened: int, closed: int) -> None:
    """Leave word that participant `index` closed the port in order, all of its device work done (CLOCK_MONOTONIC ns)."""
    path = _closed(directory, port, index)
    with suppress(FileNotFoundError):
        if path.stat().st_size >= _SPANS_KEPT * _SPAN.size:  # the index is ours: nobody else writes here now
            kept = path.read_bytes()[-_SPANS_KEPT // 2 * _SPAN.size :]
            temporary = path.with_name(f"{path.name}.new")
            temporary.write_bytes(kept)
            temporary.replace(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.write(descriptor, _SPAN.pack(opened, closed))
    finally:
        os.close(descriptor)


def was_closed(directory: Path, port: str, index: int, at: int) -> bool:
    """Did whoever was participant `index` at the time `at` close the port in order later? A killed process did not."""
    try:
        content = _closed(directory, port, index).read_bytes()
    except FileNotFoundError:
        return False
    whole = len(content) // _SPAN.size * _SPAN.size
    return any(opened <= at <= closed for opened, closed in _SPAN.iter_unpack(content[:whole]))


def _closed(directory: Path, port: str, index: int) -> Path:
    return directory / f"{socket_name(port, index)}.closed"


@contextmanager
def _short(directory: Path) -> Iterator[str]:
    """A name for a directory that leaves room in the 108 bytes of a socket's address."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
