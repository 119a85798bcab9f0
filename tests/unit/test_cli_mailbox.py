"""`sage-edge mailbox` on live ports of other processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sage_edge.cli.main import main
from sage_edge.mailbox import Mailbox, PortSpec
from sage_edge.mailbox.monitor import look, rows

FRAMES = PortSpec(kind="focus", dtype="uint8", shape=(4, 6), depth=4, policy="drop-oldest")
RECORDS = PortSpec(kind="broadcast", depth=16, fields={"number": "uint32", "score": "float32"})
# Holds one item, has one loaned, two wait; ends with its standard input.
OTHER = """
import sys
from sage_edge.mailbox import Mailbox, PortSpec
from tests.unit.test_cli_mailbox import FRAMES
port = Mailbox("robot").focus("frames", FRAMES)
for value in range(3):
    with port.loan() as t:
        t.array[:] = value
        t.send(tag=value, trust=0.5)
item = port.receive(0)
loan = port.loan()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAGE_EDGE_SHM", str(tmp_path / "shm"))


@pytest.fixture
def other() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.communicate()


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:  # type: ignore[type-arg]
    assert main(["mailbox", *arguments, "--json"]) == 0
    found: dict = json.loads(capsys.readouterr().out)  # type: ignore[type-arg]
    return found


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err


def test_ls_shows_ports_owners_and_what_waits(other: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]) -> None:
    (port,) = report(capsys, "ls")["ports"]
    assert (port["namespace"], port["port"], port["kind"], port["memory"]) == ("robot", "frames", "focus", "shm")
    assert port["carries"] == "uint8 [4, 6]"
    assert [port[key] for key in ("depth", "loaned", "ready", "held", "free")] == [4, 1, 2, 1, 0]
    assert port["counts"]["sent"] == 3
    (owner,) = port["owners"]
    assert owner["pid"] == other.pid
    assert (owner["alive"], owner["sends"], owner["receives"], owner["loaned"], owner["held"]) == (
        True,
        True,
        True,
        1,
        1,
    )
    assert main(["mailbox", "ls"]) == 0
    text = capsys.readouterr().out
    assert "robot/frames" in text
    assert f":{other.pid}→←" in text


def test_ls_tells_the_dead_from_the_living(other: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]) -> None:
    other.kill()
    other.wait()
    (port,) = report(capsys, "ls", "robot")["ports"]
    assert [owner["alive"] for owner in port["owners"]] == [False]
    assert port["held"] == 1, "looking takes nothing back"


