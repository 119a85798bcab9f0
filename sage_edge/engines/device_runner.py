"""The runner for accelerators: carry in device memory, steps captured as graphs, the next step started early.

It knows devices (`accelerator`) and programs (`program`) only by their interfaces. Two streams: steps go on `work`;
admission, decoding and copies on `quick`, which has priority. What keeps them apart:

- A step reads context and carry `current` and writes the other carry and the other signals; then they swap.
- After a step the host waits for its event, so whatever follows on `quick` finds the carry finished.
- A step started early reads what later calls may want to overwrite: they first wait for it, on the device (`_settle`).
  Its results lie in the other carry, which nobody reads before the next step has overwritten it.
- What `quick` writes is marked by `written`, and the next step waits for it, on the device.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sage_edge.bundle import GRAPH_NAMES, Bundle
from sage_edge.engines.accelerator import CaptureError, Device, DeviceInfo, OutOfMemoryError, Stream
from sage_edge.engines.device_memory import Block, Slots, item_bytes, runs
from sage_edge.engines.program import Execution, Program
from sage_edge.engines.runner import Runner
from sage_edge.engines.speculation import Foresight
from sage_edge.errors import EngineError
from sage_edge.specs import Array, TensorSpec


@dataclass(frozen=True)
class RunOptions:
    """How to run: graphs: capture the step as a device graph after `warmup` plain runs; speculate: start the next step
    before the last one's signals are read: "auto" where it pays (`speculation`), "always", "never"."""

    graphs: bool = True
    warmup: int = 1
    speculate: Literal["auto", "always", "never"] = "auto"


class Lease:
    """The handle of a state; its slots go back to the runner when nobody holds it any more."""

    def __init__(self, slots: Slots, give_back: Callable[[Slots], None]) -> None:
        self.slots = slots
        self.end = weakref.finalize(self, give_back, slots)
        self.end.atexit = False


