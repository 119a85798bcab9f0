"""The part of cuda.bindings.runtime that `CudaDevice` uses, over host memory and done at once.

It stands in for the API on machines without a GPU: same names, same enums (those of the real binding), same way of
returning (status, results...). `fail` makes the next call of a function return an error.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from cuda.bindings import runtime as real

OK = real.cudaError_t.cudaSuccess


class FakeCuda:
    cudaMemcpyKind = real.cudaMemcpyKind
    cudaStreamCaptureMode = real.cudaStreamCaptureMode
    cudaHostAllocMapped = real.cudaHostAllocMapped
    cudaStreamNonBlocking = real.cudaStreamNonBlocking
    cudaEventDisableTiming = real.cudaEventDisableTiming

    def __init__(self, capability: tuple[int, int] = (9, 0), memory: int = 1 << 32, name: bytes = b"Fake GPU") -> None:
        self.capability = capability
        self.memory = memory
        self.name = name
        self.arrays: dict[int, Any] = {}
        self.failures: dict[str, Any] = {}
        self.calls: list[str] = []
        self.capturing: dict[int, list[Callable[[], object]]] = {}
        self.graphs: dict[int, list[Callable[[], object]]] = {}
        self.events: set[int] = set()
        self.priorities: dict[int, int] = {}
        self._next = 1

    def fail(self, function: str, status: str) -> None:
        self.failures[function] = getattr(real.cudaError_t, status)

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if not name.startswith("cuda") or not callable(value) or isinstance(value, type):
            return value

        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            if name in self.failures:
                return (self.failures.pop(name), None)
            return value(*arguments)

        return call

    def _number(self) -> int:
        self._next += 1
        return self._next

    def used(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def _do(self, stream: int, work: Callable[[], object]) -> tuple[Any]:
        if stream in self.capturing:
            self.capturing[stream].append(work)
        else:
            work()
        return (OK,)

    def cudaGetDeviceCount(self) -> Any:
        return OK, 1

    def cudaSetDevice(self, index: int) -> Any:
        return (OK,)

    def cudaGetDeviceProperties(self, index: int) -> Any:
        return OK, SimpleNamespace(name=self.name, major=self.capability[0], minor=self.capability[1],
                                   totalGlobalMem=self.memory, l2CacheSize=50 << 20, multiProcessorCount=132,
                                   integrated=0)  # fmt: skip

    def cudaDriverGetVersion(self) -> Any:
        return OK, 13020

    def cudaRuntimeGetVersion(self) -> Any:
        return OK, 12060

    def cudaMemGetInfo(self) -> Any:
        return OK, self.memory - self.used(), self.memory

    def cudaMalloc(self, nbytes: int) -> Any:
        if self.used() + nbytes > self.memory:
            return real.cudaError_t.cudaErrorMemoryAllocation, None
        array = np.full(nbytes, 0xFF, np.uint8)
        self.arrays[array.ctypes.data] = array
        return OK, array.ctypes.data

    def cudaHostAlloc(self, nbytes: int, flags: int) -> Any:
        return self.cudaMalloc(nbytes)

    def cudaHostGetDevicePointer(self, host: int, flags: int) -> Any:
        return OK, host

    def cudaFree(self, address: int) -> Any:
        del self.arrays[address]
        return (OK,)

    def cudaFreeHost(self, address: int) -> Any:
        return self.cudaFree(address)

    def cudaDeviceGetStreamPriorityRange(self) -> Any:
        return OK, 0, -5

    def cudaStreamCreateWithPriority(self, flags: int, priority: int) -> Any:
        handle = self._number()
        self.priorities[handle] = priority
        return OK, handle

    def cudaStreamDestroy(self, stream: int) -> Any:
        del self.priorities[stream]
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> Any:
        return (OK,)

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> Any:
        return (OK,) if event in self.events else (real.cudaError_t.cudaErrorInvalidResourceHandle,)

    def cudaEventCreateWithFlags(self, flags: int) -> Any:
        self.events.add(handle := self._number())
        return OK, handle

    def cudaEventRecord(self, event: int, stream: int) -> Any:
        return (OK,)

    def cudaEventSynchronize(self, event: int) -> Any:
        return (OK,)

    def cudaEventQuery(self, event: int) -> Any:
        return (OK,)

    def cudaEventDestroy(self, event: int) -> Any:
        self.events.discard(event)
        return (OK,)

    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: Any, stream: int) -> Any:
        return self._do(stream, lambda: ctypes.memmove(target, source, nbytes))

    def cudaMemsetAsync(self, target: int, value: int, nbytes: int, stream: int) -> Any:
        return self._do(stream, lambda: ctypes.memset(target, value, nbytes))

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> Any:
        self.capturing[stream] = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> Any:
        self.graphs[handle := self._number()] = self.capturing.pop(stream)
        return OK, handle

    def cudaGraphInstantiate(self, graph: int, flags: int) -> Any:
        self.graphs[handle := self._number()] = list(self.graphs[graph])
        return OK, handle

    def cudaGraphLaunch(self, executable: int, stream: int) -> Any:
        for work in self.graphs[executable]:
            work()
        return (OK,)

    def cudaGraphDestroy(self, graph: int) -> Any:
        del self.graphs[graph]
        return (OK,)

    def cudaGraphExecDestroy(self, executable: int) -> Any:
        del self.graphs[executable]
        return (OK,)

    def cudaGetLastError(self) -> Any:
        return (OK,)

    def cudaGetErrorString(self, status: Any) -> Any:
        return real.cudaGetErrorString(status)
