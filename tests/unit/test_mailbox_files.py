"""Whom a port lets in, and what it believes: permissions, headers, and memory that somebody scribbles in."""

from __future__ import annotations

import json
import os
import random
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sage_edge.errors import InputError, IntegrityError, MissingDependencyError
from sage_edge.mailbox import FocusPort, Mailbox, MismatchError, PortSpec, PortTable, StaleError, layout
from sage_edge.mailbox.memory import memory_kind
from tests.mailbox_peers import RECORD, TABLE, TENSOR


@pytest.fixture
def mailbox(mailbox_memory: Path) -> Mailbox:
    return Mailbox("test", TABLE)


def patch(mailbox: Mailbox, name: str, at: int, data: bytes) -> None:
    with (mailbox.directory / name).open("r+b") as file:
        file.seek(at)
        file.write(data)


def test_files_are_private(mailbox: Mailbox) -> None:
    os.umask(old := os.umask(0o000))
    os.umask(0o000)
    try:
        with mailbox.focus("tensor"):
            for path, mode in ((mailbox.directory, 0o700), (mailbox.directory / "tensor", 0o600)):
                assert stat.S_IMODE(path.stat().st_mode) == mode
                assert path.stat().st_uid == os.geteuid()
    finally:
        os.umask(old)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o700, 0o400])
def test_a_file_that_others_may_open_is_refused(mailbox: Mailbox, mode: int) -> None:
    mailbox.focus("tensor").close()
    (mailbox.directory / "tensor").chmod(mode)
    with pytest.raises((MismatchError, InputError), match=r"permissions 0600|Permission denied"):
        mailbox.focus("tensor")


def test_directories_of_others_are_refused(mailbox: Mailbox, mailbox_memory: Path) -> None:
    mailbox.focus("tensor").close()
    mailbox.directory.chmod(0o750)
    with pytest.raises(InputError, match="permissions 0700, found user .*, permissions 0750"):
        mailbox.focus("tensor")
    mailbox.directory.chmod(0o700)
    mailbox.directory.rename(mailbox_memory / "elsewhere")
    mailbox.directory.symlink_to(mailbox_memory / "elsewhere")
    with pytest.raises(InputError, match="not a directory that can be used"):
        mailbox.focus("tensor")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_another_user_sees_nothing(mailbox: Mailbox) -> None:
    with mailbox.focus("tensor"):
        pid = os.fork()
        if pid == 0:
            os.setuid(12345)
            try:
                os.open(mailbox.directory / "tensor", os.O_RDONLY)
            except PermissionError:
                os._exit(0)
            os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0


def test_a_link_or_a_folder_in_a_ports_place_is_refused(mailbox: Mailbox, mailbox_memory: Path) -> None:
    mailbox.focus("tensor").close()
    file = mailbox.directory / "tensor"
    file.rename(mailbox_memory / "real")
    file.symlink_to(mailbox_memory / "real")
    with pytest.raises(InputError, match="cannot open the port"):
        mailbox.focus("tensor")
    file.unlink()
    file.mkdir()
    with pytest.raises((InputError, MismatchError)):
        mailbox.focus("tensor")
    file.rmdir()
    os.mkfifo(file, 0o600)
    with pytest.raises(MismatchError, match="a regular file"):
        mailbox.focus("tensor")


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "A", "x" * 64, "a b", "ä"])
def test_names_that_are_no_names(mailbox: Mailbox, name: str) -> None:
    with pytest.raises(InputError, match="expected 1-63 of"):
        mailbox.focus(name, TENSOR)
    with pytest.raises(InputError, match="expected 1-63 of"):
        Mailbox(name)
    with pytest.raises(InputError, match="expected 1-63 of"):
        mailbox.remove(name)


