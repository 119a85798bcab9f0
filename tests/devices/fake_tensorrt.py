"""The part of TensorRT's Python API that the project uses, with ONNX Runtime underneath.

It stands in for the package on machines without it, so that builder, programs, engine folders and the runner run end to
end. Its names are checked against NVIDIA's bindings (tests/tensorrt_api). A plan is a JSON header and the ONNX file. Work
goes through `FakeCuda`, so that captures hold it. `behave` says what should go wrong.
"""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from tests.devices.fake_cuda import FakeCuda

KINDS = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF", onnx.TensorProto.INT32: "INT32",
         onnx.TensorProto.INT64: "INT64", onnx.TensorProto.UINT8: "UINT8"}  # fmt: skip
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64, "UINT8": np.uint8}


@dataclass
class Behaviour:
    """refuse: operators that the parser refuses. most_slots: builds beyond it run out of memory. fp32_layers: nodes that
    the inspector says run in fp32. wrong: added to every output of refine. enqueue: what execute_async_v3 returns."""

    refuse: set[str] = field(default_factory=set)
    most_slots: int = 1 << 20
    fp32_layers: set[str] = field(default_factory=set)
    wrong: float = 0.0
    enqueue: bool = True
    detailed: bool = True
    during_build: Callable[[], None] = lambda: None
    builds: list[dict[str, Any]] = field(default_factory=list)


behave = Behaviour()
cuda: FakeCuda = FakeCuda()
__version__ = "10.3.0"


class NetworkDefinitionCreationFlag(enum.IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class BuilderFlag(enum.Enum):
    TF32 = enum.auto()
    VERSION_COMPATIBLE = enum.auto()
    STRIP_PLAN = enum.auto()
    REFIT_IDENTICAL = enum.auto()


class MemoryPoolType(enum.Enum):
    WORKSPACE = enum.auto()
    TACTIC_DRAM = enum.auto()


class ProfilingVerbosity(enum.Enum):
    DETAILED = enum.auto()


class HardwareCompatibilityLevel(enum.Enum):
    NONE = enum.auto()
    AMPERE_PLUS = enum.auto()


class ExecutionContextAllocationStrategy(enum.Enum):
    USER_MANAGED = enum.auto()


class LayerInformationFormat(enum.Enum):
    JSON = enum.auto()


class ErrorCode(enum.Enum):
    UNSUPPORTED_NODE = enum.auto()


class DataType(enum.Enum):
    FLOAT = enum.auto()
    HALF = enum.auto()
    INT32 = enum.auto()
    INT64 = enum.auto()
    UINT8 = enum.auto()


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2

    def log(self, severity: Severity, msg: str) -> None: ...


class IProgressMonitor:
    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...

    def step_complete(self, phase_name: str, step: int) -> bool:
        return True

    def phase_finish(self, phase_name: str) -> None: ...


class Dims(tuple[int, ...]):
    pass


class INetworkDefinition:
    def __init__(self, flags: int) -> None:
        self._flags = flags
        self._model: onnx.ModelProto | None = None


class ParserError:
    def __init__(self, node: onnx.NodeProto) -> None:
        self._node = node

    def node_name(self) -> str:
        return str(self._node.name)

    def node_operator(self) -> str:
        return str(self._node.op_type)

    def node(self) -> int:
        return 0

    def desc(self) -> str:
        return "No importer\n registered for op"

    def code(self) -> ErrorCode:
        return ErrorCode.UNSUPPORTED_NODE


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network = network
        self._errors: list[ParserError] = []

    def parse(self, model: bytes) -> bool:
        parsed = onnx.load_from_string(model)
        self._errors = [ParserError(node) for node in parsed.graph.node if node.op_type in behave.refuse]
        self._network._model = parsed
        return not self._errors

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]


class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, tuple[Dims, Dims, Dims]] = {}

    def set_shape(self, input: str, min: Dims, opt: Dims, max: Dims) -> None:
        self._shapes[input] = (min, opt, max)


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> bytes:
        return self._content + b"*"


