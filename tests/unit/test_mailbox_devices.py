"""Memory kinds and device ports on the null device, between real processes."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sage_edge.errors import InputError
from sage_edge.mailbox import Mailbox, PortSpec, StaleError, devices
from sage_edge.mailbox.device_port import DevicePort
from sage_edge.mailbox.driver import DeviceError, DeviceFacts, choose, lacks_register, lacks_sharing
from sage_edge.mailbox.null_driver import NullDriver, NullStream

KINDS = ("shm+cuda", "vmm")
PRELUDE = """
import sys, time
import numpy as np
from sage_edge.mailbox import Mailbox, PortSpec, devices
from sage_edge.mailbox.device_port import DevicePort
from sage_edge.mailbox.null_driver import NullDriver, NullStream
devices.make_driver = NullDriver
memory = sys.argv[1]
def device_port():
    spec = PortSpec(kind="focus", dtype="float32", shape=(1000,), depth=3, memory=memory)
    return DevicePort(Mailbox("devices").focus("tensor", spec))
def say(text):
    print(text, flush=True)
"""


@pytest.fixture(autouse=True)
def null_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAGE_EDGE_SHM", str(tmp_path / "shm"))
    monkeypatch.setattr(devices, "make_driver", NullDriver)


def opened(memory: str) -> DevicePort:
    spec = PortSpec(kind="focus", dtype="float32", shape=(1000,), depth=3, memory=memory)  # type: ignore[arg-type]
    return DevicePort(Mailbox("devices").focus("tensor", spec))


class Other:
    """Another process that runs `script` and takes and gives lines."""

    def __init__(self, memory: str, script: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + script, memory], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def others() -> Iterator[list[Other]]:
    started: list[Other] = []
    yield started
    for other in started:
        other.kill()
        for pipe in (other.process.stdin, other.process.stdout):
            if pipe is not None:
                pipe.close()


@pytest.mark.parametrize("memory", KINDS)
def test_a_tensor_reaches_another_process_without_a_copy(memory: str, others: list[Other]) -> None:
    others.append(Other(memory, """
port = device_port()
with port.loan() as t:
    t.array[:] = np.arange(1000)
    t.send(trust=0.5)
say("sent")
sys.stdin.readline()
"""))  # fmt: skip
    assert others[0].hear() == "sent"
    with opened(memory) as port, port.receive(5) as item:  # type: ignore[union-attr]
        np.testing.assert_array_equal(item.array, np.arange(1000))
        interface = item.__cuda_array_interface__
        assert (interface["shape"], interface["typestr"], interface["version"]) == ((1000,), "<f4", 3)
        # On the null device, the device's address is an address of this process: the very same bytes.
        address, read_only = interface["data"]
        assert read_only
        assert ctypes.c_float.from_address(address + 4 * 7).value == 7
        assert np.from_dlpack(item)[999] == 999


@pytest.mark.parametrize("memory", KINDS)
def test_an_item_is_received_when_its_device_work_is_done(memory: str, others: list[Other]) -> None:
    others.append(Other(memory, """
import ctypes
port = device_port()
stream = NullStream()
t = port.loan()
address, _ = t.__cuda_array_interface__["data"]
stream.submit(lambda: ctypes.memset(address, 0, 4000))
t.send(stream=stream)
say("enqueued")
sys.stdin.readline()
stream.run()
say("done")
sys.stdin.readline()
"""))  # fmt: skip
    assert others[0].hear() == "enqueued"
    with opened(memory) as port:
        mine, seen = NullStream(), []
        item = port.receive(5, stream=mine)
        assert item is not None
        mine.submit(lambda: seen.append("mine"))
        mine.run()
        assert seen == [], "the consumer's work ran before the producer's"
        others[0].tell()
        assert others[0].hear() == "done"
        assert item.release(stream=mine)  # waits for the consumer's work
        assert seen == ["mine"]


def test_torch_takes_an_item_without_a_copy() -> None:
    torch = pytest.importorskip("torch")
    with opened("shm+cuda") as port:
        with port.loan() as t:
            t.array[:] = np.arange(1000)
            t.send()
        item = port.receive(0)
        assert item is not None
        taken = torch.from_dlpack(item)
        assert taken.data_ptr() == item.__cuda_array_interface__["data"][0]
        assert float(taken.sum()) == 499500
        del taken
        item.release()


@pytest.mark.parametrize("memory", KINDS)
def test_without_a_stream_receive_waits_for_the_device(
    memory: str, others: list[Other], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sage_edge.mailbox.null_driver.WAIT_S", 0.3)
    others.append(Other(memory, """
