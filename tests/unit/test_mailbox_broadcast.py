"""The broadcast port in one process: newest wins, readers know what they lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from sage_edge.errors import InputError, IntegrityError
from sage_edge.mailbox import BroadcastPort, ClosedError, FullError, Mailbox, PortSpec, Record
from sage_edge.mailbox import layout as bytes_of
from sage_edge.specs import Array
from tests.mailbox_peers import RECORD


@pytest.fixture
def mailbox(mailbox_memory: Path) -> Mailbox:
    return Mailbox("test")


@pytest.fixture
def port(mailbox: Mailbox) -> Iterator[BroadcastPort]:
    with mailbox.broadcast("r", RECORD) as port:
        yield port


def record(port: BroadcastPort, number: int) -> Array:
    out: Array = np.zeros((), port.record_dtype)
    out["number"], out["values"] = number, number / 2
    return out


def receive(port: BroadcastPort) -> Record:
    got = port.receive(0)
    assert got is not None
    return got


def test_a_record_goes_to_every_reader(mailbox: Mailbox, port: BroadcastPort) -> None:
    with mailbox.broadcast("r", RECORD) as a, mailbox.broadcast("r", RECORD) as b:
        assert port.send(record(port, 7)) == 0
        for reader in (a, b, port):
            got = receive(reader)
            assert got["number"] == 7
            assert got["values"].tolist() == [3.5] * 4
            assert got.array.shape == ()
            assert got.data == record(port, 7).tobytes()
            assert (got.sequence, got.lost, got.producer) == (0, 0, 0)
            assert reader.receive(0) is None


def test_a_record_is_a_private_copy(port: BroadcastPort) -> None:
    port.send(record(port, 1))
    first = receive(port)
    array = first.array
    for number in range(2, 40):
        port.send(record(port, number))
    assert first["number"] == 1
    array["number"] = 99
    assert first["number"] == 99  # its own memory, to write as one likes
    del first
    assert array["number"] == 99


def test_a_reader_begins_with_what_comes(mailbox: Mailbox, port: BroadcastPort) -> None:
    port.send(record(port, 1))
    with mailbox.broadcast("r", RECORD) as late:
        assert late.receive(0) is None
        latest = late.latest()
        assert latest is not None
        assert latest["number"] == 1
        port.send(record(port, 2))
        assert receive(late)["number"] == 2


def test_a_slow_reader_knows_how_many_it_lost(mailbox: Mailbox, port: BroadcastPort) -> None:
    with mailbox.broadcast("r", RECORD) as reader:
        for number in range(20):
            port.send(record(port, number))
        first = receive(reader)
        kept = [first]
        while (got := reader.receive(0)) is not None:
            kept.append(got)
        assert len(kept) >= RECORD.depth
        assert [int(got["number"]) for got in kept] == list(range(20 - len(kept), 20))
        assert first.lost == 20 - len(kept) == reader.lost
        assert all(got.lost == 0 for got in kept[1:])
        assert mailbox.stats("r").counts["lost"] == reader.lost


def test_producers_do_not_drown_each_other(mailbox: Mailbox, port: BroadcastPort) -> None:
    with mailbox.broadcast("r", RECORD) as quiet, mailbox.broadcast("r", RECORD) as reader:
        quiet.send(record(port, 1000))
        for number in range(50):
            port.send(record(port, number))
        numbers: dict[int, list[int]] = {}
        while (got := reader.receive(0)) is not None:
            numbers.setdefault(got.producer, []).append(int(got["number"]))
        assert [1000] in numbers.values()
        assert next(n for n in numbers.values() if n != [1000])[-1] == 49


def test_more_producers_than_rings(mailbox: Mailbox, port: BroadcastPort) -> None:
    with mailbox.broadcast("r", RECORD) as second, mailbox.broadcast("r", RECORD) as third:
        port.send(record(port, 1))
        second.send(record(port, 2))
        with pytest.raises(FullError, match="all rings have living owners") as caught:
            third.send(record(port, 3))
        assert caught.value.reason == "producers"
        number = second.send(record(port, 4))
        second.close()
        assert third.send(record(port, 3)) == number + 1  # the ring goes on where its last owner left it


@pytest.mark.parametrize("data", [b"", b"short", b"x" * 21, np.zeros(6, "f4")])
def test_a_record_must_have_the_size(port: BroadcastPort, data: bytes) -> None:
    with pytest.raises(InputError, match="a record of 20 bytes was expected"):
        port.send(data)
    assert port.latest() is None


def test_things_without_bytes(port: BroadcastPort) -> None:
    with pytest.raises(TypeError):
        port.send(5)
    with pytest.raises((BufferError, ValueError)):
        port.send(np.zeros((20, 2), np.uint8)[:, 0])


@pytest.mark.parametrize("size", [1, 7, 8, 9, 255, 256])
def test_every_size(mailbox: Mailbox, size: int) -> None:
    spec = PortSpec("broadcast", 3, fields={"data": f"S{size}"}, producers=1)
    with mailbox.broadcast("s", spec) as port:
        for letter in b"abcdefgh":
            data = bytes([letter]) * size
            port.send(data)
            assert receive(port).data == data


def test_iteration_and_waiting(mailbox: Mailbox, port: BroadcastPort) -> None:
    def produce() -> None:
        with mailbox.broadcast("r", RECORD) as producer:
            for number in range(3):
                producer.send(record(port, number))

    thread = threading.Timer(0.05, produce)
    thread.start()
    assert [int(got["number"]) for got in islice(port, 3)] == [0, 1, 2]
    thread.join()
    threading.Timer(0.05, mailbox.remove, ("r",)).start()
    assert list(port) == []  # it ends with the port
    with pytest.raises(ClosedError, match="removed"):
        port.send(record(port, 1))


def test_closing_while_another_thread_waits(mailbox: Mailbox) -> None:
    port = mailbox.broadcast("r", RECORD)
    threading.Timer(0.05, port.close).start()
    with pytest.raises(ClosedError, match="while waiting"):
        port.receive(30)


def test_a_tap_sees_what_passes(mailbox: Mailbox, port: BroadcastPort) -> None:
    tap = mailbox.tap("r")
    for number in range(3):
        port.send(record(port, number))
    assert [int(t.array["number"]) for t in tap.read()] == [0, 1, 2]
    assert tap.read() == []
    for number in range(3, 40):
        port.send(record(port, number))
    rest = tap.read()
    assert int(rest[-1].array["number"]) == 39
    assert tap.missed == 37 - len(rest) > 0
    assert receive(port)["number"] == 40 - bytes_of.ring_cells(RECORD.depth) + 1  # the reader lost the same ones


def test_a_head_that_jumps_back_is_an_error_not_a_loop(mailbox: Mailbox, port: BroadcastPort) -> None:
    for number in range(5):
        port.send(record(port, number))
    receive(port)
    at = bytes_of.TABLE_OFFSET + 8
    with (mailbox.directory / "r").open("r+b") as file:
        for head in (0, 2**63, 2**64 - 1):
            file.seek(at)
            file.write(head.to_bytes(8, "little"))
            file.flush()
            with pytest.raises(IntegrityError, match="a ring's head is impossible"):
                port.receive(0)
    assert mailbox.stats("r").counts["corrupt"] == 3
