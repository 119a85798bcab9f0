"""The suite `mailbox`: real processes and transports, for a few milliseconds each; what its goals and counts mean."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sage_edge.bench import mailbox as suite
from sage_edge.bench import mailbox_broadcast, mailbox_trips
from sage_edge.bench.mailbox import goals, run_mailbox
from sage_edge.bench.mailbox_links import CONTESTANTS, OURS, Contestant, LinkError, reader, touched, writer
from sage_edge.bench.mailbox_pages import Pages, count
from sage_edge.bench.mailbox_trips import Block, echo, exchange, round_trips, touches
from sage_edge.cli.main import main

BY_NAME = {one.name: one for one in CONTESTANTS}
MISSING = Contestant("nowhere", ("sage_edge.nowhere", "Nowhere"), "no-such-distribution")


def silent(stage: str, done: float) -> None:
    pass


@pytest.fixture(autouse=True)
def private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAGE_EDGE_SHM", str(tmp_path / "shm"))


def test_a_run_with_what_is_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "SIZES", (64, 4096, 1 << 20))
    monkeypatch.setattr(mailbox_broadcast, "READERS", (1, 2))
    contestants = (BY_NAME[OURS], BY_NAME["Unix socket"], MISSING)
    monkeypatch.setattr(run_mailbox, "__defaults__", (contestants,))
    output = tmp_path / "report.json"
    assert main(["bench", "--suite", "mailbox", "--seconds", "0.02", "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert "no-such-distribution: not installed, not measured" in text
    assert "pages touched per message" in text
    report = json.loads(output.read_text())
    assert report["missing"] == ["no-such-distribution"]
    cells = [
        (size, touch, wait) for size in (64, 4096, 1 << 20) for touch in touches(size) for wait in ("poll", "block")
    ]
    for name in (OURS, "Unix socket"):
        rows = [row for row in report["trips"] if row["transport"] == name]
        assert [(row["bytes"], row["touch"], row["wait"]) for row in rows] == cells
        assert all(0 < row["latency"]["p50_ms"] <= row["latency"]["p99_ms"] for row in rows)
        assert all(row["cpu_ping"] > 0 and row["cpu_pong"] > 0 for row in rows)
    assert [(row["readers"], row["transport"]) for row in report["broadcast"]] == [
        (readers, name) for readers in (1, 2) for name in (OURS, "Unix socket")]  # fmt: skip
    assert all(row["received_per_s"] > 0 and 0 <= row["lost"] < 1 for row in report["broadcast"])
    assert report["goals"]["half_of_rival"] is None, "iceoryx2 did not run"
    assert report["commit"]
    assert not any((tmp_path / "shm").glob("*/*")), "no port is left behind"
    # The socket copies 256 pages in at the sender and out at the receiver; the mailbox touches one line of each.
    pages = report["goals"]["pages_per_message"]
    assert report["goals"]["pages_of_message"] == 256
    if pages[OURS] is not None:
        assert pages["Unix socket"] > 400
        assert pages[OURS] < 64


@pytest.mark.parametrize("name", ["iceoryx2", "pyzmq ipc", "shared_memory + Queue"])
def test_peers_move_payloads_and_records(name: str) -> None:
    contestant = BY_NAME[name]
    if contestant.version is None:
        pytest.skip(f"{contestant.package} is not installed (sage-edge[mailbox-peers])")
    report = round_trips((contestant,), 0.01, (4096, 1 << 20), silent, rounds=1)
    assert len(report["trips"]) == 2 * (2 + 3)
    cast = mailbox_broadcast.broadcast(contestant, 2, 0.1)
    assert cast["received_per_s"] > 0


class Loop:
    """A link to oneself: what is sent is answered as pong would, or not quite."""

    def __init__(self, wrong: int = 0) -> None:
        self.words = np.zeros(1024, np.uint64)
        self.wrong = wrong

    def send(self, write: Any, value: int, poll: bool) -> None:
        write(self.words, value + 2)
        self.words[512] += self.wrong

    def receive(self, read: Any, poll: bool) -> int:
        return int(read(self.words))

    def close(self) -> None:
        pass


def test_an_answer_that_is_not_right_is_an_error() -> None:
    seconds: list[float] = []
    exchange(Loop(), Block("full", True), 1024, seconds)
    assert len(seconds) == mailbox_trips.LEAST
    with pytest.raises(LinkError, match="message 0: .* torn or mixed up"):
        exchange(Loop(wrong=1), Block("full", True), 1024, seconds)
    with pytest.raises(LinkError):
        exchange(Loop(wrong=1), Block("page", True), 1024, seconds)


def test_the_last_message_of_a_block_ends_the_echo() -> None:
    class Script(Loop):
        values = (0, 2, 4, 7)

        def __init__(self) -> None:
            super().__init__()
            self.sent: list[int] = []

        def receive(self, read: Any, poll: bool) -> int:
            return self.values[len(self.sent)] * touched(1024, "page")

        def send(self, write: Any, value: int, poll: bool) -> None:
            self.sent.append(value)

    script = Script()
    echo(script, Block("page", False), 1024)
    assert script.sent == [2, 4, 6, 9]


@pytest.mark.parametrize("touch", ["line", "page", "full"])
@pytest.mark.parametrize("words", [8, 512, 1024, 1500])
def test_what_is_written_is_what_is_read(touch: Any, words: int) -> None:
    payload = np.zeros(words, np.uint64)
    writer(touch)(payload, 5)
    assert reader(touch)(payload) == 5 * touched(words, touch)
    assert np.count_nonzero(payload) == touched(words, touch)


def test_pages_are_counted_as_they_are_touched() -> None:
    size = 1000 * mmap.PAGESIZE
    area = mmap.mmap(-1, size)
    view = np.frombuffer(area, np.uint8)
    view[:] = 1
    idle, busy = [], []
    for _ in range(3):
        pages = Pages()
        view[: mmap.PAGESIZE : mmap.PAGESIZE].sum()
        idle.append(pages.touched())
        pages = Pages()
        view[:: mmap.PAGESIZE].sum()
        busy.append(pages.touched())
    if None in idle + busy:
        pytest.skip("this kernel does not tell which pages were touched (/proc/self/clear_refs, smaps)")
    assert 990 <= np.median(busy) - np.median(idle) <= 1100  # type: ignore[arg-type]
    del view
    area.close()


def test_libraries_are_not_counted_and_memory_is() -> None:
    smaps = """\