port = device_port()
t = port.loan()
t.send(stream=NullStream([lambda: False]))
say("enqueued")
sys.stdin.readline()
"""))  # fmt: skip
    assert others[0].hear() == "enqueued"
    with opened(memory) as port:
        with pytest.raises(DeviceError, match="event was not reached"):
            port.receive(5)
        assert port.port.stats().held == 0, "the slot is given back"


@pytest.mark.parametrize("memory", KINDS)
def test_unfinished_work_of_a_killed_process_is_never_handed_out(memory: str, others: list[Other]) -> None:
    others.append(Other(memory, """
port = device_port()
t = port.loan()
t.send(stream=NullStream([lambda: False]))
say("enqueued")
sys.stdin.readline()
"""))  # fmt: skip
    assert others[0].hear() == "enqueued"
    with opened(memory) as port:
        others[0].kill()
        with pytest.raises(StaleError, match="device work writes it is gone"):
            port.receive(5)
        assert port.receive(0) is None
        assert port.port.stats().held == 0


def test_a_process_that_closes_in_order_finishes_its_work_first(others: list[Other]) -> None:
    others.append(Other("shm+cuda", """
port = device_port()
t = port.loan()
t.array[:] = 5
t.send(stream=None)
port.close()
say("closed")
"""))  # fmt: skip
    assert others[0].hear() == "closed"
    with opened("shm+cuda") as port:
        item = port.receive(5)
        assert item is not None
        assert item.array[0] == 5


def test_an_index_used_again_is_not_taken_for_its_former_owner(others: list[Other]) -> None:
    """The killed producer's participant goes to another process, whose events have the same tokens."""
    send = """
port = device_port()
t = port.loan()
t.send(stream=NullStream([lambda: False]))
say("enqueued")
sys.stdin.readline()
"""
    others.append(Other("shm+cuda", send))
    assert others[0].hear() == "enqueued"
    others[0].kill()
    others.append(Other("shm+cuda", send.replace("lambda: False", "")))
    assert others[1].hear() == "enqueued"
    with opened("shm+cuda") as port:
        with pytest.raises(StaleError):
            port.receive(5)
        assert port.receive(5, stream=NullStream()) is not None, "the second one's is sound"


def test_own_events_need_no_other_process() -> None:
    with opened("shm+cuda") as port:
        stream = NullStream()
        port.loan().send(stream=stream)
        mine = NullStream()
        item = port.receive(0, stream=mine)
        assert item is not None
        mine.run()
        assert mine.work
        stream.run()
        mine.run()
        assert not mine.work


def test_vmm_memory_lives_with_its_last_user_and_items_go_with_it(others: list[Other]) -> None:
    script = """
port = device_port()
with port.loan() as t:
    t.array[:] = 7
    t.send()
say("sent")
sys.stdin.readline()
"""
    others.append(Other("vmm", script))
    assert others[0].hear() == "sent"
    first = opened("vmm")
    others[0].kill()
    item = first.receive(5)  # sent without a stream: complete, and the memory is ours, too
    assert item is not None
    assert item.array[0] == 7
    item.release()
    others.append(Other("vmm", script))
    assert others[1].hear() == "sent"
    item = first.receive(5)  # the newcomer took the allocation from us
    assert item is not None
    assert item.array[999] == 7
    item.release()
    first.loan().send()
    others[1].kill()
    first.close()
    again = opened("vmm")
    assert again.receive(0) is None, "what referred to the lost memory is gone"
    assert again.port.stats().free == 3
    again.close()


