"""The functions of device.cuh on real ports, run as host code in the name of a host handle."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sage_edge.errors import InputError
from sage_edge.mailbox import BroadcastPort, Mailbox, PortSpec, _native, devices, layout
from sage_edge.mailbox.device_port import DevicePort, ring_view
from sage_edge.mailbox.null_driver import NullDriver
from tests.mailbox_device_host import device_host

DONE, NOTHING, BAD, GONE = range(4)


@pytest.fixture(scope="session")
def host() -> ctypes.CDLL:
    return device_host()


class Claim(ctypes.Structure):
    _fields_ = (("word", ctypes.c_uint64), ("data", ctypes.c_void_p), ("slot", ctypes.c_uint32))


class Kernel:
    """What one thread of a kernel would do on a focus port, in the name of the handle `port`."""

    def __init__(self, host: ctypes.CDLL, port: DevicePort) -> None:
        self.host = host
        self.port = port
        self.view = ctypes.create_string_buffer(port.kernel_view(), 48)

    def loan(self, trust: int = 65535, now_ns: int = 0) -> tuple[int, Claim]:
        claim = Claim()
        return self.host.device_host_loan(self.view, trust, ctypes.c_uint64(now_ns), ctypes.byref(claim)), claim

    def push(self, claim: Claim, array: np.ndarray, trust: int = 65535, now_ns: int | None = None) -> int:
        raw = np.ascontiguousarray(array)
        ctypes.memmove(claim.data, raw.ctypes.data, raw.nbytes)
        descriptor = np.zeros((), layout.DESCRIPTOR)
        descriptor["dtype"] = layout.DTYPE_NAMES.index(raw.dtype.name)
        descriptor["ndim"], descriptor["trust"], descriptor["device_type"] = raw.ndim, trust, 1
        descriptor["extent"][: raw.ndim] = raw.shape
        now = time.monotonic_ns() if now_ns is None else now_ns
        return int(
            self.host.device_host_push(self.view, ctypes.byref(claim), descriptor.tobytes(), ctypes.c_uint64(now))
        )

    def pop(self, now_ns: int = 0) -> tuple[int, Claim, dict[str, object]]:
        claim, descriptor = Claim(), ctypes.create_string_buffer(64)
        result = self.host.device_host_pop(self.view, ctypes.c_uint64(now_ns), ctypes.byref(claim), descriptor)
        return result, claim, layout.unpack_descriptor(descriptor.raw)

    def read(self, claim: Claim, count: int, dtype: str) -> np.ndarray:
        size = count * np.dtype(dtype).itemsize
        return np.frombuffer(ctypes.string_at(claim.data, size), dtype)

    def release(self, claim: Claim) -> int:
        return int(self.host.device_host_release(self.view, ctypes.byref(claim)))

    def cancel(self, claim: Claim) -> int:
        return int(self.host.device_host_cancel(self.view, ctypes.byref(claim)))


@pytest.fixture
def private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAGE_EDGE_SHM", str(tmp_path / "shm"))
    monkeypatch.setattr(devices, "make_driver", NullDriver)


def focus(**changes: Any) -> DevicePort:
    spec = {"kind": "focus", "dtype": "float32", "shape": (16,), "depth": 3, "memory": "shm+cuda", "policy": "refuse"}
    return DevicePort(Mailbox("kernels").focus("tensor", PortSpec(**{**spec, **changes})))


@pytest.mark.usefixtures("private")
def test_what_python_sends_a_kernel_takes_in_order(host: ctypes.CDLL) -> None:
    with focus() as sender, focus() as receiver:
        kernel = Kernel(host, receiver)
        assert kernel.pop()[0] == NOTHING
        for value in range(3):
            with sender.loan() as t:
                t.array[:] = value
                t.send(tag=value)
        for value in range(3):
            result, claim, descriptor = kernel.pop()
            assert (result, descriptor["tag"], descriptor["shape"]) == (DONE, value, (16,))
            assert kernel.read(claim, 16, "float32").tolist() == [value] * 16
            assert sender.port.stats().held == 1
            assert kernel.release(claim) == DONE
        assert sender.port.stats().counts["received"] == 3
        assert sender.port.stats().free == 3


@pytest.mark.usefixtures("private")
def test_what_a_kernel_sends_python_takes(host: ctypes.CDLL) -> None:
    with focus() as sender, focus() as receiver:
        kernel = Kernel(host, sender)
        result, claim = kernel.loan()
        assert result == DONE
        assert receiver.port.stats().loaned == 1
        before = time.monotonic_ns()
        assert kernel.push(claim, np.arange(16, dtype=np.float32), trust=32768) == DONE
        sender.signal()
        item = receiver.receive(1)
        assert item is not None
        np.testing.assert_array_equal(item.array, np.arange(16))
        assert item.item.trust == pytest.approx(0.5, abs=1e-4)
        assert before <= item.item.captured_ns <= time.monotonic_ns()
        item.release()
        _, claim = kernel.loan()
        assert kernel.cancel(claim) == DONE
        assert kernel.push(claim, np.zeros(16, np.float32)) == BAD, "the loan is over"
        assert receiver.receive(0) is None
        counts = receiver.port.stats().counts
        assert (counts["sent"], counts["cancelled"]) == (1, 1)


@pytest.mark.usefixtures("private")
def test_a_signal_wakes_a_waiter_after_a_kernel(host: ctypes.CDLL) -> None:
    with focus() as sender, focus() as receiver:
        kernel = Kernel(host, sender)
        receiver.port.spin_us = 0
        got: list[float] = []

        def wait() -> None:
            item = receiver.receive(10)
            got.append(time.monotonic())
            assert item is not None

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.2)
        _, claim = kernel.loan()
        kernel.push(claim, np.zeros(16, np.float32))
        sender.signal()
        thread.join(10)
        assert len(got) == 1


@pytest.mark.usefixtures("private")
def test_a_full_port_refuses_drops_the_oldest_or_the_least_trusted(host: ctypes.CDLL) -> None:
    with focus() as port:
        kernel = Kernel(host, port)
        loans = [kernel.loan() for _ in range(3)]
        assert [result for result, _ in loans] == [DONE] * 3
        assert kernel.loan()[0] == NOTHING
        assert port.port.stats().counts["refused"] == 1
        for _, claim in loans:
            kernel.cancel(claim)
    Mailbox("kernels").remove("tensor")
    with focus(policy="drop-oldest") as port:
        kernel = Kernel(host, port)
        for value in range(5):
            result, claim = kernel.loan()
            assert result == DONE
            kernel.push(claim, np.full(16, value, np.float32))
        assert port.port.stats().counts["dropped"] == 2
        item = port.receive(0)
        assert item is not None
        assert item.array[0] == 2
        item.release()
    Mailbox("kernels").remove("tensor")
    with focus(policy="drop-lowest-trust") as port:
        kernel = Kernel(host, port)
        for trust in (300, 100, 200):
            kernel.push(kernel.loan(trust)[1], np.full(16, trust, np.float32), trust)
        assert kernel.loan(50)[0] == NOTHING, "all that waits is trusted more"
        result, claim = kernel.loan(150)
        assert result == DONE
        kernel.push(claim, np.full(16, 150, np.float32), 150)
        left = []
        while (item := port.receive(0)) is not None:
            left.append(int(item.array[0]))
            item.release()
        assert left == [300, 200, 150]


@pytest.mark.usefixtures("private")
def test_a_cap_per_producer_holds_for_kernels_too(host: ctypes.CDLL) -> None:
    with focus(per_producer=1) as port, focus(per_producer=1) as other:
        kernel = Kernel(host, port)
        result, claim = kernel.loan()
        assert result == DONE
        assert kernel.loan()[0] == NOTHING
        assert other.loan(timeout=0).slot != claim.slot
        kernel.push(claim, np.zeros(16, np.float32))
        assert kernel.loan()[0] == NOTHING, "a waiting item counts, too"


@pytest.mark.usefixtures("private")
def test_stale_items_are_dropped_and_counted(host: ctypes.CDLL) -> None:
    with focus(ttl_ms=5.0) as port:
        kernel = Kernel(host, port)
        now = time.monotonic_ns()
        kernel.push(kernel.loan()[1], np.zeros(16, np.float32), now_ns=now)
        assert kernel.pop(now + 4_000_000)[0] == DONE
        kernel.push(kernel.loan()[1], np.zeros(16, np.float32), now_ns=now)
        assert kernel.pop(now + 6_000_000)[0] == NOTHING
        assert port.port.stats().counts["stale"] == 1
        for _ in range(2):
            kernel.push(kernel.loan()[1], np.zeros(16, np.float32), now_ns=now)
        assert kernel.loan(now_ns=now + 6_000_000)[0] == DONE, "a stale item makes room, whatever the policy"


@pytest.mark.usefixtures("private")
@pytest.mark.parametrize("field", ["id", "dtype", "ndim", "extent"])
def test_an_impossible_descriptor_is_refused_and_its_slot_freed(host: ctypes.CDLL, field: str) -> None:
    with focus() as port:
        kernel = Kernel(host, port)
        port.loan().send()
        address = _native.mapping(port.port)[0]
        at = layout.round_up(layout.TABLE_OFFSET + 3 * 16, 64)
        raw = np.frombuffer(ctypes.string_at(address + at, 64), layout.DESCRIPTOR).copy()
        raw[field] = {"id": 12345, "dtype": 99, "ndim": 9, "extent": 0xFFFFFFFF}[field]
        ctypes.memmove(address + at, raw.tobytes(), 64)
        assert kernel.pop()[0] == BAD
        stats = port.port.stats()
        assert (stats.free, stats.counts["corrupt"]) == (3, 1)


@pytest.mark.usefixtures("private")
def test_a_removed_port_is_gone_for_kernels_too(host: ctypes.CDLL) -> None:
    port = focus()
    kernel = Kernel(host, port)
    Mailbox("kernels").remove("tensor")
    assert kernel.loan()[0] == GONE
    assert kernel.pop()[0] == GONE
    port.close()


CONSUMER = """
import sys, zlib
from sage_edge.mailbox import Mailbox, PortSpec
spec = PortSpec(kind="focus", dtype="float32", shape=(16,), depth=3, memory="shm+cuda", policy="refuse")
from sage_edge.mailbox import devices
from sage_edge.mailbox.null_driver import NullDriver
devices.make_driver = NullDriver
last, count = {}, 0
with Mailbox("kernels").focus("tensor", spec) as port:
    print("ready", flush=True)
    while True:
        item = port.receive(30)
        with item:
            values = item.array.copy()
            producer = item.producer
        if values[0] < 0:
            break
        assert (values == values[0]).all(), "torn"
        assert values[0] > last.get(producer, -1), "out of order"
        last[producer] = values[0]
        count += 1
