"""How fast could a graph run on a device at best? Arithmetic against the device's ceilings, before anything is built.

The roofline model (Williams, Waterman, Patterson, CACM 52(4), 2009), applied operator by operator: an operator takes the
longer of its arithmetic at the peak for its type and of its traffic with main memory. What comes from main memory is found
by playing the graph's reads and writes, in order, against a cache of the size of the device's L2 that drops what was used
longest ago; the second of two steps counts, so that weights that stay are found there. Launches, tails and everything
that kernels do badly are left out: the prediction is a bound from below.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sage_edge.bundle import GRAPH_NAMES, Bundle
from sage_edge.config import load_yaml
from sage_edge.engines.graph_cost import GraphCost, NodeCost, graph_cost
from sage_edge.errors import InputError

DEVICES = Path(__file__).with_name("devices.yaml")
MIB = 1 << 20
# What stands in for a type that a device has no figure for: the next wider one that it has.
WIDER = {"fp8": "fp16", "int8": "fp16", "bf16": "fp16", "fp16": "fp32", "tf32": "fp32"}


@dataclass(frozen=True)
class Ceilings:
    """tflops: dense peak by type; dram_gbs: main memory, GB/s; l2_mib: last cache, None where unknown (then: none)."""

    tflops: dict[str, float]
    dram_gbs: float
    l2_mib: float | None
    source: str

    def __post_init__(self) -> None:
        if "fp32" not in self.tflops or min(self.tflops.values()) <= 0 or self.dram_gbs <= 0:
            raise ValueError("tflops must hold fp32, and all figures must be positive")

    def peak(self, kind: str) -> float:
        """Operations a second for a type of arithmetic, of the next wider type where there is no figure."""
        while kind not in self.tflops:
            kind = WIDER.get(kind, "fp32")
        return self.tflops[kind] * 1e12


@dataclass(frozen=True)
class _Devices:
    devices: dict[str, Ceilings]


@dataclass(frozen=True)
class Prediction:
    """One graph on one device. dram_mib: traffic with main memory a run; weights_resident: no weight is read from there
    again in a second run; intensity: operations per byte of it, None without any; bound: what most of the time goes to."""

    graph: str
    slots: int
    gflop: float
    weights_mib: float
    weights_read_mib: float
    dram_mib: float
    weights_resident: bool
    intensity: float | None
    compute_ms: float
    memory_ms: float
    milliseconds: float
    bound: str
    unknown_operators: int


def known_devices() -> dict[str, Ceilings]:
    """The devices of devices.yaml."""
    return load_yaml(DEVICES, _Devices).devices


def ceilings_of(device: str) -> Ceilings:
    """The ceilings of a named device. Raises InputError naming what there is."""
    devices = known_devices()
    for name, ceilings in devices.items():
        if name.lower() == device.lower():
            return ceilings
    near = [name for name in devices if name.split(":")[0].lower() == device.split(":")[0].lower()]
    hint = f"; its power modes: {', '.join(near)}" if near else ""
    raise InputError(f"device {device!r} is not known; there is this, {', '.join(devices)}{hint}")


class Cache:
    """Least recently used out first, by whole tensors; one larger than the cache passes through it."""

    def __init__(self, size: float) -> None:
        self.size = size
        self.used = 0
        self._held: OrderedDict[str, int] = OrderedDict()

    def touch(self, name: str, nbytes: int) -> bool:
        """Read or write a tensor; whether it was there."""
        if name in self._held:
            self._held.move_to_end(name)
            return True
        if nbytes > self.size:
            return False
        self._held[name] = nbytes
        self.used += nbytes
        while self.used > self.size:
            self.used -= self._held.popitem(last=False)[1]
        return False

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def drop(self, name: str) -> None:
        """Forget a value that nobody reads any more: its place is reused."""
        self.used -= self._held.pop(name, 0)


def predict(graph: str, cost: GraphCost, ceilings: Ceilings) -> Prediction:
    """What a run of `cost` takes on a device at best, once it is warm."""
    cache = Cache((ceilings.l2_mib or 0) * MIB)
    last = {name: index for index, node in enumerate(cost.nodes) for name, _ in node.values}
    seconds = compute = memory = 0.0
    traffic = weights_read = 0
    fetched = [_missed(cache, node, index, last) for _ in range(2) for index, node in enumerate(cost.nodes)]
    for node, (weights, values) in zip(cost.nodes, fetched[len(cost.nodes) :], strict=True):
        arithmetic = node.flops / ceilings.peak(node.type)
        moving = (weights + values) / (ceilings.dram_gbs * 1e9)
        seconds += max(arithmetic, moving)
        compute, memory = compute + arithmetic, memory + moving
        traffic, weights_read = traffic + weights + values, weights_read + weights
    flops = sum(node.flops for node in cost.nodes)
    return Prediction(
        graph=graph,
        slots=cost.slots,
        gflop=flops / 1e9,
        weights_mib=cost.weight_bytes / MIB,
        weights_read_mib=weights_read / MIB,
        dram_mib=traffic / MIB,
        weights_resident=weights_read == 0,
        intensity=flops / traffic if traffic else None,
        compute_ms=compute * 1e3,
        memory_ms=memory * 1e3,
        milliseconds=seconds * 1e3,
        bound="compute" if compute >= memory else "memory",
        unknown_operators=len(cost.unknown),
    )


def _missed(cache: Cache, node: NodeCost, index: int, last: dict[str, int]) -> tuple[int, int]:
    """Bytes of weights, and of computed values, that operator number `index` exchanges with main memory."""
    weights = sum(size for name, size in node.weights if not cache.touch(f"w/{name}", size))
    values = 0
    for name, size in node.values:
        # What is written for the first time while it fits is not traffic: it may be read and dropped before it must go.
        known = cache.touch(f"v/{name}", size)
        values += 0 if known or f"v/{name}" in cache else size
        if last[name] == index:
            cache.drop(f"v/{name}")
    return weights, values


def roofline(
    folder: Path, bundle: Bundle, ceilings: Ceilings, slots: tuple[int, ...], steps: float | None = None
) -> dict[str, Any]:
    """Predictions for all graphs of a bundle at several numbers of slots.

    steps: refinement steps of an answer (default: the model's most). answers_per_s: that many steps, one encode and one
    decode for each answer, all slots busy.
    """
    taken = float(steps or bundle.max_steps)
    rows = []
    for count in slots:
        graphs = {name: predict(name, graph_cost(folder / f"{name}.onnx", count), ceilings) for name in GRAPH_NAMES}
        whole = graphs["refine"].milliseconds * taken + graphs["encode"].milliseconds + graphs["decode"].milliseconds
        rows.append({"slots": count, "graphs": {name: asdict(p) for name, p in graphs.items()}, "steps": taken,
                     "answer_ms": whole, "answers_per_s": 1e3 * count / whole})  # fmt: skip
    return {"bundle": str(folder), "precision": bundle.precision, "ceilings": asdict(ceilings), "rows": rows}
