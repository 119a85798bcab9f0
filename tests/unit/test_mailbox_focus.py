"""The focus port in one process: verbs, views and their end, policies, time to live."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sage_edge.errors import InputError
from sage_edge.mailbox import (
    ClosedError,
    FocusPort,
    FullError,
    Item,
    Mailbox,
    PortSpec,
    StaleError,
    ViewsAliveWarning,
)
from sage_edge.mailbox.layout import DTYPE_NAMES, unpack_descriptor
from sage_edge.specs import Array


@pytest.fixture
def mailbox(mailbox_memory: Path) -> Mailbox:
    return Mailbox("test")


@pytest.fixture
def port(mailbox: Mailbox) -> Iterator[FocusPort]:
    with mailbox.focus("p", PortSpec("focus", 3, dtype="float32", shape=(2, 3), policy="refuse")) as port:
        yield port


def send(port: FocusPort, value: float = 1.0, trust: float = 1.0, **how: Any) -> int:
    with port.loan(trust=trust) as loan:
        loan.array[...] = value
        return loan.send(**how)


def receive(port: FocusPort) -> Item:
    item = port.receive(0)
    assert item is not None
    return item


def states(port: FocusPort) -> tuple[int, int, int, int]:
    stats = port.stats()
    return stats.free, stats.loaned, stats.ready, stats.held


def test_a_tensor_goes_over_with_all_that_belongs_to_it(port: FocusPort) -> None:
    with port.loan(trust=0.25) as loan:
        assert loan.array.shape == (2, 3)
        assert loan.array.dtype == np.float32
        loan.array[...] = [[1, 2, 3], [4, 5, 6]]
        assert states(port) == (2, 1, 0, 0)
        generation = loan.send(tag=7, captured_ns=123, ttl_ms=0)
    assert states(port) == (2, 0, 1, 0)
    with receive(port) as item:
        assert states(port) == (2, 0, 0, 1)
        assert item.array.tolist() == [[1, 2, 3], [4, 5, 6]]
        assert (item.tag, item.captured_ns, item.generation, item.slot) == (7, 123, generation, 0)
        assert item.trust == pytest.approx(0.25, abs=1e-5)
        assert item.shape == (2, 3)
        assert item.dtype == np.float32
        assert abs(item.sent_ns - time.monotonic_ns()) < 60e9
        fields = unpack_descriptor(item.descriptor)
        assert (fields["shape"], fields["strides"], fields["tag"], fields["generation"]) == (
            (2, 3),
            None,
            7,
            generation,
        )
    assert states(port) == (3, 0, 0, 0)
    assert port.receive(0) is None


def test_the_receiver_sees_the_senders_bytes(mailbox: Mailbox) -> None:
    """Not a copy: the same memory under two mappings, so that a write through one is seen through the other."""
    spec = PortSpec("focus", 1, dtype="uint8", shape=(4096,))
    with mailbox.focus("p", spec) as producer, mailbox.focus("p", spec) as consumer:
        loan = producer.loan()
        address = loan.array.ctypes.data
        loan.array[:] = 3
        loan.send()
        item = receive(consumer)
        assert item.array.ctypes.data != address
        ctypes.c_uint8.from_address(address).value = 200
        assert item.array[0] == 200
        item.release()


def test_items_come_in_order(port: FocusPort) -> None:
    for value in (1, 2, 3):
        send(port, value)
    got = []
    while (item := port.receive(0)) is not None:
        got.append(float(item.array[0, 0]))
        item.release()
    assert got == [1, 2, 3]


def test_leaving_the_block_without_send_cancels(port: FocusPort) -> None:
    with port.loan():
        pass
    with pytest.raises(ValueError, match="could not broadcast"), port.loan() as loan:
        loan.array[...] = [1, 2]
    assert states(port) == (3, 0, 0, 0)
    assert port.receive(0) is None
    assert port.stats().counts["cancelled"] == 2


def test_what_is_dropped_comes_back(port: FocusPort) -> None:
    port.loan()
    send(port)
    port.receive(0)
    gc.collect()
    assert states(port) == (3, 0, 0, 0)


def test_nothing_can_be_done_after_the_end(port: FocusPort) -> None:
    loan = port.loan()
    loan.send()
    for use in (lambda: loan.array, loan.send, loan.__dlpack__):
        with pytest.raises(ClosedError, match="given away"):
            use()
    loan.cancel()  # as after any end: nothing
    item = receive(port)
    assert item.release() is True
    assert item.release() is True
    with pytest.raises(ClosedError, match="given away"):
        item.array  # noqa: B018
    assert states(port) == (3, 0, 0, 0)


def test_a_view_that_outlives_its_item_keeps_the_slot_and_is_noticed(port: FocusPort) -> None:
    send(port, 5)
    item = receive(port)
    part = item.array[1]
    with pytest.warns(ViewsAliveWarning, match="release"):
        assert item.release() is False
    assert states(port) == (2, 0, 0, 1)
    send(port, 6)
    send(port, 7)
    assert part.tolist() == [5, 5, 5]
    with pytest.raises(FullError):
        port.loan()
    del part
    assert states(port) == (1, 0, 2, 0)


def test_a_view_that_outlives_the_item_object_keeps_the_slot(port: FocusPort) -> None:
    send(port, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        array = receive(port).array
    assert states(port) == (2, 0, 0, 1)
    assert array.sum() == 30
    del array
    assert states(port) == (3, 0, 0, 0)


def test_an_array_kept_over_send_is_read_only_and_noticed(port: FocusPort) -> None:
    with port.loan() as loan:
        array = loan.array
        array[...] = 1
        with pytest.warns(ViewsAliveWarning, match="send"):
            loan.send()
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 2
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.flags.writeable = True
    del array
    with port.loan() as loan:
        loan.array[...] = 1  # writable again
        loan.send()


def test_the_warning_can_be_an_error_and_then_nothing_is_sent(port: FocusPort) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ViewsAliveWarning)
        loan = port.loan()
        array = loan.array
        with pytest.raises(ViewsAliveWarning):
            loan.send()
        assert states(port) == (2, 1, 0, 0)
        array[...] = 4
        del array
        loan.send()
    assert receive(port).array.sum() == 24


def test_a_view_that_outlives_a_cancelled_loan_keeps_it_loaned(port: FocusPort) -> None:
    loan = port.loan()
    array = loan.array
    with pytest.warns(ViewsAliveWarning, match="cancel"):
        loan.cancel()
    assert states(port) == (2, 1, 0, 0)
    array[...] = 1  # nobody else looks there
    del array
    assert states(port) == (3, 0, 0, 0)


def test_arrays_changed_in_place_do_not_come_back(port: FocusPort) -> None:
    """The array of a slot is used again only as it was made."""
    loan = port.loan()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy discourages both
        loan.array.shape = (3, 2)
    loan.send()
    item = receive(port)
    assert item.array.shape == (2, 3)
    item.release()
    loan = port.loan()
    assert loan.array.shape == (2, 3)
    assert loan.array.dtype == np.float32


def test_memory_outlives_close_while_a_view_does(mailbox: Mailbox) -> None:
    port = mailbox.focus("p", PortSpec("focus", 2, dtype="int32", shape=(4,)))
    send(port, 9)
    item = receive(port)
    array = item.array
    port.close()
    assert port.closed
    assert array.tolist() == [9, 9, 9, 9]
    with pytest.raises(ClosedError, match="is closed here"):
        port.receive(0)
    stats = mailbox.stats("p")
    assert (stats.held, len(stats.owners)) == (1, 1)
    del item
    assert array.tolist() == [9, 9, 9, 9]
    del array
    stats = mailbox.stats("p")
    assert (stats.held, len(stats.owners)) == (0, 0)


@pytest.mark.parametrize("name", DTYPE_NAMES[1:])
def test_every_dtype(mailbox: Mailbox, name: str) -> None:
    with mailbox.focus("p", PortSpec("focus", 2, max_bytes=4096)) as port:
        values = np.arange(6).reshape(2, 1, 3).astype(name)
        with port.loan(values.shape, name) as loan:
            loan.array[...] = values
            loan.send()
        with receive(port) as item:
            assert item.dtype == np.dtype(name)
            assert (item.array == values).all()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (1,) * 8, (3, 1, 2)])
def test_every_kind_of_shape(mailbox: Mailbox, shape: tuple[int, ...]) -> None:
    with mailbox.focus("p", PortSpec("focus", 2, dtype="int16", max_bytes=64)) as port:
        with port.loan(shape) as loan:
            loan.array[...] = 2
            loan.send()
        with receive(port) as item:
            assert item.array.shape == shape
            assert (item.array == 2).all()


def test_views_are_sent_with_their_strides(mailbox: Mailbox) -> None:
    with mailbox.focus("p", PortSpec("focus", 2, dtype="int32", max_bytes=4096)) as port:
        values = np.arange(2 * 3 * 4, dtype=np.int32).reshape(2, 3, 4)
        cuts: tuple[Callable[[Array], Array], ...] = (
            lambda a: a.transpose(2, 0, 1), lambda a: a[:, :, ::2], lambda a: a[:1], lambda a: a[0, 0, :1].reshape(())
        )  # fmt: skip
        for cut in cuts:
            with port.loan((2, 3, 4)) as loan:
                loan.array[...] = values
                loan.send(cut(loan.array))
            with receive(port) as item:
                assert item.array.shape == cut(values).shape
                assert (item.array == cut(values)).all()


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda a: a[1:], "must begin at the first element"),
        (lambda a: a.copy(), "must begin at the first element"),
        (lambda a: a.view(np.float32), "another dtype"),
        (lambda a: a.reshape(1, 1, 1, 2, 12)[..., ::2], "at most 4 axes, found 5"),
        (lambda a: np.lib.stride_tricks.as_strided(a, (4000, 3), (4, 4)), "strides leaves the slot"),
        (lambda a: [1], "a view of the loan's array was expected"),
    ],
)
def test_views_that_cannot_be_sent(mailbox: Mailbox, cut: Any, message: str) -> None:
    with mailbox.focus("p", PortSpec("focus", 2, dtype="int32", max_bytes=4096)) as port, port.loan((2, 12)) as loan:
        view = cut(loan.array)
        with pytest.raises(InputError, match=message):
            loan.send(view)
        del view


def test_a_view_that_the_port_does_not_take_can_be_put_right(port: FocusPort) -> None:
    with port.loan() as loan:
        with pytest.raises(InputError, match="send: shape is not what the port takes"):
            loan.send(loan.array[:, :2])
        loan.array[:] = 7
        loan.send()
    with receive(port) as item:
        assert (item.array == 7).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (3, 2)}, "shape is not what the port takes"),
        ({"shape": (2, 3, 1)}, "shape is not what the port takes"),
        ({"dtype": "float64"}, "dtype is not what the port takes"),
        ({"dtype": "U3"}, "was expected"),
        ({"dtype": ">f4"}, "was expected"),
        ({"trust": 1.5}, "trust: expected 0 to 1"),
        ({"trust": float("nan")}, "trust: expected 0 to 1"),
        ({"shape": (-1, 3)}, "expected axes of 0"),
        ({"shape": (1,) * 9}, "at most 8 axes"),
    ],
)
def test_loans_that_the_port_does_not_take(port: FocusPort, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        port.loan(**arguments)
    assert states(port) == (3, 0, 0, 0)


def test_an_open_port_must_be_told_what(mailbox: Mailbox) -> None:
    with mailbox.focus("p", PortSpec("focus", 2, shape=(None, 2), max_bytes=64)) as port:
        with pytest.raises(InputError, match="takes any dtype"):
            port.loan((1, 2))
        with pytest.raises(InputError, match="more than one shape"):
            port.loan(dtype="f4")
        with pytest.raises(InputError, match="larger than a slot"):
            port.loan((1025, 2), "f4")
        port.loan((512, 2), "f4").cancel()


def test_refuse(port: FocusPort) -> None:
    for _ in range(3):
        send(port)
    with pytest.raises(FullError, match="no slot is free") as caught:
        port.loan(timeout=100)
    assert caught.value.reason == "full"
    assert caught.value.exit_code == 1
    assert port.stats().counts["refused"] == 1


def test_block_waits_for_room_and_no_longer_than_asked(mailbox: Mailbox) -> None:
    with mailbox.focus("p", PortSpec("focus", 1, dtype="u1", shape=(1,))) as port:
        send(port)
        begin = time.monotonic()
        with pytest.raises(FullError):
            port.loan(timeout=0.12)
        assert time.monotonic() - begin >= 0.12
        with pytest.raises(FullError):
            port.loan(timeout=0)
        item = receive(port)
        threading.Timer(0.05, item.release).start()
        port.loan(timeout=30).cancel()


def test_drop_oldest(mailbox: Mailbox) -> None:
    with mailbox.focus("p", PortSpec("focus", 2, dtype="u1", shape=(1,), policy="drop-oldest")) as port:
        for value in range(5):
            send(port, value)
        held = receive(port)
        assert held.array[0] == 3
        send(port, 5)
        send(port, 6)  # drops 5, as 5 did 4; what is held is never dropped
        assert held.array[0] == 3
        assert receive(port).array[0] == 6
        assert port.stats().counts["dropped"] == 5
        loans = [port.loan()]
        with pytest.raises(FullError):
            loans.append(port.loan())  # one held, one loaned: nothing to drop


def test_drop_lowest_trust(mailbox: Mailbox) -> None:
    spec = PortSpec("focus", 3, dtype="u1", shape=(1,), policy="drop-lowest-trust")
    with mailbox.focus("p", spec) as port:
        for value, trust in ((1, 0.5), (2, 0.1), (3, 0.9)):
            send(port, value, trust=trust)
        send(port, 4, trust=0.2)  # drops 2
        with pytest.raises(FullError, match="trusted more") as caught:
            port.loan(trust=0.1)
        assert caught.value.reason == "trust"
        send(port, 5, trust=0.5)  # drops 4
        send(port, 6, trust=0.5)  # of equals the oldest: drops 1
        got = [int(receive(port).array[0]) for _ in range(3)]
        assert got == [3, 5, 6]


def test_a_producers_share(mailbox: Mailbox) -> None:
    spec = PortSpec("focus", 4, dtype="u1", shape=(1,), policy="refuse", per_producer=2)
    with mailbox.focus("p", spec) as loud, mailbox.focus("p", spec) as quiet:
        send(loud)
        loan = loud.loan()
        with pytest.raises(FullError) as caught:
            loud.loan()
        assert caught.value.reason == "cap"
        send(quiet)
        loan.cancel()
        send(loud)
        item = receive(quiet)  # what is held counts for nobody
        send(loud)
        item.release()


def test_a_share_with_drop_oldest_drops_its_own(mailbox: Mailbox) -> None:
    spec = PortSpec("focus", 4, dtype="u1", shape=(1,), policy="drop-oldest", per_producer=2)
    with mailbox.focus("p", spec) as loud, mailbox.focus("p", spec) as quiet:
        send(quiet, 100)
        for value in range(5):
            send(loud, value)
        assert [int(receive(quiet).array[0]) for _ in range(3)] == [100, 3, 4]


def test_stale_items_are_dropped_and_counted(mailbox: Mailbox) -> None:
    spec = PortSpec("focus", 2, dtype="u1", shape=(1,), policy="refuse", ttl_ms=5)
    with mailbox.focus("p", spec) as port:
        send(port, 1)
        send(port, 2, ttl_ms=0)
        time.sleep(0.02)
        assert receive(port).array[0] == 2
        send(port, 3, captured_ns=time.monotonic_ns() - 10**9)
        assert port.receive(0) is None
        send(port, 4)
        send(port, 5)
        time.sleep(0.02)
        send(port, 6, ttl_ms=60_000)  # room is made by what nobody wants any more
        assert receive(port).array[0] == 6
        assert port.stats().counts["stale"] == 4


def test_claim_takes_exactly_that_item_once(mailbox: Mailbox) -> None:
    spec = PortSpec("focus", 3, dtype="u1", shape=(1,))
    with mailbox.focus("p", spec) as port:
        for value in (1, 2):
            send(port, value)
        copy = mailbox.tap("p").read()[1]
        descriptor = mailbox.view("p").observer.copy_slot(1)
        assert descriptor is not None
        item = port.claim(descriptor[0])
        assert (item.array[0], item.generation) == (2, copy.generation)
        with pytest.raises(StaleError, match="moved on"):
            port.claim(descriptor[0])
        item.release()
        with port.loan() as loan:
            assert loan.slot == 1
            loan.array[0] = 3
            loan.send()
        with pytest.raises(StaleError):  # the same slot, another generation: never somebody else's data
            port.claim(descriptor[0])
        with pytest.raises(InputError, match="64 bytes"):
            port.claim(b"short")
        with pytest.raises(StaleError):
            port.claim(b"\xff" * 64)
        assert [int(receive(port).array[0]) for _ in range(2)] == [1, 3]


def test_a_tap_takes_nothing_away(mailbox: Mailbox) -> None:
    with mailbox.focus("p", PortSpec("focus", 2, dtype="f4", shape=(2,), policy="drop-oldest")) as port:
        tap = mailbox.tap("p")
        assert tap.read() == []
        send(port, 1, tag=3)
        (seen,) = tap.read()
        assert (seen.array.tolist(), seen.tag, seen.producer) == ([1, 1], 3, 0)
        with receive(port) as item:
            assert item.generation == seen.generation
            assert item.array[0] == 1
        for value in (2, 3, 4):
            send(port, value)
        assert [t.array[0] for t in tap.read()] == [3, 4]
        assert tap.missed == 1
        port.loan().cancel()
        assert tap.read() == []


def test_dlpack(port: FocusPort) -> None:
    with port.loan() as loan:
        np.from_dlpack(loan)[...] = 3
        assert loan.__dlpack_device__() == (1, 0)
        loan.send()
    item = receive(port)
    array = np.from_dlpack(item)
    assert array.tolist() == [[3] * 3] * 2
    assert array.ctypes.data == item.array.ctypes.data
    assert not array.flags.writeable
    with pytest.warns(ViewsAliveWarning):
        item.release()
    assert states(port)[3] == 1
    del array
    assert states(port)[3] == 0


def test_dlpack_refusals_and_unused_capsules(port: FocusPort) -> None:
    send(port)
    item = receive(port)
    for arguments in ({"copy": True}, {"stream": 1}, {"dl_device": (2, 0)}):
        with pytest.raises(BufferError):
            item.__dlpack__(**arguments)
    for version in (None, (0, 8), (1, 0), (1, 1)):
        capsule = item.__dlpack__(max_version=version, dl_device=(1, 0), copy=False)
        assert ("versioned" in repr(capsule)) == (version is not None and version[0] >= 1)
        del capsule  # never consumed: freed by itself
    assert item.release() is True


def test_torch_takes_an_item(port: FocusPort) -> None:
    torch = pytest.importorskip("torch")
    send(port, 2)
    item = receive(port)
    tensor = torch.from_dlpack(item)
    assert tensor.data_ptr() == item.array.ctypes.data
    assert tensor.sum().item() == 12
    del tensor
    assert item.release() is True


def test_cuda_array_interface_only_where_a_gpu_sees_the_memory(port: FocusPort) -> None:
    send(port)
    item = receive(port)
    assert not hasattr(item, "__cuda_array_interface__")
    port.device_base = 1 << 40  # as a memory kind sets it
    interface = item.__cuda_array_interface__
    assert interface["shape"] == (2, 3)
    assert interface["typestr"] == "<f4"
    address, read_only = interface["data"]
    assert address > 1 << 40
    assert address % 4096 == 0
    assert read_only is True


def test_a_port_in_a_forked_child_says_so(port: FocusPort) -> None:
    send(port, 8)
    item = receive(port)
    pid = os.fork()
    if pid == 0:
        try:
            port.receive(0)
        except ClosedError as error:
            os._exit(0 if "fork" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
    assert states(port)[3] == 1  # the child's end took nothing away
    item.release()


def test_iteration_ends_when_the_port_is_removed(mailbox: Mailbox) -> None:
    spec = PortSpec("focus", 4, dtype="u1", shape=(1,))
    with mailbox.focus("p", spec) as port:
        send(port, 1)
        send(port, 2)
        threading.Timer(0.1, mailbox.remove, ["p"]).start()
        got = []
        for item in port:
            with item:
                got.append(int(item.array[0]))
        assert got == [1, 2]
        with pytest.raises(ClosedError, match="removed"):
            port.loan()
    with mailbox.focus("p", spec) as port:
        assert port.receive(0) is None


def test_closing_while_another_thread_waits(mailbox: Mailbox) -> None:
    port = mailbox.focus("p", PortSpec("focus", 1, dtype="u1", shape=(1,)))
    threading.Timer(0.05, port.close).start()
    with pytest.raises(ClosedError, match="while waiting"):
        port.receive(30)


def test_bad_timeouts(port: FocusPort) -> None:
    for timeout in (-1, float("nan")):
        with pytest.raises(InputError, match="timeout: expected"):
            port.receive(timeout)
    with pytest.raises(TypeError):
        port.receive("soon")  # type: ignore[arg-type]
