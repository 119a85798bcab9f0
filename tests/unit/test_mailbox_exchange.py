"""Descriptors and event names from process to process: answered, refused by the dead, and no mistake about the stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sage_edge.mailbox import exchange
from sage_edge.mailbox.driver import DeviceError
from sage_edge.mailbox.exchange import EVENT, MEMORY, Answer, Exchange, ask, participants

SERVER = """
import os, sys, time
from pathlib import Path
from sage_edge.mailbox.exchange import Answer, Exchange, EVENT, MEMORY
memory = os.memfd_create("test")
os.write(memory, b"payload of another process")
def provide(what, index):
    if what == MEMORY:
        return Answer(created=7, opened=8, size=26, descriptor=os.dup(memory))
    return Answer(created=7, opened=8, handle=b"event %d" % index) if index < 2 else None
exchange = Exchange(Path(sys.argv[1]), "camera", 3, provide)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_descriptor_arrives_and_is_the_same_memory(server: subprocess.Popen[str], tmp_path: Path) -> None:
    answer = ask(tmp_path, "camera", 3, MEMORY)
    assert answer is not None
    assert (answer.created, answer.opened, answer.size) == (7, 8, 26)
    assert os.pread(answer.descriptor, 100, 0) == b"payload of another process"
    assert not os.get_inheritable(answer.descriptor)
    os.close(answer.descriptor)


def test_an_event_by_number_and_none_where_there_is_none(server: subprocess.Popen[str], tmp_path: Path) -> None:
    answer = ask(tmp_path, "camera", 3, EVENT, 1)
    assert answer is not None
    assert (answer.handle.rstrip(b"\0"), answer.descriptor) == (b"event 1", -1)
    assert ask(tmp_path, "camera", 3, EVENT, 9) is None
    assert ask(tmp_path, "camera", 4, EVENT, 1) is None


def test_the_socket_is_private(server: subprocess.Popen[str], tmp_path: Path) -> None:
    assert (tmp_path / ".exchange.camera@3").stat().st_mode & 0o777 == 0o600


def test_a_killed_process_is_not_there_and_its_index_can_be_used_again(
    server: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert participants(tmp_path, "camera") == [3]
    server.kill()
    server.wait()
    assert ask(tmp_path, "camera", 3, MEMORY) is None
    again = Exchange(tmp_path, "camera", 3, lambda what, index: Answer(created=1, opened=2))
    assert ask(tmp_path, "camera", 3, EVENT) == Answer(created=1, opened=2, handle=bytes(64))
    again.close()
    assert participants(tmp_path, "camera") == []


def test_a_stopped_process_is_not_taken_for_a_dead_one(
    server: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "ANSWER_S", 0.2)
    server.send_signal(signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(server.pid, os.WUNTRACED)[1])
    with pytest.raises(DeviceError, match="does not answer; is its process stopped"):
        ask(tmp_path, "camera", 3, MEMORY)
    server.send_signal(signal.SIGCONT)
    assert ask(tmp_path, "camera", 3, EVENT, 0) is not None


@pytest.mark.parametrize("question", [b"", b"short", b"WRONGMAG" + bytes(8), bytes(200)])
def test_nonsense_gets_no_answer_and_harms_nobody(
    question: bytes, server: subprocess.Popen[str], tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(str(tmp_path / ".exchange.camera@3"))
        connection.send(question)
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(5)
        assert connection.recv(200) == b""
    assert ask(tmp_path, "camera", 3, EVENT, 0) is not None


def test_a_long_name_of_a_directory_does_not_matter(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 60)
    deep.mkdir(parents=True)
    port = "p" * 63
    server = Exchange(deep, port, 63, lambda what, index: Answer(created=1, opened=index))
    found = ask(deep, port, 63, EVENT, 5)
    assert found is not None
    assert found.opened == 5
    server.close()


def test_ports_whose_names_begin_alike_are_told_apart(tmp_path: Path) -> None:
    one = Exchange(tmp_path, "camera", 1, lambda what, index: None)
    two = Exchange(tmp_path, "camera.2", 4, lambda what, index: None)
    assert participants(tmp_path, "camera") == [1]
    assert participants(tmp_path, "camera.2") == [4]
    one.close()
    two.close()
