"""A TensorRT plan as a program for a CUDA device.

One execution context for each number of slots in use, with memory of ours: contexts of one graph never run at the same
time, so they share one piece, as large as the largest of them needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorrt as trt

from sage_edge.bundle import GraphSpec
from sage_edge.engines.accelerator import Device, Memory, OutOfMemoryError, Stream
from sage_edge.engines.gpu_recipe import GpuRecipe
from sage_edge.engines.program import Execution, Program
from sage_edge.engines.tensorrt_builder import parser_errors
from sage_edge.engines.tensorrt_log import BuildLog
from sage_edge.errors import EngineError, InputError, IntegrityError
from sage_edge.specs import TensorSpec

DTYPES = {
    trt.DataType.FLOAT: "float32",
    trt.DataType.HALF: "float16",
    trt.DataType.INT32: "int32",
    trt.DataType.INT64: "int64",
    trt.DataType.UINT8: "uint8",
}


class TensorRTProgram(Program):
    """`path`: the plan; `weights`: the ONNX file that fills a stripped plan, or None."""

    def __init__(self, path: Path, spec: GraphSpec, recipe: GpuRecipe, weights: Path | None = None) -> None:
        self.path = path
        self.spec = spec
        self.recipe = recipe
        self.weights = weights
        self.log = BuildLog()
        self.engine: trt.ICudaEngine | None = None
        self._runtime: trt.Runtime | None = None
        self._device: Device | None = None
        self._stream: Stream | None = None
        self._scratch: Memory | None = None
        self._contexts: list[trt.IExecutionContext] = []

    def open(self, device: Device, stream: Stream) -> None:
        if self.engine is not None:
            return
        self._device, self._stream = device, stream
        # A plan is code: its digest was compared with the manifest's before this line is reached.
        self._runtime = trt.Runtime(self.log)
        self._runtime.engine_host_code_allowed = self.recipe.tensorrt.version_compatible
        engine = self._runtime.deserialize_cuda_engine(self.path.read_bytes())
        if engine is None:
            if self.log.out_of_memory:
                raise OutOfMemoryError(f"{self.path.name}: {self.log.text()}")
            raise InputError(
                f"{self.path}: TensorRT {trt.__version__} cannot load this plan: {self.log.text()}; build it again here"
            )
        if self.weights is not None:
            refit(engine, self.weights, self.log)
        for tensor in (*self.spec.inputs, *self.spec.outputs):
            check_tensor(engine, tensor, self.path)
        self.engine = engine

    def execution(self, slots: int) -> Execution:
        engine, device = self.engine, self._device
        assert engine is not None
        assert device is not None
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise OutOfMemoryError(f"{self.path.name}: no execution context: {self.log.text()}")
        assert self._stream is not None
        if not context.set_optimization_profile_async(self.recipe.profile_of(slots), self._stream.handle):
            raise EngineError(f"{self.path.name}: no profile for {slots} slots: {self.log.text()}")
        self._stream.synchronize()
        for tensor in self.spec.inputs:
            if not context.set_input_shape(tensor.name, (slots, *tensor.item_shape)):
                raise EngineError(f"{self.path.name}: {slots} slots are outside of the profile: {self.log.text()}")
        self._give_scratch(context, device)
        return TensorRTExecution(self, context)

    def _give_scratch(self, context: trt.IExecutionContext, device: Device) -> None:
        """Memory for activations; contexts that have some already move when a larger piece is needed."""
        needed = max(1, context.update_device_memory_size_for_shapes())
        if self._scratch is None or self._scratch.nbytes < needed:
            larger = device.allocate(needed)
            if self._scratch is not None:
                self._scratch.free()
            self._scratch = larger
            for other in self._contexts:
                other.set_device_memory(larger.address, larger.nbytes)
        context.set_device_memory(self._scratch.address, self._scratch.nbytes)
        self._contexts.append(context)

    def close(self) -> None:
        self._contexts.clear()
        if self._scratch is not None:
            self._scratch.free()
        self._scratch = self.engine = self._runtime = self._stream = None


class TensorRTExecution(Execution):
    def __init__(self, program: TensorRTProgram, context: trt.IExecutionContext) -> None:
        self.program = program
        self.context = context

    def enqueue(self, stream: Stream, addresses: Mapping[str, int]) -> None:
        spec, log = self.program.spec, self.program.log
        log.errors.clear()
        for tensor in (*spec.inputs, *spec.outputs):
            if not self.context.set_tensor_address(tensor.name, addresses[tensor.name]):
                raise EngineError(f"{self.program.path.name}: address of {tensor.name!r} refused: {log.text()}")
        if not self.context.execute_async_v3(stream.handle):
            raise EngineError(f"{self.program.path.name}: TensorRT could not run it: {log.text()}")


def layer_information(program: TensorRTProgram) -> str:
    """The engine inspector's JSON about an open program."""
    assert program.engine is not None
    inspector = program.engine.create_engine_inspector()
    return inspector.get_engine_information(trt.LayerInformationFormat.JSON)


def refit(engine: trt.ICudaEngine, onnx_file: Path, log: BuildLog) -> None:
    """Fill a stripped plan with the weights of its ONNX file. Raises InputError."""
    refitter = trt.Refitter(engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    if not parser.refit_from_bytes(onnx_file.read_bytes()):
        raise InputError(f"{onnx_file}: its weights do not fit the plan: {parser_errors(parser)}")
    if missing := refitter.get_missing_weights():
        raise InputError(f"{onnx_file}: the plan misses {len(missing)} weights, such as {missing[0]!r}; build it again")
    if not refitter.refit_cuda_engine():
        raise InputError(f"{onnx_file}: TensorRT could not refit the plan: {log.text()}")


def check_tensor(engine: trt.ICudaEngine, tensor: TensorSpec, path: Path) -> None:
    """Raise IntegrityError unless the plan has this tensor with this dtype and shape."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    if tensor.name not in names:
        raise IntegrityError(
            f"{path}: the plan has no tensor {tensor.name!r}; it has {', '.join(names)}; build it again"
        )
    dtype = DTYPES.get(engine.get_tensor_dtype(tensor.name))
    dims = engine.get_tensor_shape(tensor.name)
    shape = tuple(int(dims[axis]) for axis in range(len(dims)))  # Dims cannot be iterated over from 10.16 on
    if dtype is None or np.dtype(dtype) != np.dtype(tensor.dtype) or shape[1:] != tensor.item_shape:
        raise IntegrityError(
            f"{path}: tensor {tensor.name!r}: expected {tensor.describe()}, the plan has {dtype} {list(shape)}; build it again"
        )