def test_another_spec_is_refused_with_both_sides_shown(mailbox: Mailbox) -> None:
    other = PortSpec("focus", 4, dtype="float32", shape=(16,))
    with mailbox.focus("tensor"):
        with pytest.raises(MismatchError) as caught:
            mailbox.focus("tensor", other)
        text = str(caught.value)
        assert "dtype is 'uint8' in memory, 'float32' asked for" in text
        assert TENSOR.canonical() in text
        assert other.canonical() in text
        assert caught.value.exit_code == 2
        with pytest.raises(MismatchError, match="kind is 'focus' in memory, 'broadcast' asked for"):
            mailbox.broadcast("tensor", RECORD)
        with pytest.raises(InputError, match=r"is a broadcast port; open it with broadcast\(\)"):
            mailbox.focus("record")


def test_what_is_not_there(mailbox: Mailbox) -> None:
    assert mailbox.names() == []
    assert Mailbox.namespaces() == []
    with pytest.raises(InputError, match="there are no ports here yet"):
        mailbox.stats("tensor")
    mailbox.focus("tensor").close()
    assert mailbox.names() == ["tensor"]
    assert Mailbox.namespaces() == ["test"]
    with pytest.raises(InputError, match="port nothing: cannot open the port: No such file"):
        mailbox.stats("nothing")
    with pytest.raises(InputError, match="no table of ports"):
        Mailbox("test").focus("tensor")
    with pytest.raises(InputError, match="No such file"):
        mailbox.remove("nothing")


def header_cases() -> list[tuple[str, int, bytes, str]]:
    fields: Any = layout.HEADER.fields
    cases = [
        ("magic", 0, b"SAGEMBOY", r"magic: 584f424d45474153 was expected, the file has 594f4"),
        ("version", 8, (2).to_bytes(4, "little"), r"layout version: this program has 1, the port has 2"),
        ("pid_namespace", 80, (1).to_bytes(8, "little"), r"made in pid namespace 1, this process is in \d+; share"),
    ]
    for name in ("kind", "memory", "participants", "total_bytes", "payload_offset", "payload_bytes", "slots", "rings",
                 "slot_bytes", "record_bytes", "policy", "per_producer", "spec_bytes", "flags"):  # fmt: skip
        dtype, at = fields[name][:2]
        for value in (0xFFFFFFFF, 0x80000000, 0xFFFF0000):
            cases.append(
                (name, int(at), value.to_bytes(4, "little") * (dtype.itemsize // 4), r"does not fit the layout")
            )
    return cases


@pytest.mark.parametrize(("field", "at", "data", "message"), header_cases())
@pytest.mark.parametrize("port", ["tensor", "record"])
def test_a_header_is_checked_before_it_is_believed(
    mailbox: Mailbox, port: str, field: str, at: int, data: bytes, message: str
) -> None:
    open_it = mailbox.focus if port == "tensor" else mailbox.broadcast
    open_it(port).close()
    patch(mailbox, port, at, data)
    with pytest.raises(MismatchError, match=message):
        open_it(port)
    with pytest.raises(MismatchError, match=message):
        mailbox.stats(port)
    mailbox.remove(port)  # a damaged port can be removed, and is then made anew
    open_it(port).close()


@pytest.mark.parametrize("field", ["slots", "slot_bytes", "rings", "record_bytes"])
def test_headers_that_are_consistent_but_lie_about_the_file(mailbox: Mailbox, field: str) -> None:
    mailbox.broadcast("record").close()
    file = mailbox.directory / "record"
    header = np.frombuffer(file.read_bytes()[:4096], layout.HEADER).copy()
    header[field] *= 2
    patch(mailbox, "record", 0, header.tobytes())
    with pytest.raises(MismatchError, match=r"does not fit the layout|do not follow from its spec"):
        mailbox.broadcast("record")


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 80000])
def test_a_file_of_another_size_is_refused(mailbox: Mailbox, size: int) -> None:
    mailbox.focus("tensor").close()
    os.truncate(mailbox.directory / "tensor", size)
    with pytest.raises(MismatchError, match=r"a header of 4096 bytes|total_bytes|magic"):
        mailbox.focus("tensor")


