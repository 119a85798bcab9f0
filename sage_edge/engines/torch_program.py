"""A graph run by torch as a program for a device: compiled ahead of time (AOTInductor, with or without TensorRT inside), or
operator by operator from its ONNX file.

A package holds compiled code: nothing is compiled when it is opened. Only the torch engines import this.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sage_edge.bundle import GraphSpec
from sage_edge.engines.accelerator import Device, OutOfMemoryError, Stream
from sage_edge.engines.accelerator_null import NullStream
from sage_edge.engines.device_memory import item_bytes
from sage_edge.engines.program import Execution, Program
from sage_edge.engines.torch_graph import OnnxModule
from sage_edge.errors import DeviceLostError, EngineError, InputError
from sage_edge.specs import TensorSpec

Key = tuple[int, ...]


class TorchProgram(Program):
    """`path`: a package (.pt2) or a graph (.onnx). graphs: replay the work as a CUDA graph; needs: modules whose operators
    the package uses."""

    def __init__(self, path: Path, spec: GraphSpec, graphs: bool, needs: tuple[str, ...] = ()) -> None:
        self.path = path
        self.spec = spec
        self.graphs = graphs
        self.needs = needs
        self.not_captured = ""
        self.compiled: Any = None
        self.where = "cpu"

    def open(self, device: Device, stream: Stream) -> None:
        if self.compiled is not None:
            return
        self.where = "cpu" if device.info.kind == "host" else "cuda"
        for module in self.needs:
            importlib.import_module(module)
        try:
            if self.path.suffix == ".onnx":
                self.compiled = OnnxModule(self.path).eval().to(self.where)
            else:
                self.compiled = torch._inductor.aoti_load_package(str(self.path))
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(f"{self.path.name}: {_first_line(error)}") from error
        except RuntimeError as error:
            raise InputError(
                f"{self.path}: PyTorch cannot load it: {_first_line(error)}; build it again here"
            ) from error

    def execution(self, slots: int) -> Execution:
        return TorchExecution(self, slots)

    def close(self) -> None:
        self.compiled = None
        if self.where == "cuda":
            torch.cuda.empty_cache()


class TorchExecution(Execution):
    captures_itself = True

    def __init__(self, program: TorchProgram, slots: int) -> None:
        self.program = program
        self.slots = slots
        self._views: dict[Key, tuple[list[Tensor], list[Tensor]]] = {}
        self._graphs: dict[Key, Any] = {}
        self._warm: set[Key] = set()

    @property
    def own_graphs(self) -> int:  # type: ignore[override]
        return len(self._graphs)

    @property
    def not_captured(self) -> str:  # type: ignore[override]
        return self.program.not_captured

    def enqueue(self, stream: Stream, addresses: Mapping[str, int]) -> None:
        spec = self.program.spec
        tensors = (*spec.inputs, *spec.outputs)
        key = tuple(addresses[t.name] for t in tensors)
        if isinstance(stream, NullStream):
            inputs, outputs = self._tensors(key)
            stream.enqueue(
                lambda: self._run(inputs, outputs), [(addresses[t.name], item_bytes(t) * self.slots) for t in tensors]
            )
        else:
            self._on_cuda(stream, key)

    def _tensors(self, key: Key) -> tuple[list[Tensor], list[Tensor]]:
        """Views of device memory, made once: a state's buffers stay where they are."""
        if key not in self._views:
            spec = self.program.spec
            made = [self._view(a, t) for a, t in zip(key, (*spec.inputs, *spec.outputs), strict=True)]
            self._views[key] = (made[: len(spec.inputs)], made[len(spec.inputs) :])
        return self._views[key]

    def _view(self, address: int, tensor: TensorSpec) -> Tensor:
        shape = (self.slots, *tensor.item_shape)
        if self.program.where == "cuda":
            return torch.as_tensor(_Pointer(address, shape, np.dtype(tensor.dtype).str), device="cuda")
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * (item_bytes(tensor) * self.slots)).from_address(address))
        return torch.from_numpy(raw.view(tensor.dtype).reshape(shape))

    def _run(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        try:
            with torch.inference_mode():
                for target, made in zip(outputs, self.program.compiled(*inputs), strict=True):
                    target.copy_(made, non_blocking=True)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(f"{self.program.path.name}: {_first_line(error)}") from error
        except RuntimeError as error:
            if "CUDA error" in str(error):
                raise DeviceLostError(
                    f"the GPU is lost to this process, start a new one: {self.program.path.name}: {_first_line(error)}"
                ) from error
            raise EngineError(f"{self.program.path.name}: PyTorch failed: {_first_line(error)}") from error

    def _on_cuda(self, stream: Stream, key: Key) -> None:
        """On our stream; from the second time on as a CUDA graph of PyTorch's own, whose memory pool stays with it."""
        inputs, outputs = self._tensors(key)
        external = torch.cuda.ExternalStream(stream.handle)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(external):
            if not self.program.graphs:
                self._run(inputs, outputs)
                return
            if key in self._warm and key not in self._graphs:
                graph = torch.cuda.CUDAGraph()
                external.synchronize()
                try:
                    with torch.cuda.graph(graph, stream=external):
                        self._run(inputs, outputs)
                    self._graphs[key] = graph
                except (RuntimeError, EngineError) as error:  # some operator cannot be captured: as before, without
                    self.program.graphs = False
                    self.program.not_captured = _first_line(error)
                    self._run(inputs, outputs)
                    return
            if key in self._graphs:
                self._graphs[key].replay()
            else:
                self._run(inputs, outputs)
                self._warm.add(key)


class _Pointer:
    """Device memory that torch takes without a copy (CUDA array interface, version 3)."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: str) -> None:
        self.__cuda_array_interface__ = {"data": (address, False), "shape": shape, "typestr": dtype, "version": 3}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
