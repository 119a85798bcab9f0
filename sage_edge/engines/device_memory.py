"""Where the tensors of a state lie on a device: one allocation a state, cut into aligned pieces."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from sage_edge.bundle import Bundle
from sage_edge.engines.accelerator import Device, Event, Graph, Memory, Pinned
from sage_edge.specs import Array, TensorSpec

ALIGNMENT = 256  # what cudaMalloc guarantees and TensorRT asks of a tensor's address


def item_bytes(spec: TensorSpec) -> int:
    """Bytes of one slot of a tensor."""
    return int(np.dtype(spec.dtype).itemsize * math.prod(spec.item_shape))


class Block:
    """One allocation that holds the given tensors for `slots` slots; `addresses` by key."""

    def __init__(
        self, device: Device, specs: Sequence[tuple[str, TensorSpec]], slots: int, pinned: bool = False
    ) -> None:
        offsets, total = [], 0
        for _, spec in specs:
            offsets.append(total)
            total += -(-item_bytes(spec) * slots // ALIGNMENT) * ALIGNMENT
        self.memory: Memory = device.pinned(total) if pinned else device.allocate(total)
        self.addresses = {key: self.memory.address + at for (key, _), at in zip(specs, offsets, strict=True)}
        self._places = {key: (spec, at) for (key, spec), at in zip(specs, offsets, strict=True)}

    def array(self, key: str, slots: int) -> Array:
        """The first `slots` slots of a tensor in pinned memory, as a view."""
        assert isinstance(self.memory, Pinned)
        spec, at = self._places[key]
        raw = self.memory.array[at : at + item_bytes(spec) * slots]
        return raw.view(spec.dtype).reshape(slots, *spec.item_shape)

    def free(self) -> None:
        self.memory.free()


class Slots:
    """Context, two carries and two rows of signals for `count` slots, with what the runner knows of them.

    A step reads carry `current` and writes the other one; then they swap. done[i]: when carry i was last finished by a
    step; written: when context or carry was last changed from outside; ahead: a step beyond `current` is under way.
    """

    def __init__(self, device: Device, bundle: Bundle, count: int) -> None:
        model = bundle.model
        carried = [(f"{side}/{s.name}", s) for side in (0, 1) for s in model.carry]
        self.count = count
        self.block = Block(device, [*((s.name, s) for s in model.context), *carried], count)
        signal = bundle.graphs.refine.outputs[-1]
        try:
            self.outputs = Block(device, [("0", signal), ("1", signal)], count, pinned=True)
        except Exception:
            self.block.free()
            raise
        self.context = {s.name: self.block.addresses[s.name] for s in model.context}
        self.carries = tuple({s.name: self.block.addresses[f"{side}/{s.name}"] for s in model.carry} for side in (0, 1))
        self.signals: tuple[npt.NDArray[np.float32], ...] = tuple(
            self.outputs.array(str(side), count) for side in (0, 1)
        )
        self.current = 0
        self.done: list[Event | None] = [None, None]
        self.written: Event | None = None
        self.ahead = False
        self.graphs: list[Graph | None] = [None, None]
        self.warm = [0, 0]
        self.returned_at: float | None = None

    @property
    def carry(self) -> dict[str, int]:
        return self.carries[self.current]

    def step_addresses(self, names: Sequence[str], source: int) -> dict[str, int]:
        """Addresses of a step that reads carry `source`; names: the refine graph's outputs in order."""
        target = (*self.carries[1 - source].values(), self.outputs.addresses[str(1 - source)])
        return {**self.context, **self.carries[source], **dict(zip(names, target, strict=True))}

    def free(self) -> None:
        for graph in self.graphs:
            if graph:
                graph.free()
        self.graphs = [None, None]
        self.block.free()
        self.outputs.free()


def runs(pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(target row, source row) pairs joined into (target, source, length) where both advance together."""
    joined: list[tuple[int, int, int]] = []
    for target, source in pairs:
        if joined and (target, source) == (joined[-1][0] + joined[-1][2], joined[-1][1] + joined[-1][2]):
            joined[-1] = (*joined[-1][:2], joined[-1][2] + 1)
        else:
            joined.append((target, source, 1))
    return joined
