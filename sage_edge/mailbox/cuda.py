"""The device driver over CUDA's own driver API, by cuda.bindings (`pip install 'sage-edge[cuda]'`); imported when it is made.

Facts (CUDA driver API, and CUDA for Tegra application note, section 4.7): cudaIpc memory handles do not work on Orin; registered
host memory, cuMemCreate allocations passed as POSIX file descriptors, and interprocess events do. Registered memory is not
cached by Orin's GPU: right for tensors that are read or written once. Not run on a device yet: tests/gpu is what will.
"""

from __future__ import annotations

from typing import Any

from sage_edge.errors import MissingDependencyError
from sage_edge.mailbox.driver import HANDLE_BYTES, Allocation, DeviceError, DeviceFacts

DLPACK_CUDA = 2


class CudaDriver:
    """One CUDA device, in its primary context: what torch, cupy and numba in this process use, too.

    Raises MissingDependencyError without cuda.bindings, DeviceError without a driver or device.
    """

    device_type = DLPACK_CUDA

    def __init__(self, device: int = 0) -> None:
        try:
            from cuda.bindings import driver
        except ModuleNotFoundError as error:
            raise MissingDependencyError("CUDA needs cuda.bindings: pip install 'sage-edge[cuda]'") from error
        self.cuda: Any = driver
        self.device = device
        self._call("cuInit", 0)
        count = self._call("cuDeviceGetCount")
        if device >= count:
            raise DeviceError(f"CUDA device {device}: this machine has {count}")
        self._handle = self._call("cuDeviceGet", device)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._handle)

    def _call(self, name: str, *arguments: Any) -> Any:
        """One driver call: its result, or DeviceError with CUDA's own name for what went wrong."""
        try:
            status, *results = getattr(self.cuda, name)(*arguments)
        except RuntimeError as error:  # the bindings load libcuda at the first call
            raise DeviceError(f"no CUDA driver: {error}; install the NVIDIA driver") from error
        if status != self.cuda.CUresult.CUDA_SUCCESS:
            raise DeviceError(f"{name}: {getattr(status, 'name', status)} on CUDA device {self.device}")
        return results[0] if results else None

    def _enter(self) -> None:
        """Contexts are current for a thread; the caller may be any."""
        self._call("cuCtxSetCurrent", self._context)

    def _attribute(self, name: str) -> int:
        attribute = getattr(self.cuda.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}", None)
        return 0 if attribute is None else int(self._call("cuDeviceGetAttribute", attribute, self._handle))

    def facts(self) -> DeviceFacts:
        name = bytes(self._call("cuDeviceGetName", 100, self._handle)).split(b"\0")[0].decode(errors="replace")
        return DeviceFacts(
            name=name,
            host_register=bool(self._attribute("HOST_REGISTER_SUPPORTED")),
            native_atomics=bool(self._attribute("HOST_NATIVE_ATOMIC_SUPPORTED")),
            shares_memory=bool(
                self._attribute("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED")
                and self._attribute("HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED")
            ),
            shares_events=bool(self._attribute("IPC_EVENT_SUPPORTED")),
            integrated=bool(self._attribute("INTEGRATED")),
            host_address=bool(self._attribute("CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM")),
        )

    # --- host memory

    def register(self, address: int, size: int) -> int:
        self._enter()
        flags = self.cuda.CU_MEMHOSTREGISTER_PORTABLE | self.cuda.CU_MEMHOSTREGISTER_DEVICEMAP
        self._call("cuMemHostRegister", address, size, flags)
        return int(self._call("cuMemHostGetDevicePointer", address, 0))

    def unregister(self, address: int) -> None:
        self._enter()
        self._call("cuMemHostUnregister", address)

    # --- the device's own memory

    def _properties(self) -> Any:
        properties = self.cuda.CUmemAllocationProp()
        properties.type = self.cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = self.cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = self.device
        properties.requestedHandleTypes = self.cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        return properties

    def _granularity(self) -> int:
        minimum = self.cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        return int(self._call("cuMemGetAllocationGranularity", self._properties(), minimum))

    def _rounded(self, size: int) -> int:
        return -(size // -self._granularity()) * self._granularity()

    def allocate(self, size: int) -> Allocation:
        self._enter()
        rounded = self._rounded(size)
        return Allocation(self._call("cuMemCreate", rounded, self._properties(), 0), rounded)

    def export(self, allocation: Allocation) -> int:
        self._enter()
        kind = self.cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        return int(self._call("cuMemExportToShareableHandle", allocation.handle, kind, 0))

    def adopt(self, descriptor: int, size: int) -> Allocation:
        self._enter()
        kind = self.cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        return Allocation(self._call("cuMemImportFromShareableHandle", descriptor, kind), self._rounded(size))

    def map(self, allocation: Allocation) -> int:
        self._enter()
        address = self._call("cuMemAddressReserve", allocation.size, 0, 0, 0)
        self._call("cuMemMap", address, allocation.size, 0, allocation.handle, 0)
        access = self.cuda.CUmemAccessDesc()
        access.location.type = self.cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = self.device
        access.flags = self.cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._call("cuMemSetAccess", address, allocation.size, [access], 1)
        return int(address)

    def unmap(self, address: int, allocation: Allocation) -> None:
        self._enter()
        self._call("cuMemUnmap", address, allocation.size)
        self._call("cuMemAddressFree", address, allocation.size)
        self._call("cuMemRelease", allocation.handle)

    # --- order

    def new_event(self) -> Any:
        self._enter()
        flags = self.cuda.CUevent_flags
        return self._call("cuEventCreate", flags.CU_EVENT_INTERPROCESS.value | flags.CU_EVENT_DISABLE_TIMING.value)

    def event_handle(self, event: Any) -> bytes:
        self._enter()
        content = bytes(self._call("cuIpcGetEventHandle", event).reserved)
        return content.ljust(HANDLE_BYTES, b"\0")

    def open_event(self, handle: bytes) -> Any:
        self._enter()
        named = self.cuda.CUipcEventHandle()
        named.reserved = handle
        return self._call("cuIpcOpenEventHandle", named)

    def close_event(self, event: Any) -> None:
        self._enter()
        self._call("cuEventDestroy", event)

    def record(self, event: Any, stream: Any) -> None:
        self._enter()
        self._call("cuEventRecord", event, self._stream(stream))

    def wait(self, event: Any, stream: Any) -> None:
        self._enter()
        self._call("cuStreamWaitEvent", self._stream(stream), event, 0)

    def synchronize_event(self, event: Any) -> None:
        self._enter()
        self._call("cuEventSynchronize", event)

    def synchronize(self, stream: Any) -> None:
        self._enter()
        self._call("cuStreamSynchronize", self._stream(stream))

    def _stream(self, stream: Any) -> Any:
        """A CUstream, a number (torch.cuda.Stream.cuda_stream, cupy's ptr), or None: the legacy default stream."""
        return self.cuda.CUstream(0 if stream is None else int(stream))
