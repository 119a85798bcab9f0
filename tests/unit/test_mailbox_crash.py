"""Peers that are killed: what they held comes back, what they sent stays whole, and nobody needs to lend a hand."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sage_edge.mailbox import FocusPort, FullError, Loan, Mailbox, PortSpec, PortTable, _native, layout
from tests.mailbox_peers import Peer, peer

SPEC = PortSpec("focus", 2, dtype="uint8", shape=(4096,), policy="refuse")
BLOCK = PortSpec("focus", 2, dtype="uint8", shape=(4096,))
RING = PortSpec("broadcast", 4, fields={"number": "u4"}, producers=1)
TABLE = PortTable({"p": SPEC, "b": BLOCK, "r": RING})
REPOSITORY = Path(__file__).parents[2]
WITHIN_S = 0.1  # the promise: within 100 ms of the next operation


@pytest.fixture
def mailbox(mailbox_memory: Path) -> Mailbox:
    return Mailbox("crash", TABLE)


def fill(port: FocusPort, value: int) -> None:
    with port.loan(timeout=10) as loan:
        loan.array[:] = value
        loan.send()


def hold_loans(p: Peer) -> None:
    port = Mailbox("crash", TABLE).focus("p")
    loans = [port.loan(), port.loan()]
    loans[0].array[:2000] = 1
    p.pause()


def hold_items(p: Peer) -> None:
    port = Mailbox("crash", TABLE).focus("p")
    fill(port, 1)
    fill(port, 2)
    items = [port.receive(0), port.receive(0)]
    assert None not in items
    p.pause()


@pytest.mark.parametrize("reap", [True, False], ids=["reaped", "zombie"])
@pytest.mark.parametrize("work", [hold_loans, hold_items])
def test_what_the_dead_held_comes_back(mailbox: Mailbox, work: Callable[[Peer], None], reap: bool) -> None:
    with mailbox.focus("p") as port, peer(work) as other:
        other.reached()
        with pytest.raises(FullError):
            port.loan()
        other.kill(reap)
        begin = time.monotonic()
        taken: list[Loan] = []
        while len(taken) < 2:  # the policy refuses, so this asks again and again: no daemon, no hand
            try:
                taken.append(port.loan())
            except FullError:
                assert time.monotonic() - begin < WITHIN_S + 1.0, "not back (1 s on top for a busy machine)"
        stats = port.stats()
        assert stats.counts["reclaimed"] == 2
        assert len(stats.owners) == 1


def test_a_blocked_producer_gets_the_slots_of_the_dead(mailbox: Mailbox) -> None:
    def hold(p: Peer) -> None:
        port = Mailbox("crash", TABLE).focus("b")
        loans = [port.loan(), port.loan()]
        p.pause()
        del loans

    with mailbox.focus("b") as port, peer(hold) as other:
        other.reached()
        other.kill()
        begin = time.monotonic()
        port.loan(timeout=10).cancel()
        assert time.monotonic() - begin < WITHIN_S + 1.0


def test_a_living_process_keeps_what_it_has_however_slow_it_is(mailbox: Mailbox) -> None:
    import signal

    with mailbox.focus("p") as port, peer(hold_loans) as other:
        other.reached()
        os.kill(other.pid, signal.SIGSTOP)
        end = time.monotonic() + 0.4  # many sweeps
        while time.monotonic() < end:
            with pytest.raises(FullError):
                port.loan()
            time.sleep(0.01)
        assert port.stats().loaned == 2


def test_what_was_sent_stays_and_what_was_half_written_is_never_seen(mailbox: Mailbox) -> None:
    def half(p: Peer) -> None:
        port = Mailbox("crash", TABLE).focus("p")
        fill(port, 5)
        loan = port.loan()
        loan.array[:1000] = 6
        p.pause()

    with peer(half) as other:
        other.reached()
        other.kill()
    with mailbox.focus("p") as port:
        item = port.receive(0)
        assert item is not None
        assert (item.array == 5).all()
        item.release()
        assert port.receive(0) is None
        assert port.stats().free == 2


def test_an_item_that_killed_its_consumer_is_not_given_to_the_next(mailbox: Mailbox) -> None:
    def take(p: Peer) -> None:
        port = Mailbox("crash", TABLE).focus("p")
        item = port.receive(10)
        assert item is not None
        p.pause()

    with mailbox.focus("p") as port, peer(take) as other:
        fill(port, 1)
        other.reached()
        other.kill()
        fill(port, 2)
        item = port.receive(0)
        assert item is not None
        assert item.array[0] == 2


def test_a_restarted_producer_goes_on(mailbox: Mailbox) -> None:
    def produce(p: Peer) -> None:
        box = Mailbox("crash", TABLE)
        port, ring = box.focus("p"), box.broadcast("r")
        record = np.zeros((), ring.record_dtype)
        ring.send(record)
        record["number"] = os.getpid() % 1000
        ring.send(record)
        fill(port, os.getpid() % 251)
        p.pause()

    with mailbox.focus("p") as port, mailbox.broadcast("r") as ring:
        for life in range(5):
            with peer(produce) as other:
                assert other.reached(), "the only ring must have come back from the dead"
                item = port.receive(10)
                assert item is not None
                assert item.array[0] == other.pid % 251
                item.release()
                numbers = [ring.receive(1), ring.receive(1)]
                assert [r.sequence for r in numbers if r is not None] == [2 * life, 2 * life + 1]
                assert numbers[1] is not None
                assert numbers[1]["number"] == other.pid % 1000
                other.kill()
        time.sleep(0.06)
        assert port.receive(0) is None  # any operation, 50 ms after the last look
        assert len(port.stats().owners) == 1


def test_a_reused_pid_fools_nobody(mailbox: Mailbox) -> None:
    """An entry of a process that had our pid, but began at another time: dead, though /proc shows a living process."""
    own = _native.own_identity()
    assert layout.pid(own) == os.getpid()
    assert not _native.is_dead(own)
    before = own - (1 << 22)  # the same pid, started one tick earlier
    assert layout.pid(before) == os.getpid()
    assert _native.is_dead(before)
    mailbox.focus("p").close()
    with (mailbox.directory / "p").open("r+b") as file:
        file.seek(layout.PARTICIPANTS_OFFSET + 64 * 9)
        file.write(before.to_bytes(8, "little"))
        for slot in range(2):
            file.seek(layout.TABLE_OFFSET + 16 * slot)
            file.write(layout.make_word(3 + slot, 9, layout.LOANED + 2 * slot).to_bytes(8, "little"))
    with mailbox.focus("p") as port:
        stats = port.stats()
        assert (stats.free, stats.loaned, stats.held) == (2, 0, 0)
        assert [owner.pid for owner in stats.owners] == [os.getpid()]


def test_all_64_handles_of_the_dead_come_back(mailbox: Mailbox) -> None:
    def many(p: Peer) -> None:
        box = Mailbox("crash", TABLE)
        ports = [box.focus("p") for _ in range(64)]
        with pytest.raises(FullError, match="64 handles are open"):
            box.focus("p")
        p.pause()
        del ports

    with peer(many) as other:
        assert other.reached()
        assert len(mailbox.stats("p").owners) == 64
        with pytest.raises(FullError, match="64 handles are open"):
            mailbox.focus("p")
        other.kill()
    with mailbox.focus("p") as port:
        assert len(port.stats().owners) == 1


FIRST_THREAD_ENDS = """
import ctypes, os, threading, time
from pathlib import Path
from tests.unit.test_mailbox_crash import TABLE, Mailbox

