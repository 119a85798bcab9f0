"""The C++ core by itself: a kill after every instruction, ThreadSanitizer, and AArch64 where its compiler is found."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

MAILBOX = Path(__file__).resolve().parents[2] / "mailbox"
COMPILER = shutil.which("g++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ here")


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="sage-edge-test-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


def compile_(program: str, target: Path, *options: str, sources: Path = MAILBOX / "src", compiler: str = "g++") -> None:
    command = [
        compiler, "-std=c++17", "-Wall", "-Wextra", *options, f"-I{MAILBOX / 'include'}", f"-I{MAILBOX / 'src'}",
        *map(str, sorted(sources.glob("*.cpp"))), str(MAILBOX / "tests" / program), "-o", str(target), "-pthread",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in done.stderr and "san" in done.stderr:
        pytest.skip("this compiler has no ThreadSanitizer")
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr


def test_a_kill_after_every_instruction(tmp_path: Path, directory: Path) -> None:
    """Each operation is single-stepped and killed after 0, 1, 2, ... machine instructions; the survivor finds all in order."""
    compile_("every_instruction.cpp", tmp_path / "program", "-O2", "-static")
    done = subprocess.run([str(tmp_path / "program"), str(directory)], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("ptrace is not permitted here")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 7
    assert all(int(line.rsplit(" ", 2)[1]) > 30 for line in lines)  # each operation is many instructions long


def run_threads(program: Path, directory: Path, items: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), str(directory), str(items)], capture_output=True, text=True)


TSAN = ("-O1", "-g", "-fsanitize=thread", "-Wno-tsan")  # a fence is not modelled; what it orders is atomic anyway


def test_threads_without_a_race(tmp_path: Path, directory: Path) -> None:
    compile_("threads.cpp", tmp_path / "program", *TSAN)
    done = run_threads(tmp_path / "program", directory, 5000)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "10000 items\n"


@pytest.mark.parametrize(
    "sound",
    [
        # release: without the release order the next loan writes while the last holder may still read
        "make_word(ticket_of(word), 0, State::Free), memory_order_seq_cst",
        # send: without the release order the receiver may see READY before the payload
        "make_word(ticket, index(), State::Ready), memory_order_seq_cst",
    ],
    ids=["release", "send"],
)
def test_a_missing_order_is_found(tmp_path: Path, directory: Path, sound: str) -> None:
    """The sanitizer's silence above means something: one order taken away, and it speaks."""
    sources = tmp_path / "src"
    shutil.copytree(MAILBOX / "src", sources)
    focus = (sources / "focus.cpp").read_text()
    assert focus.count(sound) == 1
    (sources / "focus.cpp").write_text(focus.replace(sound, sound.replace("seq_cst", "relaxed")))
    compile_("threads.cpp", tmp_path / "program", *TSAN, sources=sources)
    done = run_threads(tmp_path / "program", directory, 3000)
    assert done.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in done.stderr


def test_aarch64(tmp_path: Path) -> None:
    """Compiles without a warning. qemu-user cannot run it: it shows each thread another start time for the process."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no compiler for AArch64 here (Debian: g++-aarch64-linux-gnu)")
    options = ("-O2", "-static", "-Werror", "-Wconversion", "-Wshadow")
    compile_("threads.cpp", tmp_path / "program", *options, compiler=compiler)
