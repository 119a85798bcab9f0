"""The null model (sage_edge.engines.null) as programs for a device: arithmetic that is predictable by hand.

Each program counts what it ran, can be told to fail in a capture, and takes scratch memory for every number of slots.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sage_edge.bundle import Bundle, Graphs, GraphSpec, Provenance
from sage_edge.engines.accelerator import CaptureError, Device, Memory, Stream
from sage_edge.engines.accelerator_null import NullStream
from sage_edge.engines.device_memory import item_bytes
from sage_edge.engines.null import NULL_MODEL, WIDTH
from sage_edge.engines.program import Execution, Program
from sage_edge.specs import SLOTS, Array, TensorSpec

SIGNALS = TensorSpec("signals", "float32", (SLOTS, len(NULL_MODEL.signals)))
NEXT = TensorSpec("z_H_next", "float32", (SLOTS, WIDTH))


def null_bundle() -> Bundle:
    model = NULL_MODEL
    graphs = Graphs(
        encode=GraphSpec(model.observation, (*model.context, *model.carry)),
        refine=GraphSpec((*model.context, *model.carry), (NEXT, SIGNALS)),
        decode=GraphSpec(model.carry, model.prediction),
    )
    files = dict.fromkeys(("encode.onnx", "refine.onnx", "decode.onnx", "reference.npz"), "0" * 64)
    return Bundle("sage-edge-bundle/1", "null", "fp32", 0, 0.0, model.max_steps, model.signals, graphs, files,
                  Provenance("0" * 64, "null", {}))  # fmt: skip


def view(address: int, spec: TensorSpec, slots: int) -> Array:
    raw = np.ctypeslib.as_array((ctypes.c_uint8 * (slots * item_bytes(spec))).from_address(address))
    return raw.view(spec.dtype).reshape(slots, *spec.item_shape)


def encode(t: dict[str, Array]) -> None:
    t["context"][:] = t["inputs"]
    t["z_H"][:] = 0


def refine(t: dict[str, Array]) -> None:
    need = t["context"][:, 0]
    changed = t["z_H"][:, 0] < need
    t["z_H_next"][:] = np.minimum(t["z_H"] + 1, need[:, None])
    left = need - t["z_H_next"][:, 0]
    t["signals"][:] = np.stack((-left, np.full_like(left, -0.5), left, changed.astype(np.float32)), axis=1)


def decode(t: dict[str, Array]) -> None:
    with np.errstate(invalid="ignore"):
        t["prediction"][:] = t["z_H"].astype(np.int32)


class CountingProgram(Program):
    def __init__(self, spec: GraphSpec, work: Callable[[dict[str, Array]], None], scratch_bytes: int = 0) -> None:
        self.spec = spec
        self.work = work
        self.scratch_bytes = scratch_bytes
        self.ran: list[int] = []  # slots of every run
        self.captured = 0
        self.capture_error = ""
        self.opened = 0
        self._scratch: list[Memory] = []

    def open(self, device: Device, stream: Stream) -> None:
        self.device = device
        self.opened += 1

    def execution(self, slots: int) -> Execution:
        if self.scratch_bytes:
            self._scratch.append(self.device.allocate(slots * self.scratch_bytes))
        return CountingExecution(self, slots)

    def close(self) -> None:
        for memory in self._scratch:
            memory.free()
        self._scratch.clear()


class CountingExecution(Execution):
    def __init__(self, program: CountingProgram, slots: int) -> None:
        self.program = program
        self.slots = slots

    def enqueue(self, stream: Stream, addresses: Mapping[str, int]) -> None:
        assert isinstance(stream, NullStream)
        program = self.program
        if stream._capturing is not None:
            if program.capture_error:
                raise CaptureError(program.capture_error)
            program.captured += 1
        places = {s.name: (addresses[s.name], s) for s in (*program.spec.inputs, *program.spec.outputs)}

        def work() -> None:
            program.ran.append(self.slots)
            program.work({name: view(address, spec, self.slots) for name, (address, spec) in places.items()})

        stream.enqueue(work, [(address, item_bytes(spec) * self.slots) for address, spec in places.values()])


def null_programs(bundle: Bundle, scratch_bytes: int = 0) -> dict[str, Any]:
    graphs = bundle.graphs
    return {
        "encode": CountingProgram(graphs.encode, encode),
        "refine": CountingProgram(graphs.refine, refine, scratch_bytes),
        "decode": CountingProgram(graphs.decode, decode),
    }
