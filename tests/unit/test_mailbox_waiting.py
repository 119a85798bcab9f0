"""Waiting between processes, threads and event loops: nobody sleeps through what is there."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from sage_edge.mailbox import ClosedError, FullError, Mailbox, PortSpec, PortTable
from tests.mailbox_peers import Peer, peer, wait_until

TABLE = PortTable(
    {
        "there": PortSpec("focus", 2, dtype="u4", shape=(1,)),
        "back": PortSpec("focus", 2, dtype="u4", shape=(1,)),
        "ring": PortSpec("broadcast", 8, fields={"n": "u4"}, producers=2),
    }
)


@pytest.fixture
def mailbox(mailbox_memory: Path) -> Mailbox:
    return Mailbox("wait", TABLE)


def answer(p: Peer) -> None:
    """Sends back each number that comes, until 0."""
    box = Mailbox("wait", TABLE)
    there, back = box.focus("there", spin_us=0), box.focus("back", spin_us=0)
    p.pause()
    for item in there:
        number = int(item.array[0])
        item.release()
        with back.loan() as loan:
            loan.array[0] = number
            loan.send()
        if number == 0:
            return


@pytest.mark.parametrize("spin_us", [0.0, 20.0, float("inf")])
def test_ping_pong_asleep_and_spinning(mailbox: Mailbox, spin_us: float) -> None:
    """Each message crosses two sleeps (or spins). A lost wake-up would cost 50 ms: 400 of them would show."""
    with (
        mailbox.focus("there", spin_us=spin_us) as there,
        mailbox.focus("back", spin_us=spin_us) as back,
        peer(answer) as p,
    ):
        p.reached()
        p.go()
        slow = 0
        for number in (*range(1, 401), 0):
            begin = time.monotonic()
            with there.loan() as loan:
                loan.array[0] = number
                loan.send()
            item = back.receive(30)
            assert item is not None
            assert item.array[0] == number
            item.release()
            slow += time.monotonic() - begin > 0.045
        assert p.join() == 0
        assert slow < 100  # a busy machine may be slow at times; a waiter that relies on its timer is slow each time


def test_a_sleeping_receiver_uses_no_cpu_and_wakes(mailbox: Mailbox) -> None:
    with mailbox.focus("there", spin_us=0) as port:
        used = time.thread_time()
        begin = time.monotonic()
        assert port.receive(0.5) is None
        assert time.monotonic() - begin >= 0.5
        assert time.thread_time() - used < 0.1

        def send() -> None:
            with mailbox.focus("there") as other, other.loan() as loan:
                loan.array[0] = 4
                loan.send()

        threading.Timer(0.1, send).start()
        item = port.receive(30)
        assert item is not None
        assert item.array[0] == 4


def test_the_gil_is_free_while_waiting(mailbox: Mailbox) -> None:
    with mailbox.focus("there", spin_us=float("inf")) as port:
        ticks = []
        done = threading.Event()

        def tick() -> None:
            while not done.is_set():
                ticks.append(time.monotonic())
                time.sleep(0.001)

        thread = threading.Thread(target=tick)
        thread.start()
        assert port.receive(0.3) is None
        done.set()
        thread.join()
        assert len(ticks) > 20


@pytest.mark.parametrize("spin_us", [0.0, float("inf")])
def test_ctrl_c_ends_a_wait(mailbox: Mailbox, spin_us: float) -> None:
    def wait(p: Peer) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        port = Mailbox("wait", TABLE).focus("there", spin_us=spin_us)
        p.pause()
        with pytest.raises(KeyboardInterrupt):
            port.receive()
        assert port.receive(0) is None  # the port is in order

    with peer(wait) as p:
        p.reached()
        p.go()
        time.sleep(0.1)
        os.kill(p.pid, signal.SIGINT)
        assert p.join() == 0


def test_every_reader_of_a_broadcast_wakes(mailbox: Mailbox) -> None:
    def read(p: Peer) -> None:
        port = Mailbox("wait", TABLE).broadcast("ring", spin_us=0)
        p.pause()
        for number in range(50):
            record = port.receive(30)
            assert record is not None
            assert record["n"] == number
            os.write(p._say, b"+")

    with mailbox.broadcast("ring") as port, peer(read) as a, peer(read) as b, peer(read) as c:
        for p in (a, b, c):
            p.reached()
            p.go()
        record = np.zeros((), port.record_dtype)
        for number in range(50):
            record["n"] = number
            port.send(record)
            for p in (a, b, c):
                assert p.reached() == b"+"
        assert [p.join() for p in (a, b, c)] == [0, 0, 0]


def test_a_killed_waiter_costs_one_needless_wake(mailbox: Mailbox) -> None:
    def wait(p: Peer) -> None:
        port = Mailbox("wait", TABLE).focus("there", spin_us=0)
        p.pause()
        port.receive()

    with mailbox.focus("there") as port:
        with peer(wait) as p:
            p.reached()
            p.go()
            wait_until(lambda: "futex" in Path(f"/proc/{p.pid}/wchan").read_text() or _sleeping(p.pid))
            p.kill()
        for _ in range(3):
            port.loan().send()
            item = port.receive(0)
            assert item is not None
            item.release()
        assert port.stats().counts["wakes"] <= 1


def _sleeping(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def test_a_removed_port_wakes_who_waits(mailbox: Mailbox) -> None:
    with mailbox.focus("there", spin_us=0) as port:
        threading.Timer(0.1, mailbox.remove, ["there"]).start()
        begin = time.monotonic()
        with pytest.raises(ClosedError, match="removed"):
            port.receive(60)
        assert time.monotonic() - begin < 30


# --- asyncio


def test_async_ping_pong_without_threads(mailbox: Mailbox) -> None:
    async def run() -> int:
        slow = 0
        with mailbox.focus("there") as there, mailbox.focus("back") as back:
            for number in (*range(1, 101), 0):
                begin = time.monotonic()
                with await there.loan_async(timeout=30) as loan:
                    loan.array[0] = number
                    loan.send()
                item = await back.receive_async(30)
                assert item is not None
                assert item.array[0] == number
                item.release()
                slow += time.monotonic() - begin > 0.045
        return slow

    with peer(answer) as p:
        p.reached()
        p.go()
        assert asyncio.run(run()) < 30
        assert threading.active_count() == 1 or all("asyncio" not in t.name for t in threading.enumerate())
        assert p.join() == 0


def test_async_iteration_and_two_readers_at_once(mailbox: Mailbox) -> None:
    async def run() -> list[int]:
        got: list[int] = []
        with mailbox.focus("there") as port:

            async def read() -> None:
                async for item in port:
                    got.append(int(item.array[0]))
                    item.release()

            readers = [asyncio.create_task(read()) for _ in range(2)]
            for number in range(20):
                with await port.loan_async(timeout=30) as loan:
                    loan.array[0] = number
                    loan.send()
            while len(got) < 20:
                await asyncio.sleep(0.001)
            mailbox.remove("there")
            await asyncio.gather(*readers)
        return got

    assert sorted(asyncio.run(run())) == list(range(20))


def test_async_broadcast(mailbox: Mailbox) -> None:
    async def run() -> list[int]:
        with mailbox.broadcast("ring") as reader, mailbox.broadcast("ring") as writer:
            record = np.zeros((), writer.record_dtype)

            async def write() -> None:
                for number in range(5):
                    record["n"] = number
                    writer.send(record)
                    await asyncio.sleep(0.002)

            task = asyncio.create_task(write())
            got = []
            async for item in reader:
                got.append(int(item["n"]))
                if len(got) == 5:
                    break
            await task
            assert await reader.receive_async(0.02) is None
            return got

    assert asyncio.run(run()) == list(range(5))


def test_async_timeouts_and_policies(mailbox: Mailbox) -> None:
    async def run() -> None:
        with mailbox.focus("there") as port:
            begin = time.monotonic()
            assert await port.receive_async(0.15) is None
            assert time.monotonic() - begin >= 0.15
            loans = [port.loan(), port.loan()]
            with pytest.raises(FullError):
                await port.loan_async(timeout=0.1)
            asyncio.get_running_loop().call_later(0.05, loans[0].cancel)
            (await port.loan_async(timeout=30)).cancel()

    asyncio.run(run())


def test_a_cancelled_task_leaves_nothing_behind(mailbox: Mailbox) -> None:
    async def run() -> None:
        with mailbox.focus("there") as port:
            task = asyncio.create_task(port.receive_async())
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert list(mailbox.directory.glob(".wait.there.*"))
            waiting = asyncio.create_task(port.receive_async())
            await asyncio.sleep(0.02)
            port.close()
            with pytest.raises(ClosedError):
                await waiting

    asyncio.run(run())
    assert not list(mailbox.directory.glob(".wait.*"))


def test_the_fifo_of_the_dead_goes_away(mailbox: Mailbox) -> None:
    def wait(p: Peer) -> None:
        async def run() -> None:
            port = Mailbox("wait", TABLE).focus("there")
            asyncio.get_running_loop().call_later(0.02, p.pause)
            await port.receive_async()

        asyncio.run(run())

    with peer(wait) as p:
        assert p.reached()
        (fifo,) = mailbox.directory.glob(".wait.there.*")
        assert fifo.stat().st_mode & 0o777 == 0o600
        p.kill()
    with mailbox.focus("there") as port:
        assert not list(mailbox.directory.glob(".wait.*"))
        port.loan().send()  # nobody to wake, nothing to complain about
