"""Plugins for the tests, small enough to be right by inspection: a closed form without a network, and a memory whose store
outlives the request."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sage_edge.errors import InputError
from sage_edge.files import write_atomic
from sage_edge.irp.plugin import Examples, Observation, Plugin, Result
from sage_edge.irp.spec import BenchSpec, Invariants, PluginSpec
from sage_edge.specs import Array

INVARIANTS = Invariants("a state", "noise", "an energy", "a contribution")


def spec(name: str, max_steps: int, **more: Any) -> PluginSpec:
    facts: dict[str, Any] = {"halt": "full", **more}
    return PluginSpec("sage-edge-plugin/1", name, "irp_plugins:X", "for tests", INVARIANTS, max_steps, **facts)


@dataclass
class Estimate:
    """A scalar Kalman filter's state."""

    mean: float
    variance: float
    measured: npt.NDArray[np.float64]


class Fuse(Plugin[Estimate]):
    """Closed form, one step: the posterior of a scalar with a standard normal prior after n measurements of unit noise
    (Bishop, Pattern Recognition and Machine Learning, 2.3.6). Energy: the posterior variance, 1 when nothing was measured."""

    state_type = Estimate

    def __init__(self, plugin_spec: PluginSpec | None = None) -> None:
        super().__init__(plugin_spec or spec("fuse", 1))

    def init_state(self, observation: Observation) -> Estimate:
        if "measured" not in observation:
            raise InputError("fuse: measured: missing, expected float [n]")
        return Estimate(0.0, 1.0, np.asarray(observation["measured"], np.float64))

    def step(self, state: Estimate, index: int) -> Estimate:
        variance = 1 / (1 + len(state.measured))
        return Estimate(variance * float(state.measured.sum()), variance, state.measured)

    def energy(self, state: Estimate) -> float:
        return state.variance

    def result(self, state: Estimate) -> Result:
        return {"mean": state.mean, "variance": state.variance}

    def samples(self, count: int) -> list[Observation]:
        return [{"measured": np.arange(1.0, 2.0 + number)} for number in range(count)]


class Remember(Plugin[dict[str, Array]]):
    """A memory: each step pulls the state to the nearest of the stored vectors (one by one, so that it takes steps), and what
    was recalled is stored when the request is answered. The store is a file that outlives request and process."""

    def __init__(self, store: Path, capacity: int = 100) -> None:
        super().__init__(spec("remember", 6, halt="energy:1e-9"))
        self.store, self.capacity = store, capacity
        self.kept: list[list[float]] = []

    def activate(self) -> None:
        self.kept = json.loads(self.store.read_text()) if self.store.is_file() else []

    def deactivate(self) -> None:
        write_atomic(self.store, json.dumps(self.kept))

    def init_state(self, observation: Observation) -> dict[str, Array]:
        if "cue" not in observation:
            raise InputError("remember: cue: missing, expected float [n]")
        cue = np.asarray(observation["cue"], np.float64)
        known = np.array([v for v in self.kept if len(v) == len(cue)]).reshape(-1, len(cue))
        nearest = known[np.square(known - cue).sum(1).argmin()] if len(known) else cue
        # The request carries its target: what is stored meanwhile must not change a request in flight.
        return {"x": cue, "target": nearest, "start": np.array(max(np.square(nearest - cue).sum(), 1e-12))}

    def step(self, state: dict[str, Array], index: int) -> dict[str, Array]:
        return {**state, "x": state["x"] + 0.9 * (state["target"] - state["x"])}

    def energy(self, state: dict[str, Array]) -> float:
        return float(np.square(state["target"] - state["x"]).sum() / state["start"])

    def result(self, state: dict[str, Array]) -> Result:
        return {"recalled": state["x"].copy()}

    def commit(self, state: dict[str, Array], reason: str) -> None:
        self.kept = [*self.kept, [float(v) for v in state["x"]]][-self.capacity :]

    def samples(self, count: int) -> list[Observation]:
        return [{"cue": np.array([number, 1.0])} for number in range(count)]


@dataclass
class Count:
    need: int
    done: int


class Countdown(Plugin[Count]):
    """Needs as many steps as it is told; energy: what is left, over 10. `worth` a step: the same for all."""

    state_type = Count
    extra_signals: tuple[str, ...] = ("left",)

    def __init__(self, name: str = "count", max_steps: int = 10, halt: str = "energy:0.01", sizes: Sequence[int] = (1,),
                 bench: BenchSpec | None = None) -> None:  # fmt: skip
        super().__init__(spec(name, max_steps, halt=halt, bench=bench))
        self.sizes = tuple(sizes)
        self.calls: list[int] = []
        self.released = 0

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        return self.sizes

    def init_state(self, observation: Observation) -> Count:
        if "need" not in observation:
            raise InputError("count: need: missing, expected a whole number")
        return Count(int(observation["need"]), 0)

    def step_many(self, states: Sequence[Count], indices: Sequence[int]) -> list[Count]:
        self.calls.append(len(states))
        return super().step_many(states, indices)

    def step(self, state: Count, index: int) -> Count:
        if state.need == 13:
            raise OSError("thirteen")
        return Count(state.need, min(state.need, state.done + 1))

    def energy(self, state: Count) -> float:
        return float("nan") if state.need == 7 else (state.need - state.done) / 10

    def read_signals(self, state: Count) -> Sequence[float]:
        return [float(state.need - state.done)]

    def result(self, state: Count) -> Result:
        return {"done": state.done}

    def release(self, state: Count) -> None:
        self.released += 1

    def samples(self, count: int) -> list[Observation]:
        return [{"need": number + 2} for number in range(count)]

    def examples(self, source: str, limit: int | None = None) -> Examples:
        needs = [n for n in (1, 2, 3, 4, 5, 6, 8, 9, 10) for _ in range(40)]
        needs = [int(n) for n in np.random.default_rng(len(source)).permutation(needs)][:limit]
        return Examples([{"need": n} for n in needs], needs, {"need": needs})

    def quality(self, result: Result, reference: Any) -> float:
        return float(result["done"]) / float(reference)
