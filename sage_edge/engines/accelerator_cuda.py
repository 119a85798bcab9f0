"""The device interface over CUDA's runtime API (cuda.bindings, from 12.8 on; no torch).

Every call's status is looked at. What a status means to a user is decided in one place, `_check`: no driver, no device,
out of memory (try with less), or an error after which the context is lost and only a new process helps.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from sage_edge.engines.accelerator import (
    Bytes,
    CaptureError,
    Device,
    DeviceInfo,
    Event,
    Graph,
    Memory,
    OutOfMemoryError,
    Pinned,
    Priority,
    Stream,
)
from sage_edge.errors import DeviceLostError, EngineError, MissingDependencyError

# Errors that leave the CUDA context unusable for the rest of the process (CUDA runtime API, cudaError_t: "This leaves
# the process in an inconsistent state and any further CUDA work will return the same error").
STICKY = frozenset((
    "cudaErrorIllegalAddress", "cudaErrorLaunchFailure", "cudaErrorLaunchTimeout", "cudaErrorAssert",
    "cudaErrorHardwareStackError", "cudaErrorIllegalInstruction", "cudaErrorMisalignedAddress",
    "cudaErrorInvalidAddressSpace", "cudaErrorInvalidPc", "cudaErrorECCUncorrectable", "cudaErrorNvlinkUncorrectable",
    "cudaErrorContained", "cudaErrorTensorMemoryLeak", "cudaErrorExternalDevice", "cudaErrorMpsClientTerminated",
    "cudaErrorUnknown",
))  # fmt: skip
NO_DRIVER = ("cudaErrorInsufficientDriver", "cudaErrorNoDevice", "cudaErrorInitializationError",
             "cudaErrorSystemDriverMismatch", "cudaErrorSystemNotReady", "cudaErrorOperatingSystem")  # fmt: skip


def runtime() -> Any:
    """The module cuda.bindings.runtime. Raises MissingDependencyError."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise MissingDependencyError(
            f"GPU engines need NVIDIA's cuda-bindings ({error}); pip install 'sage-edge[cuda]'"
        ) from error


class CudaDevice(Device):
    """GPU number `index`; `api` stands in for cuda.bindings.runtime in tests."""

    def __init__(self, index: int = 0, api: Any = None) -> None:
        self.index = index
        self.api: Any = api
        self._memory: set[CudaMemory] = set()
        self._streams: list[CudaStream] = []
        self._info: DeviceInfo | None = None

    def call(self, function: str, *arguments: Any) -> Any:
        """A runtime function by name; its results without the status. Raises what the status means."""
        status, *results = getattr(self.api, function)(*arguments)
        _check(self.api, function, status)
        return results[0] if len(results) == 1 else tuple(results)

    def open(self) -> None:
        self.api = self.api or runtime()
        count = self.call("cudaGetDeviceCount")
        if self.index >= count:
            raise MissingDependencyError(f"GPU {self.index} does not exist: CUDA sees {count}")
        self.call("cudaSetDevice", self.index)
        self._info = self._read_info()

    def _read_info(self) -> DeviceInfo:
        properties = self.call("cudaGetDeviceProperties", self.index)
        name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
        driver, library = self.call("cudaDriverGetVersion"), self.call("cudaRuntimeGetVersion")
        return DeviceInfo(
            kind="cuda",
            name=name,
            capability=(int(properties.major), int(properties.minor)),
            memory_bytes=int(properties.totalGlobalMem),
            l2_bytes=int(properties.l2CacheSize),
            processors=int(properties.multiProcessorCount),
            integrated=bool(properties.integrated),
            versions={"cuda-driver": _version(driver), "cuda-runtime": _version(library)},
        )

    def close(self) -> None:
        for memory in list(self._memory):
            memory.free()
        for stream in self._streams:
            self.call("cudaStreamDestroy", stream.handle)
        self._streams.clear()

    def enter_thread(self) -> None:
        # The runtime keeps the current device per thread; a new thread begins with device 0.
        self.call("cudaSetDevice", self.index)

    @property
    def info(self) -> DeviceInfo:
        if self._info is None:
            raise RuntimeError("the device is not open")
        return self._info

    def free_bytes(self) -> int:
        return int(self.call("cudaMemGetInfo")[0])

    def allocate(self, nbytes: int) -> Memory:
        return CudaMemory(self, int(self.call("cudaMalloc", nbytes)), nbytes)

    def pinned(self, nbytes: int) -> Pinned:
        host = int(self.call("cudaHostAlloc", nbytes, self.api.cudaHostAllocMapped))
        return CudaPinned(self, host, int(self.call("cudaHostGetDevicePointer", host, 0)), nbytes)

    def stream(self, priority: Priority) -> CudaStream:
        least, greatest = self.call("cudaDeviceGetStreamPriorityRange")  # a lower number goes first
        level = greatest if priority == "high" else least
        made = CudaStream(self, int(self.call("cudaStreamCreateWithPriority", self.api.cudaStreamNonBlocking, level)))
        self._streams.append(made)
        return made


