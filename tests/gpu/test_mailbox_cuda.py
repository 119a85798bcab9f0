"""The mailbox on a CUDA device: registered memory, device memory between processes, events in order, kernels at ports.

Run on any machine with a device: `python -m pytest tests/gpu/test_mailbox_cuda.py`. Elsewhere every test is skipped.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sage_edge.errors import SageError
from sage_edge.mailbox import Mailbox, PortSpec, StaleError, _native
from sage_edge.mailbox.cuda import CudaDriver
from sage_edge.mailbox.device_port import DevicePort, ring_view
from sage_edge.mailbox.driver import lacks_register, lacks_sharing
from tests.gpu.kernels import Kernels

pytestmark = pytest.mark.gpu
COUNT = 1 << 20
SPIN_CYCLES = 400_000_000  # some tenths of a second on any device of today


@pytest.fixture(scope="module")
def driver() -> CudaDriver:
    try:
        return CudaDriver()
    except SageError as error:
        pytest.skip(f"no CUDA device: {error}")


@pytest.fixture(scope="module")
def kernels(driver: CudaDriver, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    try:
        return Kernels(driver, tmp_path_factory.mktemp("kernels"))
    except RuntimeError as error:
        if "neither" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(autouse=True)
def private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAGE_EDGE_SHM", str(tmp_path / "shm"))


@pytest.fixture(params=["shm+cuda", "vmm"])
def memory(request: pytest.FixtureRequest, driver: CudaDriver) -> str:
    kind: str = request.param
    reason = lacks_register(driver.facts()) if kind == "shm+cuda" else lacks_sharing(driver.facts())
    if reason:
        pytest.skip(reason)
    return kind


def opened(memory: str, name: str = "tensor", count: int = COUNT) -> DevicePort:
    spec = PortSpec(kind="focus", dtype="float32", shape=(count,), depth=3, memory=memory)  # type: ignore[arg-type]
    return DevicePort(Mailbox("cuda").focus(name, spec))


def stream_of(driver: CudaDriver) -> Any:
    driver._enter()
    return driver._call("cuStreamCreate", driver.cuda.CUstream_flags.CU_STREAM_NON_BLOCKING.value)


def address(tensor: Any) -> Any:
    return np.uint64(tensor.__cuda_array_interface__["data"][0])


def to_host(driver: CudaDriver, tensor: Any, count: int = COUNT) -> np.ndarray:
    out = np.empty(count, np.float32)
    driver._enter()
    driver._call("cuMemcpyDtoH", out.ctypes.data, int(address(tensor)), out.nbytes)
    return out


PRELUDE = """
import sys, time
from pathlib import Path
import numpy as np
from tests.gpu.test_mailbox_cuda import *
driver = devices.driver_of(devices.make_driver)
kernels = Kernels(driver, Path(sys.argv[2]))
stream = stream_of(driver)
port = opened(sys.argv[1])
"""


@pytest.fixture
def other(memory: str, tmp_path: Path) -> Iterator[Any]:
    started: list[subprocess.Popen[str]] = []

    def start(script: str) -> subprocess.Popen[str]:
        prelude = PRELUDE.replace("driver = ", "from sage_edge.mailbox import devices\ndriver = ")
        command = [sys.executable, "-c", prelude + script, memory, str(tmp_path)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def heard(process: subprocess.Popen[str], wanted: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().strip() == wanted


def test_the_device_is_described(driver: CudaDriver) -> None:
    facts = driver.facts()
    print(facts)
    assert facts.name


def test_a_tensor_made_by_one_processs_kernel_is_read_by_anothers(memory: str, other: Any, driver: CudaDriver,
                                                                  kernels: Kernels) -> None:  # fmt: skip
    process = other("""
t = port.loan()
kernels.launch("linger", 1, 256, stream, address(t), np.float32(3), np.uint64(COUNT), np.int64(0))
t.send(stream=stream)
print("sent", flush=True)
sys.stdin.readline()
""")
    heard(process, "sent")
    stream = stream_of(driver)
    with opened(memory) as port, opened(memory, "result") as result:
        item, loan = port.receive(10, stream=stream), result.loan()
        assert item is not None
        kernels.launch("scale", 64, 256, stream, address(item), address(loan), np.float32(2), np.uint64(COUNT))
        loan.send(stream=stream)
        item.release(stream=stream)
        done = result.receive(10)
        assert done is not None
        np.testing.assert_array_equal(to_host(driver, done), 6)
        done.release()


def test_send_does_not_wait_for_the_kernel_and_receive_does(memory: str, other: Any, driver: CudaDriver,
                                                            kernels: Kernels) -> None:  # fmt: skip
    process = other("""