def test_vmm_does_not_take_a_stopped_process_for_a_dead_one(
    others: list[Other], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sage_edge.mailbox.exchange.ANSWER_S", 0.2)
    others.append(Other("vmm", "port = device_port()\nsay('open')\nsys.stdin.readline()\n"))
    assert others[0].hear() == "open"
    others[0].process.send_signal(signal.SIGSTOP)
    os.waitpid(others[0].process.pid, os.WUNTRACED)
    with pytest.raises(DeviceError, match="is its process stopped"):
        opened("vmm")
    others[0].process.send_signal(signal.SIGCONT)
    opened("vmm").close()


def test_a_file_of_a_removed_port_does_not_lend_its_memory(others: list[Other]) -> None:
    others.append(Other("vmm", "port = device_port()\nsay('open')\nsys.stdin.readline()\n"))
    assert others[0].hear() == "open"
    Mailbox("devices").remove("tensor")
    with opened("vmm") as port:  # a new port of the same name; the old one's process still answers
        port.loan().send()
        assert port.receive(0) is not None


def test_memory_is_part_of_what_both_sides_agree_on() -> None:
    with opened("vmm"), pytest.raises(InputError, match="memory"):
        opened("shm+cuda")


def test_a_port_of_the_cpu_is_no_device_port() -> None:
    port = Mailbox("devices").focus("plain", PortSpec(kind="focus", dtype="uint8", shape=(8,), depth=2))
    with pytest.raises(InputError, match="needs shm\\+cuda or vmm"):
        DevicePort(port)
    port.loan().send()
    with pytest.raises(AttributeError, match="no GPU sees"):
        _ = port.receive(0).__cuda_array_interface__  # type: ignore[union-attr]
    port.close()


def test_kernels_get_a_view_only_where_they_may_change_slot_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("shm+cuda") as port:
        assert len(port.kernel_view()) == 48
        facts = DeviceFacts("a discrete GPU", True, False, True, True, False, False)
        monkeypatch.setattr(NullDriver, "facts", lambda self: facts)
        with pytest.raises(InputError, match="a discrete GPU has no native atomics"):
            port.kernel_view()
    monkeypatch.undo()


def test_registered_memory_is_unregistered_when_the_port_closes() -> None:
    device = devices.driver_of(devices.make_driver)
    assert isinstance(device, NullDriver)
    before = dict(device.registered)
    port = opened("shm+cuda")
    assert len(device.registered) == len(before) + 1
    port.close()
    assert device.registered == before


@pytest.mark.parametrize("memory", KINDS)
def test_memory_stays_as_long_as_an_item_is_looked_at(memory: str) -> None:
    device = devices.driver_of(devices.make_driver)
    assert isinstance(device, NullDriver)
    before = len(device.registered) + len(device._maps)
    port = opened(memory)
    with port.loan() as t:
        t.array[:] = 3
        t.send()
    item = port.receive(0)
    assert item is not None
    port.close()
    assert len(device.registered) + len(device._maps) == before + 1
    assert item.array[999] == 3, "the port is closed, the item is not"
    item.release()
    del item, port, t
    gc.collect()
    assert len(device.registered) + len(device._maps) == before


ORIN = DeviceFacts("Orin", True, True, True, True, True, True)


@pytest.mark.parametrize(
    ("facts", "kind"),
    [
        (None, "shm"),
        (ORIN, "shm+cuda"),
        (DeviceFacts("discrete", True, False, True, True, False, False), "vmm"),
        (DeviceFacts("old discrete", True, False, False, True, False, False), "shm+cuda"),
        (DeviceFacts("nothing", False, False, False, False, False, False), "shm"),
    ],
)
def test_one_choice_for_a_machine(facts: DeviceFacts | None, kind: str) -> None:
    assert choose(facts) == kind


def test_what_a_device_lacks_is_named() -> None:
    assert lacks_register(ORIN) is None
    assert lacks_sharing(ORIN) is None
    poor = DeviceFacts("poor", False, False, False, False, False, False)
    assert "poor cannot register host memory" in str(lacks_register(poor))
    assert "no file descriptors for its memory and no events for other processes" in str(lacks_sharing(poor))
