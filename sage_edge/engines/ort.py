"""The ONNX Runtime runner: graphs in a folder, run on the CPU with the carry bound in place.

The carry lives in two sets of buffers. A step reads one and writes the other, and the roles swap: no copy of carry or
logits is made between steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sage_edge.engines.runner import Runner
from sage_edge.errors import InputError
from sage_edge.specs import Array, ModelSpec

if TYPE_CHECKING:
    import onnxruntime as ort


@dataclass(eq=False)
class Buffers:
    """Context and two carries of n slots, with a binding from each carry to the other."""

    context: dict[str, Array]
    carries: tuple[dict[str, Array], dict[str, Array]]
    signals: npt.NDArray[np.float32]
    current: int = 0
    bindings: list[Any] = field(default_factory=list)

    @property
    def carry(self) -> dict[str, Array]:
        return self.carries[self.current]


def open_session(path: Path, threads: int, optimize: bool, spin: bool = True) -> ort.InferenceSession:
    """A CPU session. `optimize` False loads the graph as it is: right for graphs that were optimized when built.

    spin: whether its threads wait busily for the next node, and for a while after a run for the next run.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise InputError(f"{path}: ONNX Runtime cannot load it: {str(error).splitlines()[0]}") from error


class OrtRunner(Runner):
    """Runs the three graphs of `folder` (encode.onnx, refine.onnx, decode.onnx)."""

    def __init__(
        self, folder: Path, model: ModelSpec, slots: int, threads: int, optimized: bool, digest: str, spin: bool = True
    ) -> None:  # fmt: skip
        super().__init__(model, slots, digest)
        self.folder = folder
        self.threads = threads
        self.optimized = optimized
        self.spin = spin
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._spare: dict[int, Buffers] = {}  # by number of slots: `select` swaps between sizes at every other tick
        self._staging: dict[int, Buffers] = {}

    def _activate(self) -> None:
        for name in ("encode", "refine", "decode"):
            path = self.folder / f"{name}.onnx"
            # Each session has threads of its own. Were those of encode and decode to spin after their run, they would
            # take the cores from the steps that follow.
            spin = self.spin and name == "refine"
            self._sessions[name] = open_session(path, self.threads, not self.optimized, spin)
        self._new_carry = [o.name for o in self._sessions["refine"].get_outputs()]
        self._decode_inputs = [i.name for i in self._sessions["decode"].get_inputs()]

    def _deactivate(self) -> None:
        for held in (self._sessions, self._spare, self._staging):
            held.clear()

    def _empty(self, slots: int) -> Buffers:
        buffers = self._allocate(slots)
        for array in (buffers.context | buffers.carry).values():
            array.fill(0)
        return buffers

    def _admit(self, handle: Buffers, rows: list[int], observation: dict[str, Array]) -> None:
        """Encode at the state's own number of slots, so that a request's bits do not depend on who came with it."""
        slots = len(handle.signals)
        whole = rows == list(range(slots))
        if not whole and slots not in self._staging:
            self._staging[slots] = self._allocate(slots)
        target = handle if whole else self._staging[slots]
        binding = self._sessions["encode"].io_binding()
        feeds = {}
        for name, array in observation.items():
            # Rows that nobody wants repeat the first newcomer: valid input whatever the model's vocabulary.
            feeds[name] = array if whole else np.concatenate((array, np.repeat(array[:1], slots - len(rows), axis=0)))
            _bind_input(binding, name, feeds[name])
        for name, array in (target.context | target.carry).items():
            _bind_output(binding, name, array)
        self._sessions["encode"].run_with_iobinding(binding)
        if not whole:
            encoded = target.context | target.carry
            self._write(handle, rows, {name: array[: len(rows)] for name, array in encoded.items()})

    def _allocate(self, count: int) -> Buffers:
        def empty(specs: tuple[Any, ...]) -> dict[str, Array]:
            return {s.name: np.empty((count, *s.item_shape), s.dtype) for s in specs}

        signals = np.empty((count, len(self.model.signals)), np.float32)
        return Buffers(empty(self.model.context), (empty(self.model.carry), empty(self.model.carry)), signals)

    def _refine(self, handle: Buffers) -> npt.NDArray[np.float32]:
        if not handle.bindings:
            handle.bindings = [self._bind_step(handle, source) for source in (0, 1)]
        self._sessions["refine"].run_with_iobinding(handle.bindings[handle.current])
        handle.current = 1 - handle.current
        return handle.signals

    def _bind_step(self, handle: Buffers, source: int) -> Any:
        binding = self._sessions["refine"].io_binding()
        for name, array in (handle.context | handle.carries[source]).items():
            _bind_input(binding, name, array)
        outputs = (*handle.carries[1 - source].values(), handle.signals)
        for name, array in zip(self._new_carry, outputs, strict=True):
            _bind_output(binding, name, array)
        return binding

    def _decode(self, handle: Buffers, names: tuple[str, ...]) -> dict[str, Array]:
        feeds = {name: handle.carry[name] for name in self._decode_inputs}
        return dict(zip(names, self._sessions["decode"].run(list(names), feeds), strict=True))

    def _select(self, handle: Buffers, rows: list[int], slots: int) -> Buffers:
        chosen = self._spare.pop(slots, None) or self._allocate(slots)
        for target, source in ((chosen.context, handle.context), (chosen.carry, handle.carry)):
            for name, array in source.items():
                np.take(array, rows, axis=0, out=target[name][: len(rows)])
                target[name][len(rows) :] = 0
        self._spare[len(handle.signals)] = handle
        return chosen

    def _read(self, handle: Buffers, rows: list[int]) -> dict[str, Array]:
        return {name: array[rows] for name, array in (handle.context | handle.carry).items()}

    def _write(self, handle: Buffers, rows: list[int], arrays: dict[str, Array]) -> None:
        for name, target in (handle.context | handle.carry).items():
            target[rows] = arrays[name]


def _bind_input(binding: Any, name: str, array: Array) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _bind_output(binding: Any, name: str, array: Array) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
