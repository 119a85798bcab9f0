"""One suite for the device interface: the null device, and the CUDA one over a stand-in for the runtime API.

The real CUDA runtime is used where it says something without a GPU: that there is none.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sage_edge.engines import accelerator_cuda
from sage_edge.engines.accelerator import CaptureError, Device, OutOfMemoryError
from sage_edge.engines.accelerator_cuda import CudaDevice
from sage_edge.engines.accelerator_null import NullDevice
from sage_edge.errors import DeviceLostError, EngineError, MissingDependencyError

real = pytest.importorskip("cuda.bindings.runtime")
from tests.devices.fake_cuda import FakeCuda  # noqa: E402  (needs the binding)

MEMORY = 1 << 20


@pytest.fixture(params=["null", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    made: Device = NullDevice(MEMORY) if request.param == "null" else CudaDevice(api=FakeCuda(memory=MEMORY))
    with made:
        yield made


def numbers(count: int, start: int = 0) -> Any:
    return np.arange(start, start + count, dtype=np.uint8)


def test_what_goes_up_comes_down_after_the_event(device: Device) -> None:
    stream, memory, landing = device.stream("normal"), device.allocate(64), device.pinned(64)
    source = numbers(64)
    stream.upload(memory.address, source)
    source[:] = 0  # the array is the caller's again
    stream.copy(landing.address, memory.address, 64)
    event = stream.record()
    event.synchronize()
    assert event.done()
    np.testing.assert_array_equal(landing.array, numbers(64))
    stream.zero(landing.address + 8, 8)
    stream.synchronize()
    assert landing.array[8:16].sum() == 0
    assert landing.array[7] == 7


def test_the_null_device_works_only_when_waited_for() -> None:
    device = NullDevice()
    stream, landing = device.stream("normal"), device.pinned(4)
    stream.zero(landing.address, 4)
    event = stream.record()
    assert not event.done()
    assert landing.array.tolist() == [255] * 4  # new memory is poisoned, and nothing has run
    event.synchronize()
    assert landing.array.tolist() == [0] * 4


def test_a_stream_waits_for_the_event_of_another() -> None:
    device = NullDevice()
    first, second = device.stream("normal"), device.stream("high")
    memory, landing = device.allocate(4), device.pinned(4)
    first.upload(memory.address, numbers(4))
    second.wait(first.record())
    second.copy(landing.address, memory.address, 4)
    second.synchronize()
    assert landing.array.tolist() == [0, 1, 2, 3]


def test_waiting_for_what_cannot_come_is_an_error_not_a_hang() -> None:
    device = NullDevice()
    event = device.stream("normal").record()
    event.reached = False
    event._stream._queue.clear()
    with pytest.raises(RuntimeError, match="deadlock"):
        event.synchronize()


def test_a_graph_repeats_what_was_captured_and_capturing_does_nothing(device: Device) -> None:
    stream, memory, landing = device.stream("normal"), device.allocate(4), device.pinned(4)
    stream.zero(landing.address, 4)
    stream.synchronize()
    graph = stream.capture(lambda: stream.copy(landing.address, memory.address, 4))
    stream.upload(memory.address, numbers(4, 1))
    stream.synchronize()
    assert landing.array.sum() == 0
    for start in (1, 5):
        stream.upload(memory.address, numbers(4, start))
        graph.launch(stream)
        stream.synchronize()
        assert landing.array.tolist() == list(range(start, start + 4))
    graph.free()


def test_memory_runs_out_and_comes_back(device: Device) -> None:
    held = device.allocate(MEMORY - 1024)
    assert device.free_bytes() == 1024
    with pytest.raises(OutOfMemoryError):
        device.allocate(4096)
    held.free()
    held.free()  # a second time: nothing happens
    assert device.free_bytes() == MEMORY
    device.allocate(4096).free()


def test_the_null_device_refuses_addresses_that_are_not_live() -> None:
    device = NullDevice()
    stream, memory = device.stream("normal"), device.allocate(16)
    with pytest.raises(RuntimeError, match="illegal address: 17 bytes"):
        stream.zero(memory.address, 17)
    stream.zero(memory.address, 16)
    memory.free()
    with pytest.raises(RuntimeError, match="illegal address"):  # freed while work was under way
        stream.synchronize()


def test_high_priority_is_the_lower_number() -> None:
    api = FakeCuda()
    with CudaDevice(api=api) as device:
        normal, high = device.stream("normal"), device.stream("high")
        assert api.priorities[high.handle] < api.priorities[normal.handle]


def test_everything_is_given_back() -> None:
    api = FakeCuda()
    with CudaDevice(api=api) as device:
        device.allocate(64)
        device.pinned(64)
        stream = device.stream("normal")
        stream.record().synchronize()
        stream.capture(lambda: stream.zero(device.allocate(8).address, 8)).free()
    assert (api.arrays, api.priorities, api.graphs, api.events) == ({}, {}, {}, set())


def test_info_names_the_gpu() -> None:
    with CudaDevice(api=FakeCuda(capability=(8, 7), name=b"Orin")) as device:
        assert device.info.key == "cuda/Orin sm_87"
        assert device.info.versions == {"cuda-driver": "13.2", "cuda-runtime": "12.6"}


@pytest.mark.parametrize(
    ("status", "error", "code", "message"),
    [
        ("cudaErrorIllegalAddress", DeviceLostError, 3, "lost to this process, start a new one"),
        ("cudaErrorLaunchFailure", DeviceLostError, 3, "lost to this process"),
        ("cudaErrorMemoryAllocation", OutOfMemoryError, 1, "cudaMemsetAsync: cudaErrorMemoryAllocation: out of memory"),
        ("cudaErrorInvalidValue", EngineError, 1, "cudaErrorInvalidValue: invalid argument"),
        ("cudaErrorInsufficientDriver", MissingDependencyError, 2, "no usable CUDA driver"),
    ],
)
def test_a_status_becomes_the_error_that_says_what_to_do(
    status: str, error: type[EngineError], code: int, message: str
) -> None:
    api = FakeCuda()
    with CudaDevice(api=api) as device:
        memory, stream = device.allocate(8), device.stream("normal")
        api.fail("cudaMemsetAsync", status)
        with pytest.raises(error, match=message) as caught:
            stream.zero(memory.address, 8)
        assert type(caught.value) is error
        assert caught.value.exit_code == code


@pytest.mark.parametrize("function", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_a_capture_that_fails_says_why_and_leaves_the_stream_usable(function: str) -> None:
    api = FakeCuda()
    with CudaDevice(api=api) as device:
        memory, stream = device.pinned(8), device.stream("normal")
        api.fail(function, "cudaErrorStreamCaptureUnsupported")
        with pytest.raises(CaptureError, match=f"{function}: cudaErrorStreamCaptureUnsupported"):
            stream.capture(lambda: stream.zero(memory.address, 8))
        api.capturing.clear()
        stream.zero(memory.address, 8)
        assert memory.array.sum() == 0


def test_an_error_inside_a_capture_ends_it() -> None:
    api = FakeCuda()
    with CudaDevice(api=api) as device:
        memory, stream = device.allocate(8), device.stream("normal")
        api.fail("cudaMemsetAsync", "cudaErrorStreamCaptureImplicit")
        with pytest.raises(CaptureError, match="cudaErrorStreamCaptureImplicit"):
            stream.capture(lambda: stream.zero(memory.address, 8))
        assert api.capturing == {}
        api.fail("cudaMemsetAsync", "cudaErrorIllegalAddress")
        with pytest.raises(DeviceLostError):
            stream.capture(lambda: stream.zero(memory.address, 8))


def test_the_real_runtime_without_a_gpu_says_so() -> None:
    (status, _) = real.cudaGetDeviceCount()
    if status.name == "cudaSuccess":
        pytest.skip("this machine has a GPU")
    with pytest.raises(MissingDependencyError, match=r"no usable CUDA driver or GPU: cudaGetDeviceCount: cudaError"):
        CudaDevice().open()


def test_every_function_that_is_called_exists_in_the_real_binding() -> None:
    """And so do those of the stand-in, so that the tests above speak of the real API."""
    tree = ast.parse(Path(accelerator_cuda.__file__).read_text(encoding="utf-8"))
    names = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    used = {n for n in names if n.startswith("cuda") and n.isidentifier()}
    used |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr.startswith("cuda")}
    used |= {n for n in vars(FakeCuda) if n.startswith("cuda")}
    known = set(dir(real)) | set(real.cudaError_t.__members__)
    known |= set(real.cudaMemcpyKind.__members__) | set(real.cudaStreamCaptureMode.__members__)
    assert len(used) > 40
    assert used - known == set()
