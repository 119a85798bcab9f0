"""A graph run by ONNX Runtime on device memory: on the CPU for the null device, by the CUDA provider on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sage_edge.bundle import GraphSpec
from sage_edge.engines.accelerator import Device, OutOfMemoryError, Stream
from sage_edge.engines.accelerator_null import NullStream
from sage_edge.engines.device_memory import item_bytes
from sage_edge.engines.ort import open_session
from sage_edge.engines.program import Execution, Program
from sage_edge.errors import EngineError, InputError, MissingDependencyError

if TYPE_CHECKING:
    import onnxruntime as ort


class OrtProgram(Program):
    """`path`: the ONNX file; spec: its inputs and outputs; threads, optimized: as `OrtRunner` has them, on the CPU."""

    def __init__(self, path: Path, spec: GraphSpec, threads: int = 1, optimized: bool = False) -> None:
        self.path = path
        self.spec = spec
        self.threads = threads
        self.optimized = optimized
        self.where = "cpu"
        self.session: ort.InferenceSession | None = None

    def open(self, device: Device, stream: Stream) -> None:
        if self.session is not None:
            return
        if device.info.kind == "null":
            self.session = open_session(self.path, self.threads, optimize=not self.optimized)
            return
        self.where = "cuda"
        self.session = _cuda_session(self.path, stream)

    def execution(self, slots: int) -> Execution:
        assert self.session is not None
        return OrtExecution(self, slots)

    def close(self) -> None:
        self.session = None


class OrtExecution(Execution):
    # ONNX Runtime synchronises and allocates as it pleases, which a capture forbids.
    not_capturable = "ONNX Runtime does not promise that its work can be captured"

    def __init__(self, program: OrtProgram, slots: int) -> None:
        self.program = program
        self.slots = slots
        self._bindings: dict[tuple[tuple[str, int], ...], Any] = {}
        if program.where == "cpu":
            self.not_capturable = ""

    def enqueue(self, stream: Stream, addresses: Mapping[str, int]) -> None:
        binding = self._bind(addresses)
        if isinstance(stream, NullStream):
            tensors = (*self.program.spec.inputs, *self.program.spec.outputs)
            touches = [(addresses[s.name], item_bytes(s) * self.slots) for s in tensors]
            stream.enqueue(lambda: self._run(binding), touches)
        else:
            self._run(binding)

    def _bind(self, addresses: Mapping[str, int]) -> Any:
        """An IO binding for these addresses, made once: a state's buffers stay where they are."""
        session, where = self.program.session, self.program.where
        assert session is not None
        spec = self.program.spec
        key = tuple((s.name, addresses[s.name]) for s in (*spec.inputs, *spec.outputs))
        if key not in self._bindings:
            binding = session.io_binding()
            for s in spec.inputs:
                shape = (self.slots, *s.item_shape)
                binding.bind_input(s.name, where, 0, np.dtype(s.dtype).type, shape, addresses[s.name])
            for s in spec.outputs:
                shape = (self.slots, *s.item_shape)
                binding.bind_output(s.name, where, 0, np.dtype(s.dtype).type, shape, addresses[s.name])
            self._bindings[key] = binding
        return self._bindings[key]

    def _run(self, binding: Any) -> None:
        session = self.program.session
        assert session is not None
        options = None
        if self.program.where == "cuda":
            import onnxruntime as ort

            options = ort.RunOptions()
            # Order on our stream is enough; the runner waits for its own events.
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        try:
            session.run_with_iobinding(binding, options)
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            text = str(error).splitlines()[0]
            if "Failed to allocate memory" in text or "out of memory" in text.lower():
                raise OutOfMemoryError(f"{self.program.path.name}: {text}") from error
            raise EngineError(f"{self.program.path.name}: ONNX Runtime failed: {text}") from error


def _cuda_session(path: Path, stream: Stream) -> ort.InferenceSession:
    """A session of the CUDA provider that works on `stream`. Raises MissingDependencyError, InputError."""
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise MissingDependencyError(
            "target ort-cuda needs ONNX Runtime's CUDA provider: pip install onnxruntime-gpu in place of onnxruntime; the "
            f"installed one offers {', '.join(ort.get_available_providers())}"
        )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Without fallback: a session that quietly ran on the CPU would read device addresses as its own.
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    cuda = {"device_id": 0, "user_compute_stream": str(stream.handle), "do_copy_in_default_stream": "1"}
    try:
        session = ort.InferenceSession(str(path), options, providers=[("CUDAExecutionProvider", cuda)])
    except Exception as error:  # see above
        text = str(error).splitlines()[0]
        if "memory" in text.lower() and "alloc" in text.lower():
            raise OutOfMemoryError(f"{path.name}: {text}") from error
        raise InputError(f"{path}: ONNX Runtime's CUDA provider cannot load it: {text}") from error
    if "CUDAExecutionProvider" not in session.get_providers():
        raise MissingDependencyError(f"{path.name}: ONNX Runtime's CUDA provider did not start; is cuDNN installed?")
    return session