class IBuilderConfig:
    def __init__(self) -> None:
        self.builder_optimization_level = 3
        self.profiling_verbosity: Any = None
        self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE
        self.progress_monitor: IProgressMonitor | None = None
        self._pools: dict[MemoryPoolType, int] = {}
        self._flags = {BuilderFlag.TF32}
        self._profiles: list[IOptimizationProfile] = []
        self._cache: ITimingCache | None = None

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self._pools[pool] = pool_size

    def set_flag(self, flag: BuilderFlag) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self._flags.discard(flag)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return True

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        assert network._flags & (1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        monitor = config.progress_monitor
        assert monitor is not None
        profiles = [{name: [list(d) for d in dims] for name, dims in p._shapes.items()} for p in config._profiles]
        behave.builds.append({"pools": config._pools, "flags": config._flags, "profiles": profiles,
                              "level": config.builder_optimization_level, "cache": config._cache and config._cache._content,
                              "hardware": config.hardware_compatibility_level})  # fmt: skip
        monitor.phase_start("Building Engine", None, 2)
        monitor.phase_start("Tactic Selection", "Building Engine", 4)
        for step in range(4):
            behave.during_build()
            if not monitor.step_complete("Tactic Selection", step):
                return None
        monitor.phase_finish("Tactic Selection")
        for step in range(2):
            monitor.step_complete("Building Engine", step)
        monitor.phase_finish("Building Engine")
        if max(dims[2][0] for profile in profiles for dims in profile.values()) > behave.most_slots:
            self._logger.log(
                ILogger.Severity.ERROR, "Requested amount of GPU memory could not be allocated: out of memory"
            )
            return None
        self._logger.log(ILogger.Severity.WARNING, "a warning\nof two lines")
        assert network._model is not None
        header = {"version": __version__, "profiles": profiles, "stripped": BuilderFlag.STRIP_PLAN in config._flags}
        return json.dumps(header).encode() + b"\n" + bytes(network._model.SerializeToString())


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._profile = -1
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory = 0

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        return 0 <= profile_index < len(self._engine._header["profiles"])

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine._header["profiles"][self._profile][name]
        self._shapes[name] = shape
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def update_device_memory_size_for_shapes(self) -> int:
        return 1000 * next(iter(self._shapes.values()))[0]

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self.update_device_memory_size_for_shapes()
        assert any(start <= memory < start + a.nbytes for start, a in cuda.arrays.items())
        self._memory = memory

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine = self._engine
        if not behave.enqueue:
            engine._logger.log(ILogger.Severity.ERROR, "CUDA error 700 launching kernel: an illegal address")
            return False
        assert self._memory
        assert not engine._header["stripped"] or engine._filled
        slots = next(iter(self._shapes.values()))[0]
        binding = engine._session.io_binding()
        for tensor in (*engine._model.graph.input, *engine._model.graph.output):
            kind = KINDS[tensor.type.tensor_type.elem_type]
            shape = (slots, *(d.dim_value for d in tensor.type.tensor_type.shape.dim[1:]))
            bind = binding.bind_input if tensor in engine._model.graph.input else binding.bind_output
            bind(tensor.name, "cpu", 0, NUMPY[kind], shape, self._addresses[tensor.name])
        cuda._do(stream_handle, lambda: self._run(binding, dict(self._addresses), slots))
        return True

    def _run(self, binding: Any, addresses: dict[str, int], slots: int) -> None:
        self._engine._session.run_with_iobinding(binding)
        if behave.wrong and "signals" in addresses:
            import ctypes

            first = ctypes.cast(addresses["z_H_next"], ctypes.POINTER(ctypes.c_float))
            first[0] += behave.wrong


class EngineInspector:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        if not behave.detailed:
            return json.dumps({"Layers": [node.name for node in self._engine._model.graph.node]})
        layers = []
        for node in self._engine._model.graph.node:
            kind = "Float" if node.name in behave.fp32_layers else "Row major linear FP16 format"
            tactic = "_gemm_mha_v2_0x1" if node.op_type == "Softmax" else "sm80_xmma_gemm"
            layers.append({"Name": node.name, "LayerType": "kgen", "TacticName": tactic, "Inputs": [],
                           "Outputs": [{"Name": out, "Format/Datatype": kind} for out in node.output],
                           "Metadata": f"[ONNX Layer: {node.name}]"})  # fmt: skip
        return json.dumps({"Layers": layers})


class ICudaEngine:
    def __init__(self, header: dict[str, Any], content: bytes, logger: ILogger) -> None:
        self._header = header
        self._logger = logger
        self._model = onnx.load_from_string(content)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self._tensors = {t.name: t.type.tensor_type for t in (*self._model.graph.input, *self._model.graph.output)}
        self._filled = False

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return str(list(self._tensors)[index])

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[KINDS[self._tensors[name].elem_type]]

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(d.dim_value if d.HasField("dim_value") else -1 for d in self._tensors[name].shape.dim)

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> IExecutionContext:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return IExecutionContext(self)

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self)


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        header, _, content = serialized_engine.partition(b"\n")
        found = json.loads(header)
        if found["version"] != __version__:
            self._logger.log(ILogger.Severity.ERROR, "The engine plan file is not compatible with this version")
            return None
        return ICudaEngine(found, content, self._logger)


class Refitter:
    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        self._engine = engine

    def get_missing_weights(self) -> list[str]:
        return []

    def refit_cuda_engine(self) -> bool:
        self._engine._filled = True
        return True


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self.num_errors = 0

    def refit_from_bytes(self, model: bytes) -> bool:
        return True

    def get_error(self, index: int) -> ParserError:
        raise IndexError(index)


@contextmanager
def installed(version: str = "10.3.0", gpu: FakeCuda | None = None) -> Iterator[ModuleType]:
    """`import tensorrt` gives this module, and CUDA devices are `gpu`; everything is as before afterwards."""
    import sage_edge.engines.accelerator_cuda as accelerator_cuda

    global behave, cuda, __version__
    names = ("tensorrt", *(f"sage_edge.engines.tensorrt_{part}" for part in ("log", "builder", "program")))
    before = {name: sys.modules.pop(name, None) for name in names}
    real = accelerator_cuda.runtime
    behave, cuda, __version__ = Behaviour(), gpu or FakeCuda(), version
    module = sys.modules[__name__]
    sys.modules["tensorrt"] = module
    accelerator_cuda.runtime = lambda: cuda
    try:
        yield module
    finally:
        accelerator_cuda.runtime = real
        for name, old in before.items():
            sys.modules.pop(name, None)
            if old is not None:
                sys.modules[name] = old