def test_what_a_killed_process_held_is_counted_when_it_comes_back(
    other: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    other.kill()
    other.wait()
    with Mailbox("robot").focus("frames", FRAMES):
        (port,) = report(capsys, "ls")["ports"]
    assert port["counts"]["reclaimed"] == 2
    assert (port["loaned"], port["held"]) == (0, 0)


def test_removing_a_port_leaves_the_files_of_its_namesakes(tmp_path: Path) -> None:
    folder = tmp_path / "shm" / "robot"
    with Mailbox("robot").focus("frames", FRAMES), Mailbox("robot").focus("frames.2", FRAMES):
        kept, gone = folder / ".wait.frames.2.5.abc", folder / ".wait.frames.5.abc"
        also_kept, also_gone = folder / ".exchange.frames.2@5", folder / ".exchange.frames@5"
        for path in (kept, gone, also_kept, also_gone):
            path.touch()
        Mailbox("robot").remove("frames")
        assert [path.exists() for path in (kept, also_kept, gone, also_gone)] == [True, True, False, False]


def test_ls_without_ports_and_with_an_unknown_namespace(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mailbox", "ls"]) == 0
    assert "no ports" in capsys.readouterr().out
    assert main(["mailbox", "ls", "nowhere"]) == 2
    assert "namespace 'nowhere': not here" in error_of(capsys)


def test_top_gives_rates_and_latencies_of_the_interval(capsys: pytest.CaptureFixture[str]) -> None:
    with Mailbox("robot").focus("frames", FRAMES) as port:
        port.loan().send()
        port.receive(0).release()  # type: ignore[union-attr]
        before = look()
        for _ in range(10):
            port.loan().send()
            port.receive(0).release()  # type: ignore[union-attr]
        for _ in range(6):  # two more than there is room for
            port.loan().send()
        (row,) = rows(look(), before, 2.0)
        assert row["rates_per_s"]["sent"] == 8
        assert row["rates_per_s"]["received"] == 5
        assert row["rates_per_s"]["dropped"] == 1
        assert 0 < row["latency_us"]["p50"] <= row["latency_us"]["p99"]
        assert main(["mailbox", "top", "--interval", "0.05", "--count", "2", "--json"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(lines) == 2
        assert lines[0]["ports"][0]["rates_per_s"]["sent"] == 0
        assert lines[0]["ports"][0]["latency_us"] == {"p50": None, "p99": None}
        assert main(["mailbox", "top", "--interval", "0.05", "--count", "1"]) == 0
        assert "robot/frames" in capsys.readouterr().out


def test_rates_do_not_mix_a_port_with_its_namesake() -> None:
    mailbox = Mailbox("robot")
    with mailbox.focus("frames", FRAMES) as port:
        for _ in range(3):
            port.loan().send()
        before = look()
    mailbox.remove("frames")
    with mailbox.focus("frames", FRAMES):
        (row,) = rows(look(), before, 1.0)
    assert row["rates_per_s"] is None


def test_tap_saves_tensors_and_takes_nothing(
    other: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main(["mailbox", "tap", "robot/frames", "--count", "3", "-o", str(folder), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["tag"] for line in lines] == [0, 1, 2], "what is held can be seen, too"
    assert {line["dtype"] for line in lines} == {"uint8"}
    for value, line in enumerate(lines):
        with np.load(line["saved"]) as saved:
            np.testing.assert_array_equal(saved["tensor"], np.full((4, 6), value, np.uint8))
            assert float(saved["trust"]) == pytest.approx(0.5, abs=1e-4)
            assert int(saved["generation"]) == line["generation"]
    assert report(capsys, "ls")["ports"][0]["ready"] == 2


def test_tap_prints_records_as_they_come(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with Mailbox("default").broadcast("scores", RECORDS) as port:
        for number in range(3):
            port.send(np.array((number, 0.5), RECORDS.record_dtype))
        assert main(["mailbox", "tap", "scores", "--count", "2", "--json"]) == 0
        lines = [json.loads(line)["record"] for line in capsys.readouterr().out.splitlines()]
        assert lines == [{"number": 0, "score": 0.5}, {"number": 1, "score": 0.5}]
        assert main(["mailbox", "tap", "scores", "--seconds", "0.2"]) == 0
        text = capsys.readouterr().out
        assert "number=2 score=0.5" in text
        assert "3 shown, 0 passed unseen" in text
        assert main(["mailbox", "tap", "scores", "-o", str(tmp_path)]) == 2
        assert "saves tensors of focus ports" in error_of(capsys)


def test_tap_ends_by_time_where_nothing_comes(capsys: pytest.CaptureFixture[str]) -> None:
    with Mailbox("default").focus("silent", FRAMES):
        began = time.monotonic()
        assert main(["mailbox", "tap", "silent", "--seconds", "0.1"]) == 0
        assert 0.1 <= time.monotonic() - began < 10
    assert "0 shown" in capsys.readouterr().out
    assert main(["mailbox", "tap", "silence"]) == 2
    assert "default/silence: no such port" in error_of(capsys)


def test_rm_spares_what_a_living_process_uses(other: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mailbox", "rm", "robot/frames"]) == 2
    assert f":{other.pid}; stop them first, or give --force" in error_of(capsys)
    other.kill()
    other.wait()
    assert report(capsys, "rm", "robot/frames") == {"removed": ["robot/frames"]}
    assert Mailbox("robot").names() == []


def test_rm_force_and_all(other: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]) -> None:
    with Mailbox("robot").broadcast("scores", RECORDS):
        pass
    assert report(capsys, "rm", "--all", "robot", "--force") == {"removed": ["robot/frames", "robot/scores"]}


@pytest.mark.parametrize("arguments", [["rm"], ["rm", "a", "--all", "b"], []])
def test_wrong_use_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mailbox", *arguments]) == 2
    assert "expected ls, top" in (text := error_of(capsys)) or "either PORTs or --all" in text


def test_selftest_measures_and_checks(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "--selftest")
    assert found["ok"]
    assert {trip["wait"] for trip in found["trips"]} == {"poll", "block"}
    assert all(trip["latency"]["p50_ms"] > 0 for trip in found["trips"])
    assert found["memory"]["shm"] is None
    assert set(found["memory"]) == {"shm", "shm+cuda", "vmm"}


def test_selftest_fails_when_slots_do_not_come_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sage_edge.bench import mailbox_selftest

    monkeypatch.setattr(mailbox_selftest, "recover", lambda: 0.5)
    assert main(["mailbox", "--selftest"]) == 1
    assert "FAILED: slots of a killed process" in capsys.readouterr().out