@pytest.mark.parametrize("text", [b"", b"{", b'{"kind":"focus","depth":4,"dtype":"uint8"}', b"\xff\xfe"])
def test_a_spec_in_the_header_that_cannot_be_read(mailbox: Mailbox, text: bytes) -> None:
    mailbox.focus("tensor").close()
    patch(mailbox, "tensor", 96, len(text).to_bytes(4, "little"))
    patch(mailbox, "tensor", 1024, text.ljust(200, b"\0"))
    with pytest.raises(MismatchError):
        mailbox.focus("tensor")
    with pytest.raises(MismatchError, match="spec cannot be read"):
        mailbox.stats("tensor")


def test_creation_is_whole_or_nothing(mailbox: Mailbox) -> None:
    """More memory than there is: an error at once, and nothing left behind."""
    free = os.statvfs("/dev/shm")
    too_much = free.f_bavail * free.f_frsize
    with pytest.raises(InputError, match=r"cannot reserve \d+ bytes of shared memory: No space left"):
        mailbox.focus("big", PortSpec("focus", 4, max_bytes=too_much))
    assert mailbox.names() == []


def test_memory_kinds_are_probed(mailbox: Mailbox) -> None:
    with pytest.raises(MissingDependencyError, match=r"memory 'no-such-kind': not in this version"):
        memory_kind("no-such-kind")
    with mailbox.focus("huge", PortSpec("focus", 2, dtype="u1", shape=(100,), hugepages=True)) as port:
        with port.loan() as loan:
            loan.array[:] = 1
            loan.send()
        item = port.receive(0)
        assert item is not None
        assert item.array.sum() == 100
        assert port.stats().bytes % (2 << 20) == 0


def descriptor_cases() -> list[tuple[str, dict[str, Any]]]:
    return [
        ("id", {"id": 12345 << 16}),
        ("dtype", {"dtype": 0}),
        ("dtype", {"dtype": 99}),
        ("dtype", {"dtype": 11}),  # float32, but the port's is uint8
        ("ndim", {"ndim": 9}),
        ("ndim", {"ndim": layout.STRIDED | 5}),
        ("shape", {"extent": [5000] + [0] * 7}),
        ("shape", {"ndim": 3, "extent": [2**32 - 1] * 3 + [0] * 5}),
        ("shape", {"ndim": 8, "extent": [2**31] * 8}),
        ("shape", {"ndim": 2, "extent": [8, 8] + [0] * 6}),  # fits, but the port's is (64,)
        ("strides", {"ndim": layout.STRIDED | 1, "extent": [64, 0, 0, 0, 66, 0, 0, 0]}),
        ("strides", {"ndim": layout.STRIDED | 2, "extent": [2, 64, 0, 0, 2**32 - 1, 1, 0, 0]}),
        ("strides", {"ndim": layout.STRIDED | 1, "extent": [2**32 - 1, 0, 0, 0, 2**32 - 1, 0, 0, 0]}),
    ]


@pytest.mark.parametrize(("field", "change"), descriptor_cases())
def test_a_descriptor_is_checked_before_it_is_believed(mailbox: Mailbox, field: str, change: dict[str, Any]) -> None:
    with mailbox.focus("tensor") as port:
        with port.loan() as loan:
            loan.send()
        at = layout.round_up(layout.TABLE_OFFSET + 16 * TENSOR.depth, 64)
        with (mailbox.directory / "tensor").open("r+b") as file:
            file.seek(at)
            descriptor = np.frombuffer(file.read(64), layout.DESCRIPTOR).copy()
            for name, value in change.items():
                descriptor[name] = value
            file.seek(at)
            file.write(descriptor.tobytes())
        with pytest.raises(IntegrityError, match=rf"port tensor: {field} is impossible here"):
            port.receive(0)
        assert port.stats().free == TENSOR.depth  # dropped, and the slot is usable
        with port.loan() as loan:
            loan.send()
        item = port.receive(0)
        assert item is not None


def test_a_word_that_was_changed_under_us_is_stale_not_taken(mailbox: Mailbox) -> None:
    with mailbox.focus("tensor") as port:
        loan = port.loan()
        patch(mailbox, "tensor", layout.TABLE_OFFSET, (77 << 16 | layout.LOANED).to_bytes(8, "little"))
        with pytest.raises(StaleError):
            loan.send()