55d0-55d4 r-xp 00000000 fe:00 123 /usr/bin/python3.11
Referenced:           64 kB
55d4-55d8 rw-p 00004000 fe:00 123 /usr/bin/python3.11
Referenced:            8 kB
55d8-55dc rw-p 00000000 00:00 0 [heap]
Referenced:          100 kB
7f00-7f04 r--s 00000000 00:1a 9 /dev/shm/sage-edge-0/robot/frames
Referenced:           20 kB
7f04-7f08 r--p 00000000 00:00 0
Referenced:            4 kB
7f08-7f0c r--p 00000000 fe:00 77 /usr/lib/locale/C.utf8/LC_CTYPE
Referenced:          512 kB
"""
    assert count(smaps) == (8 + 100 + 20 + 4) * 1024


def row(name: str, size: int, touch: str, wait: str, ms: float) -> dict[str, Any]:
    return {"transport": name, "bytes": size, "touch": touch, "wait": wait, "latency": {"p50_ms": ms}}


def test_goals_are_worked_out_from_the_rows() -> None:
    trips = [
        row(OURS, 4096, "page", "poll", 0.004), row("iceoryx2", 4096, "page", "poll", 0.008),
        row(OURS, 8 << 20, "line", "poll", 0.005), row("iceoryx2", 8 << 20, "line", "poll", 0.016),
        row(OURS, 8 << 20, "full", "poll", 3.0), row("iceoryx2", 8 << 20, "full", "poll", 3.0),
        row(OURS, 4096, "page", "block", 0.020), row(OURS, 8 << 20, "line", "block", 0.028),
    ]  # fmt: skip
    pages = [{"transport": OURS, "bytes": 64, "pages": 1200.0}, {"transport": OURS, "bytes": 8 << 20, "pages": 1204.0}]
    found = goals({"trips": trips, "pages": pages})
    assert found["half_of_rival"] is True, "payloads that are written in full are memory, not transport"
    assert [r["times_rival"] for r in found["times_rival"]] == [0.5, 0.3125, 1.0]
    assert found["hop_within_15_us"] is True
    assert found["flat"] == 1.25
    assert found["pages_per_message"] == {OURS: 2.0}
    trips[0]["latency"]["p50_ms"], trips[-1]["latency"]["p50_ms"] = 0.0041, 0.031
    found = goals({"trips": trips, "pages": pages})
    assert (found["half_of_rival"], found["hop_within_15_us"]) == (False, False)


def test_options_of_other_suites_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--suite", "mailbox", "--peers"]) == 2
    assert "leave peers out" in capsys.readouterr().err