class DeviceRunner(Runner):
    """Runs the three programs of `bundle` on `device`.

    notes: what did not go as wished and why (a graph that could not be captured, a smaller profile), for reports. When
    memory does not suffice for `slots` slots, `activate` goes on with the next smaller of `shapes` and says so. admits:
    raises InputError for a device that the programs were not built for, before anything is loaded.
    """

    def __init__(self, bundle: Bundle, slots: int, digest: str, device: Device, programs: Mapping[str, Program],
                 options: RunOptions | None = None, shapes: Sequence[int] | None = None,
                 admits: Callable[[DeviceInfo], None] = lambda info: None) -> None:  # fmt: skip
        super().__init__(bundle.model, slots, digest)
        self.bundle = bundle
        self.device = device
        self.programs = programs
        self.options = options or RunOptions()
        if shapes is not None:
            self.shapes = tuple(shapes)
        self._admits = admits
        self.notes: list[str] = []
        self.foresight = Foresight()
        self.overruns = 0  # steps started early whose result nobody wanted
        self._wished = (self.slots, self.shapes)
        self._executions: dict[tuple[str, int], Execution] = {}
        self._spare: dict[int, list[Slots]] = {}
        self._blocks: list[Block] = []
        self._all: list[Slots] = []
        self._capturing = True
        self._step_names = [spec.name for spec in bundle.graphs.refine.outputs]

    def _require_active(self) -> None:
        super()._require_active()
        self.device.enter_thread()

    def _activate(self) -> None:
        self.notes.clear()
        self.slots, self.shapes = self._wished
        self._capturing = self.options.graphs
        self.device.open()
        try:
            self._admits(self.device.info)
            self._work = self.device.stream("normal")
            self._quick = self.device.stream("high")
            self._open()
        except BaseException:
            self._deactivate()
            raise

    def _open(self) -> None:
        """Load and allocate for all shapes, without the largest as long as memory does not suffice."""
        while True:
            try:
                for name in GRAPH_NAMES:
                    self.programs[name].open(self.device, self._stream(name))
                self._allocate()
                return
            except OutOfMemoryError as error:
                self._release()
                if len(self.shapes) == 1:
                    raise EngineError(
                        f"{self.bundle.name}: out of device memory even for {self.slots} slot(s): {error}; close other "
                        "programs, or build with a smaller precision or fewer slots"
                    ) from error
                self.shapes = self.shapes[:-1]
                self.notes.append(
                    f"{self.slots} slots do not fit into device memory ({error}); running {self.shapes[-1]}"
                )
                self.slots = self.shapes[-1]

    def _stream(self, graph: str) -> Stream:
        return self._work if graph == "refine" else self._quick

    def _allocate(self) -> None:
        """All buffers, once: a state of each shape, staging for encode, room for what encode reads and decode writes."""
        graphs = self.bundle.graphs

        def block(specs: Sequence[TensorSpec], pinned: bool = False) -> Block:
            made = Block(self.device, [(s.name, s) for s in specs], self.slots, pinned)
            self._blocks.append(made)
            return made

        self._observed = block(graphs.encode.inputs)
        self._encoded = block(graphs.encode.outputs)
        self._decoded = block(graphs.decode.outputs)
        self._landing = block(graphs.decode.outputs, pinned=True)
        self._copies = block((*self.model.context, *self.model.carry), pinned=True)
        for shape in reversed(self.shapes):  # the largest first, so that what does not fit shows at once
            self._spare.setdefault(shape, []).append(self._new_slots(shape))
            for name in GRAPH_NAMES:
                self._execution(name, shape)

    def _new_slots(self, count: int) -> Slots:
        made = Slots(self.device, self.bundle, count)
        self._all.append(made)
        return made

    def _execution(self, graph: str, slots: int) -> Execution:
        key = (graph, slots)
        if key not in self._executions:
            self._executions[key] = self.programs[graph].execution(slots)
        return self._executions[key]

    def _release(self) -> None:
        self._executions.clear()
        for slots in self._all:
            slots.free()
        for block in self._blocks:
            block.free()
        for held in (self._all, self._blocks, self._spare):
            held.clear()
        for program in self.programs.values():
            program.close()

    def _deactivate(self) -> None:
        try:
            for stream in (getattr(self, "_work", None), getattr(self, "_quick", None)):
                if stream is not None:
                    stream.synchronize()
        finally:
            self._release()
            self.device.close()

    def describe(self) -> dict[str, Any]:
        """What is running, for reports."""
        captured = sum(graph is not None for slots in self._all for graph in slots.graphs)
        executions = self._executions.values()
        captured += sum(execution.own_graphs for execution in executions)
        given_up = {execution.not_captured for execution in executions if execution.not_captured}
        notes = [*self.notes, *(f"the step runs without a device graph: {reason}" for reason in sorted(given_up))]
        return {"device": self.device.info.key, "slots": self.slots, "shapes": list(self.shapes),
                "graphs_captured": captured, "speculate": self.options.speculate, "overruns": self.overruns,
                "notes": notes}  # fmt: skip

    # States

    def _take(self, count: int) -> Lease:
        """Slots of this many, from those given back or new ones; what still works on them is waited for on the device."""
        spare = self._spare.setdefault(count, [])
        slots = spare.pop() if spare else self._make_room(count)
        self._settle(slots)
        slots.current, slots.returned_at = 0, None
        return Lease(slots, spare.append)

    def _make_room(self, count: int) -> Slots:
        try:
            return self._new_slots(count)
        except OutOfMemoryError as error:
            unused = [slots for shape, held in self._spare.items() if shape != count for slots in held]
            if not unused:
                raise OutOfMemoryError(
                    f"no room for another state of {count} slots: {error}; hold fewer states"
                ) from error
            self._work.synchronize()  # an early step may still write to them
            for held in self._spare.values():
                held.clear()
            for slots in unused:
                self._all.remove(slots)
                slots.free()
            return self._new_slots(count)

    def _settle(self, slots: Slots) -> None:
        """Before anything of `slots` is overwritten: `quick` waits for a step that was started early, in vain."""
        if slots.ahead:
            slots.ahead = False
            self.overruns += 1
            event = slots.done[1 - slots.current]
            assert event is not None
            self._quick.wait(event)
        if slots.returned_at is not None:
            slots.returned_at = None
            self.foresight = self.foresight.stopped()

    def _written(self, slots: Slots) -> None:
        slots.written = self._quick.record()

    def _empty(self, slots: int) -> Lease:
        lease = self._take(slots)
        block = lease.slots.block.memory
        self._quick.zero(block.address, block.nbytes)
        self._written(lease.slots)
        return lease

    def _admit(self, handle: Lease, rows: list[int], observation: dict[str, Array]) -> None:
        """Encode at the state's own number of slots, so that a request's bits do not depend on who came with it."""
        slots = handle.slots
        self._settle(slots)
        whole = rows == list(range(slots.count))
        for name, array in observation.items():
            # Rows that nobody wants repeat the first newcomer: valid input whatever the model's vocabulary.
            padded = array if whole else np.concatenate((array, np.repeat(array[:1], slots.count - len(rows), axis=0)))
            self._quick.upload(self._observed.addresses[name], padded)
        inside = {**slots.context, **slots.carry}
        target = inside if whole else self._encoded.addresses
        self._execution("encode", slots.count).enqueue(self._quick, {**self._observed.addresses, **target})
        if not whole:
            self._move(inside, self._encoded.addresses, list(enumerate(rows)))
        self._written(slots)

    def _move(self, targets: Mapping[str, int], sources: Mapping[str, int], pairs: list[tuple[int, int]]) -> None:
        """Copy rows of context and carry on the device; pairs: (source row, target row)."""
        joined = runs((target, source) for source, target in pairs)
        for spec in (*self.model.context, *self.model.carry):
            size = item_bytes(spec)
            for target, source, length in joined:
                self._quick.copy(targets[spec.name] + target * size, sources[spec.name] + source * size, length * size)

    # Steps

    def _refine(self, handle: Lease) -> npt.NDArray[np.float32]:
        slots = handle.slots
        now = time.perf_counter()
        if slots.returned_at is not None:
            self.foresight = self.foresight.continued(now - slots.returned_at)
        early = slots.ahead
        if not early:
            self._start(slots, slots.current)
        slots.ahead = False
        slots.current = 1 - slots.current
        event = slots.done[slots.current]
        assert event is not None
        if self.options.speculate == "always" or (self.options.speculate == "auto" and self.foresight.pays):
            self._start(slots, slots.current)
            slots.ahead = True
        event.synchronize()
        slots.returned_at = time.perf_counter()
        if not early:
            self.foresight = self.foresight.took(slots.returned_at - now)
        return slots.signals[slots.current]

    def _start(self, slots: Slots, source: int) -> None:
        """Enqueue the step that reads carry `source`: as a graph once it is warm."""
        if slots.written is not None:
            self._work.wait(slots.written)
            slots.written = None
        execution = self._execution("refine", slots.count)
        addresses = slots.step_addresses(self._step_names, source)
        wanted = self._capturing and not execution.captures_itself
        if wanted and slots.graphs[source] is None and slots.warm[source] >= self.options.warmup:
            self._capture(slots, source, execution, addresses)
        graph = slots.graphs[source]
        if graph is not None:
            graph.launch(self._work)
        else:
            execution.enqueue(self._work, addresses)
            slots.warm[source] += 1
        slots.done[1 - source] = self._work.record()

    def _capture(self, slots: Slots, source: int, execution: Execution, addresses: dict[str, int]) -> None:
        reason = execution.not_capturable
        if not reason:
            try:
                slots.graphs[source] = self._work.capture(lambda: execution.enqueue(self._work, addresses))
                return
            except CaptureError as error:
                reason = str(error)
        self._capturing = False  # what failed once fails again, and every try costs a step
        self.notes.append(f"the step runs without a device graph: {reason}")

    # Results

    def _decode(self, handle: Lease, names: tuple[str, ...]) -> dict[str, Array]:
        slots, graph = handle.slots, self.bundle.graphs.decode
        inputs = {spec.name: slots.carry[spec.name] for spec in graph.inputs}
        self._execution("decode", slots.count).enqueue(self._quick, {**inputs, **self._decoded.addresses})
        wanted = [spec for spec in graph.outputs if spec.name in names]
        for spec in wanted:
            source = self._decoded.addresses[spec.name]
            self._quick.copy(self._landing.addresses[spec.name], source, item_bytes(spec) * slots.count)
        self._quick.record().synchronize()
        found = {spec.name: self._landing.array(spec.name, slots.count).copy() for spec in wanted}
        return {name: found[name] for name in names}

    def _select(self, handle: Lease, rows: list[int], slots: int) -> Lease:
        chosen = self._empty(slots) if len(rows) < slots else self._take(slots)
        old = handle.slots
        pairs = [(source, target) for target, source in enumerate(rows)]
        self._move({**chosen.slots.context, **chosen.slots.carry}, {**old.context, **old.carry}, pairs)
        self._written(chosen.slots)
        if handle.end.detach():
            self._spare.setdefault(old.count, []).append(old)
        return chosen

    def _read(self, handle: Lease, rows: list[int]) -> dict[str, Array]:
        slots = handle.slots
        specs = (*self.model.context, *self.model.carry)
        sources = {**slots.context, **slots.carry}
        joined = runs((target, source) for target, source in enumerate(rows))
        for spec in specs:
            size = item_bytes(spec)
            for target, source, length in joined:
                self._quick.copy(self._copies.addresses[spec.name] + target * size,
                                 sources[spec.name] + source * size, length * size)  # fmt: skip
        self._quick.record().synchronize()
        return {spec.name: self._copies.array(spec.name, len(rows)).copy() for spec in specs}

    def _write(self, handle: Lease, rows: list[int], arrays: dict[str, Array]) -> None:
        slots = handle.slots
        self._settle(slots)
        targets = {**slots.context, **slots.carry}
        for spec in (*self.model.context, *self.model.carry):
            size = item_bytes(spec)
            for target, source, length in runs((target, source) for source, target in enumerate(rows)):
                self._quick.upload(targets[spec.name] + target * size, arrays[spec.name][source : source + length])
        self._written(slots)