SCRIBBLE = """
import random, sys, threading
from pathlib import Path
import numpy as np
from sage_edge.errors import SageError
from sage_edge.mailbox import Mailbox, layout
from tests.mailbox_peers import TABLE

seed, rounds = int(sys.argv[1]), int(sys.argv[2])
rng = random.Random(seed)
mailbox = Mailbox("scribble", TABLE)
seen = set()
for _ in range(rounds):
    port, ring = mailbox.focus("tensor"), mailbox.broadcast("record")
    record = np.zeros((), ring.record_dtype)
    maps = [np.memmap(mailbox.directory / name, np.uint64, "r+") for name in ("tensor", "record")]
    for _ in range(60):
        memory = rng.choice(maps)
        where = rng.choice([rng.randrange(512, len(memory)), 9248 + rng.randrange(64), rng.randrange(544, 800)]) % len(memory)
        flipped = int(memory[where]) ^ 1 << rng.randrange(64)
        value = rng.choice([0, rng.getrandbits(64), rng.getrandbits(8), (1 << 64) - 1, flipped])
        memory[where] = value
        acts = (lambda: port.loan(timeout=0).send(), lambda: port.receive(0), lambda: ring.send(record),
                lambda: ring.receive(0), ring.latest, lambda: mailbox.stats("tensor"), lambda: mailbox.tap("tensor").read(),
                lambda: mailbox.stats("record"), lambda: mailbox.tap("record").read())
        for act in rng.sample(acts, 4):
            try:
                got = act()
                if hasattr(got, "array"):
                    got.array.sum() if got.array.dtype.names is None else None
            except SageError as error:
                seen.add(type(error).__name__)
    port.close(); ring.close()
    for name in mailbox.names():
        mailbox.remove(name)
print(sorted(seen))
"""


@pytest.mark.parametrize("seed", range(3))
def test_a_process_that_scribbles_in_the_memory_brings_errors_not_crashes(mailbox_memory: Path, seed: int) -> None:
    """Random words anywhere behind the header, between operations: known errors, no crash, no hang, no stray exception."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIBBLE, str(seed), "8"], capture_output=True, text=True, timeout=300,
        cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Error" in done.stdout


def test_sizes_are_not_asked_of_the_memory_again(mailbox: Mailbox) -> None:
    """The header is checked once and copied: what a peer writes there later moves no bound."""
    with mailbox.focus("tensor") as port:
        patch(mailbox, "tensor", 48, (1 << 20).to_bytes(4, "little"))  # slots
        patch(mailbox, "tensor", 56, (1 << 40).to_bytes(8, "little"))  # slot_bytes
        assert isinstance(port, FocusPort)
        for _ in range(20):
            with port.loan() as loan:
                loan.array[:] = 1
                loan.send()
            item = port.receive(0)
            assert item is not None
            assert item.slot < TENSOR.depth
            item.release()


def test_the_table_in_memory_is_json_that_people_can_read(mailbox: Mailbox) -> None:
    with mailbox.focus("tensor"):
        raw = (mailbox.directory / "tensor").read_bytes()[1024:4096].rstrip(b"\0")
    assert json.loads(raw)["shape"] == [64]
    assert re.fullmatch(rb"[ -~]+", raw)


def test_random_tables_open_and_reopen(mailbox_memory: Path) -> None:
    rng = random.Random(5)
    for _ in range(25):
        focus = PortSpec("focus", rng.randint(1, 40), max_bytes=rng.randint(1, 100_000), policy="refuse")
        ring = PortSpec(
            "broadcast", rng.randint(1, 100), fields={"x": f"V{rng.randint(1, 256)}"}, producers=rng.randint(1, 9)
        )
        mailbox = Mailbox("random", PortTable({"f": focus, "b": ring}))
        for _ in range(2):
            with mailbox.focus("f") as port, mailbox.broadcast("b") as other:
                assert port.stats().free == focus.depth
                assert other.stats().depth == ring.depth
        mailbox.remove("f")
        mailbox.remove("b")