class CudaMemory(Memory):
    def __init__(self, device: CudaDevice, address: int, nbytes: int) -> None:
        self.device = device
        self.address = address
        self.nbytes = nbytes
        device._memory.add(self)

    def free(self) -> None:
        if self in self.device._memory:
            self.device._memory.remove(self)
            self._free()

    def _free(self) -> None:
        self.device.call("cudaFree", self.address)


class CudaPinned(CudaMemory, Pinned):
    def __init__(self, device: CudaDevice, host: int, address: int, nbytes: int) -> None:
        super().__init__(device, address, nbytes)
        self.host = host
        self.array = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(host))

    def _free(self) -> None:
        self.array = np.empty(0, np.uint8)
        self.device.call("cudaFreeHost", self.host)


class CudaEvent(Event):
    def __init__(self, stream: CudaStream) -> None:
        self._call = stream.device.call
        self._api = stream.device.api
        self.handle = self._call("cudaEventCreateWithFlags", self._api.cudaEventDisableTiming)
        self._call("cudaEventRecord", self.handle, stream.handle)

    def synchronize(self) -> None:
        self._call("cudaEventSynchronize", self.handle)

    def done(self) -> bool:
        (status,) = self._api.cudaEventQuery(self.handle)
        if status.name == "cudaErrorNotReady":
            return False
        _check(self._api, "cudaEventQuery", status)
        return True

    def __del__(self) -> None:
        handle = getattr(self, "handle", None)
        if handle is not None:
            self._api.cudaEventDestroy(handle)  # a status here is that of earlier work, which others report


class CudaGraph(Graph):
    def __init__(self, device: CudaDevice, executable: Any) -> None:
        self.device = device
        self.executable = executable

    def launch(self, stream: Stream) -> None:
        self.device.call("cudaGraphLaunch", self.executable, stream.handle)

    def free(self) -> None:
        if self.executable is not None:
            self.device.call("cudaGraphExecDestroy", self.executable)
            self.executable = None


class CudaStream(Stream):
    def __init__(self, device: CudaDevice, handle: int) -> None:
        self.device = device
        self.handle = handle
        kinds = device.api.cudaMemcpyKind
        # "Default" tells the direction from the addresses, mapped pinned memory included.
        self._any, self._up = kinds.cudaMemcpyDefault, kinds.cudaMemcpyHostToDevice

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self.device.call("cudaMemcpyAsync", target, source, nbytes, self._any, self.handle)

    def upload(self, target: int, array: Bytes) -> None:
        # From pageable memory the call returns after the array was copied to a staging buffer (CUDA runtime API, "API
        # synchronization behavior"), so that the caller may change it.
        self.device.call("cudaMemcpyAsync", target, array.ctypes.data, array.nbytes, self._up, self.handle)

    def zero(self, target: int, nbytes: int) -> None:
        self.device.call("cudaMemsetAsync", target, 0, nbytes, self.handle)

    def record(self) -> CudaEvent:
        return CudaEvent(self)

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self.device.call("cudaStreamWaitEvent", self.handle, event.handle, 0)

    def synchronize(self) -> None:
        self.device.call("cudaStreamSynchronize", self.handle)

    def capture(self, work: Callable[[], None]) -> Graph:
        call, api = self.device.call, self.device.api
        mode = api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal  # other threads may go on allocating
        try:
            call("cudaStreamBeginCapture", self.handle, mode)
        except EngineError as error:
            raise CaptureError(str(error)) from error
        failure: EngineError | None = None
        try:
            work()
        except EngineError as error:
            failure = error
        status, graph = api.cudaStreamEndCapture(self.handle)  # in any case: the stream must be usable again
        if failure is None and status.name != "cudaSuccess":
            failure = EngineError(_describe(api, "cudaStreamEndCapture", status))
        if failure is not None:
            api.cudaGetLastError()  # a failed capture leaves its error behind for the next call
            if isinstance(failure, DeviceLostError):
                raise failure
            raise CaptureError(str(failure)) from failure
        try:
            return CudaGraph(self.device, call("cudaGraphInstantiate", graph, 0))
        except DeviceLostError:
            raise
        except EngineError as error:
            raise CaptureError(str(error)) from error
        finally:
            call("cudaGraphDestroy", graph)


def _check(api: Any, function: str, status: Any) -> None:
    name = str(status.name)
    if name == "cudaSuccess":
        return
    text = _describe(api, function, status)
    if name in NO_DRIVER:
        raise MissingDependencyError(
            f"no usable CUDA driver or GPU: {text}; `nvidia-smi` (on a Jetson: `ls /dev/nvmap`, groups video and render) "
            "tells more; without one, build with --target cpu"
        )
    if name == "cudaErrorMemoryAllocation":
        api.cudaGetLastError()  # not sticky, but the next call would report it once more
        raise OutOfMemoryError(text)
    if name in STICKY:
        raise DeviceLostError(f"the GPU is lost to this process, start a new one: {text}")
    raise EngineError(text)


def _describe(api: Any, function: str, status: Any) -> str:
    _, explanation = api.cudaGetErrorString(status)
    text = explanation.decode() if isinstance(explanation, bytes) else str(explanation)
    return f"{function}: {status.name}: {text}"


def _version(number: int) -> str:
    """12060 gives 12.6 (CUDA: 1000 * major + 10 * minor)."""
    return f"{number // 1000}.{number % 1000 // 10}"