print(count, flush=True)
"""


@pytest.mark.usefixtures("private")
def test_kernel_code_and_python_share_a_port_under_load(host: ctypes.CDLL) -> None:
    """A consumer process and a consumer of device code take what a producer of device code sends: each item once, whole,
    and in order at each of them."""
    count = 4000
    consumer = subprocess.Popen([sys.executable, "-c", CONSUMER], stdout=subprocess.PIPE, text=True)
    assert consumer.stdout is not None
    assert consumer.stdout.readline() == "ready\n"
    with focus() as sender, focus() as receiver:
        sending, receiving = Kernel(host, sender), Kernel(host, receiver)
        mine: list[float] = []
        sent = 0
        while sent < count:
            result, claim = sending.loan()
            if result == DONE:
                assert sending.push(claim, np.full(16, sent, np.float32)) == DONE
                sent += 1
                sender.signal()
            if sent % 3 == 0:
                result, claim, _ = receiving.pop()
                if result == DONE:
                    values = receiving.read(claim, 16, "float32")
                    assert (values == values[0]).all()
                    mine.append(values[0])
                    receiving.release(claim)
        while (last := sending.loan())[0] != DONE:
            time.sleep(0.001)
        sending.push(last[1], np.full(16, -1, np.float32))
        sender.signal()
        theirs = int(consumer.stdout.readline())
        assert consumer.wait(30) == 0
        assert mine == sorted(mine)
        assert theirs + len(mine) == count
        assert receiver.port.stats().free == 3
    consumer.stdout.close()


# --- rings


class RingKernel:
    def __init__(self, host: ctypes.CDLL, port: BroadcastPort, ring: int) -> None:
        self.host = host
        self.view = ctypes.create_string_buffer(ring_view(port, ring, _native.mapping(port)[0]), 48)
        self.cursor = ctypes.c_uint64(0)

    def push(self, record: bytes) -> int:
        words = (ctypes.c_uint64 * 32).from_buffer_copy(record.ljust(256, b"\0"))
        return int(self.host.device_host_ring_push(self.view, words, ctypes.c_uint64(time.monotonic_ns())))

    def pop(self) -> tuple[int, bytes, int]:
        words, sent, lost = (ctypes.c_uint64 * 32)(), ctypes.c_uint64(), ctypes.c_uint64()
        result = self.host.device_host_ring_pop(
            self.view, ctypes.byref(self.cursor), words, ctypes.byref(sent), ctypes.byref(lost)
        )
        return result, bytes(words), lost.value


def broadcast(depth: int = 7) -> BroadcastPort:
    spec = PortSpec(kind="broadcast", depth=depth, producers=2, fields={"number": "uint64", "rest": "(3,)float32"})
    return Mailbox("kernels").broadcast("records", spec)


@pytest.mark.usefixtures("private")
def test_rings_carry_records_both_ways(host: ctypes.CDLL) -> None:
    with broadcast() as port, broadcast() as reader:
        record = np.zeros((), port.spec.record_dtype)
        record["number"], record["rest"] = 1, (1.5, 2.5, 3.5)
        port.send(record)  # claims ring 0
        kernel = RingKernel(host, port, 0)
        result, data, lost = kernel.pop()
        assert (result, lost) == (DONE, 0)
        assert np.frombuffer(data[:20], record.dtype)[0] == record
        assert kernel.pop()[0] == NOTHING
        record["number"] = 2
        assert kernel.push(record.tobytes()) == DONE
        assert [int(reader.receive(0)["number"]) for _ in range(2)] == [1, 2]  # type: ignore[index]
        port.send(record)
        assert reader.receive(0)["number"] == 2, "the host goes on where the kernel was"  # type: ignore[index]
        with pytest.raises(InputError, match=r"ring: expected 0\.\.1, found 2"):
            ring_view(port, 2, 0)


@pytest.mark.usefixtures("private")
def test_a_slow_kernel_loses_records_and_knows_how_many(host: ctypes.CDLL) -> None:
    with broadcast() as port:
        record = np.zeros((), port.spec.record_dtype)
        for number in range(20):
            record["number"] = number
            port.send(record)
        kernel = RingKernel(host, port, 0)
        result, data, lost = kernel.pop()
        assert (result, lost, int(np.frombuffer(data[:8], np.uint64)[0])) == (DONE, 13, 13)
        assert port.stats().counts["lost"] == 13
        kernel.cursor.value = 21
        assert kernel.pop()[0] == BAD, "a ring that runs backwards was tampered with"