port = Mailbox("crash", TABLE).focus("p")
loans = [port.loan(), port.loan()]

def rest():
    while Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.001)
    os.write(1, b"!")
    os.read(0, 1)

threading.Thread(target=rest).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_process_whose_first_thread_has_ended_lives(mailbox: Mailbox) -> None:
    """/proc shows state Z for it; its other threads may well write."""
    command = [sys.executable, "-c", FIRST_THREAD_ENDS]
    with mailbox.focus("p") as port, subprocess.Popen(command, stdin=-1, stdout=-1, cwd=REPOSITORY) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.read(1) == b"!"
            time.sleep(0.06)
            with pytest.raises(FullError):
                port.loan()
        finally:
            other.kill()
        other.wait(20)
        time.sleep(WITHIN_S)
        port.loan().cancel()


def test_a_killed_rm_is_finished_by_the_next_opening(mailbox: Mailbox) -> None:
    with mailbox.focus("p") as old:
        with (mailbox.directory / "p").open("r+b") as file:  # marked, not yet unlinked
            file.seek(layout.CONTROL_OFFSET + 192)
            file.write((1).to_bytes(4, "little"))
        inode = (mailbox.directory / "p").stat().st_ino
        with mailbox.focus("p") as new:
            assert (mailbox.directory / "p").stat().st_ino != inode
            fill(new, 1)
        with pytest.raises(Exception, match="was removed"):
            old.receive(0)


def test_kills_at_random_moments(tmp_path: Path) -> None:
    """The short form of `python -m tests.stress.mailbox_kills --kills 10000`."""
    from tests.stress.mailbox_kills import stress

    report = stress(kills=300, producers=4, consumers=4, seed=1, pause_ms=2.0)
    assert report.errors == []
    assert (report.kills, report.leaked_slots, report.twice) == (300, 0, 0)
    assert report.received > 1000
    assert report.records > 1000