t = port.loan()
kernels.launch("linger", 1, 256, stream, address(t), np.float32(1), np.uint64(COUNT), np.int64(1))
driver.synchronize(stream)
began = time.monotonic()
kernels.launch("linger", 1, 256, stream, address(t), np.float32(9), np.uint64(COUNT), np.int64(SPIN_CYCLES))
t.send(stream=stream)
print("early" if time.monotonic() - began < 0.05 else "late", flush=True)
sys.stdin.readline()
""")
    with opened(memory) as port:
        heard(process, "early")
        item = port.receive(10)
        assert item is not None
        np.testing.assert_array_equal(to_host(driver, item), 9)
        item.release()


def test_a_producer_that_is_killed_in_its_kernel_leaves_nothing_to_receive(memory: str, other: Any) -> None:
    process = other("""
t = port.loan()
kernels.launch("linger", 1, 256, stream, address(t), np.float32(9), np.uint64(COUNT), np.int64(20 * SPIN_CYCLES))
t.send(stream=stream)
print("sent", flush=True)
sys.stdin.readline()
""")
    with opened(memory) as port:
        heard(process, "sent")
        process.kill()
        process.wait()
        with pytest.raises(StaleError):
            port.receive(10)
        assert port.port.stats().held == 0


def test_the_cpu_reads_registered_memory_and_not_the_devices(memory: str, driver: CudaDriver) -> None:
    with opened(memory) as port:
        loan = port.loan()
        if memory == "vmm":
            with pytest.raises(SageError, match="memory of a device"):
                _ = loan.array
        else:
            loan.array[:] = 4
            np.testing.assert_array_equal(to_host(driver, loan), 4)
        loan.cancel()


@pytest.mark.parametrize("library", ["torch", "cupy"])
def test_other_libraries_take_the_tensor_without_a_copy(memory: str, driver: CudaDriver, kernels: Kernels,
                                                        library: str) -> None:  # fmt: skip
    module = pytest.importorskip(library)
    if library == "torch" and not module.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    with opened(memory) as port:
        loan = port.loan()
        kernels.launch("linger", 1, 256, None, address(loan), np.float32(5), np.uint64(COUNT), np.int64(0))
        loan.send(stream=None)
        item = port.receive(10)
        assert item is not None
        taken = module.from_dlpack(item)
        assert (taken.data_ptr() if library == "torch" else taken.data.ptr) == int(address(item))
        assert float(taken.sum()) == 5.0 * COUNT
        del taken
        item.release(stream=None)


def test_a_kernel_receives_and_sends_by_itself(driver: CudaDriver, kernels: Kernels) -> None:
    facts = driver.facts()
    if not facts.host_register or not facts.native_atomics:
        pytest.skip(f"{facts.name} has no native atomics with the CPU: kernels may not change slot words")
    with opened("shm+cuda", "in", 4096) as feed, opened("shm+cuda", "out", 4096) as drain:
        with opened("shm+cuda", "in", 4096) as kernel_in, opened("shm+cuda", "out", 4096) as kernel_out:
            for value in (1, 2):
                with feed.loan() as t:
                    t.array[:] = value
                    t.send()
            done = np.zeros(2, np.uint64)
            seen = driver.register(done.ctypes.data, done.nbytes)
            now = np.uint64(time.monotonic_ns())
            kernels.launch("pump", 1, 128, None, kernel_in.kernel_view(), kernel_out.kernel_view(), np.float32(10),
                           np.uint32(2), np.uint32(1000), now, np.uint64(seen))  # fmt: skip
            driver.synchronize(None)
            driver.unregister(done.ctypes.data)
            assert done.tolist() == [2, 0]
            kernel_out.signal()
            for value in (10, 20):
                item = drain.receive(1)
                assert item is not None
                np.testing.assert_array_equal(item.array, value)
                item.release()
        assert feed.port.stats().free == drain.port.stats().free == 3


def test_kernels_write_and_read_rings(driver: CudaDriver, kernels: Kernels) -> None:
    if reason := lacks_register(driver.facts()):
        pytest.skip(reason)
    spec = PortSpec(kind="broadcast", depth=63, producers=1, fields={"number": "uint64"})
    mailbox = Mailbox("cuda")
    with mailbox.broadcast("records", spec) as port, mailbox.broadcast("records", spec) as reader:
        port.send(np.array((0,), spec.record_dtype))
        base, size = _native.mapping(port)[:2]
        seen = driver.register(base, size)
        view = ring_view(port, 0, seen)
        kernels.launch("publish", 1, 1, None, view, np.uint64(1), np.uint32(50), np.uint64(time.monotonic_ns()))
        driver.synchronize(None)
        _native.signal(port)
        got = [int(record["number"]) for _ in range(51) if (record := reader.receive(1)) is not None]
        assert got == list(range(51))
        out = np.zeros(66, np.uint64)
        there = driver.register(out.ctypes.data, out.nbytes)
        kernels.launch("collect", 1, 1, None, view, np.uint64(0), np.uint32(64), np.uint32(10), np.uint64(there))
        driver.synchronize(None)
        driver.unregister(out.ctypes.data)
        driver.unregister(base)
        assert out[:2].tolist() == [51, 0]
        assert out[2:53].tolist() == list(range(51))
