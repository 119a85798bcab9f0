"""Every check of the conformance suite can fail: a plugin with one seeded fault each, and the check that must find it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sage_edge.engines.null import NullRunner
from sage_edge.irp.conformance import CHECKS, check_plugin
from sage_edge.irp.engine import EnginePlugin
from sage_edge.irp.halting import History, Policy
from sage_edge.irp.plugin import Examples, Observation, Plugin, Result
from sage_edge.irp.registry import open_plugin
from sage_edge.irp.skeleton import new_plugin
from sage_edge.irp.spec import BenchSpec
from sage_edge.irp.telemetry import Moment
from sage_edge.specs import Array
from tests.irp_plugins import Count, Countdown, Fuse, spec


def failed(plugin: Plugin[Any]) -> dict[str, str]:
    with plugin:
        return {finding.name: finding.detail for finding in check_plugin(plugin) if not finding.passed}


class FewSamples(Countdown):
    def samples(self, count: int) -> list[Observation]:
        return [{"need": 3}]


class TwiceNamed(Countdown):
    extra_signals: tuple[str, ...] = ("left", "left")

    def read_signals(self, state: Count) -> Sequence[float]:
        return [0.0, 0.0]


class TakesAnything(Countdown):
    def init_state(self, observation: Observation) -> Count:
        return Count(int(observation.get("need", 3)), 0)


class TracebackOnBadInput(Countdown):
    def init_state(self, observation: Observation) -> Count:
        return Count(int(observation["need"]), 0)


class NotFinite(Countdown):
    def energy(self, state: Count) -> float:
        return float("inf") if state.done == 3 else 0.5


class BelowBest(Countdown):
    def energy(self, state: Count) -> float:
        return super().energy(state) - 0.3


class SignReversed(Countdown):
    def energy(self, state: Count) -> float:
        return min(1.0, state.done / 10)


class Standstill(Countdown):
    def step(self, state: Count, index: int) -> Count:
        return state


class EnergyMoves(Countdown):
    def energy(self, state: Count) -> float:
        value = super().energy(state)
        state.done = min(state.need, state.done + 1)
        return value


class EnergyWanders(Countdown):
    def __init__(self) -> None:
        super().__init__()
        self.noise = itertools.cycle((0.0, 0.001))

    def energy(self, state: Count) -> float:
        return super().energy(state) + next(self.noise)


class ProjectAdds(Countdown):
    def project(self, state: Count) -> Count:
        return Count(min(state.need + 1, 6), state.done)


class Random(Countdown):
    rng = np.random.default_rng()

    def step(self, state: Count, index: int) -> Count:
        return Count(state.need, min(state.need, state.done + int(self.rng.integers(0, 2))))


class StateOnSelf(Countdown):
    """Works alone, mixes requests up in company: the classic."""

    def init_state(self, observation: Observation) -> Count:
        self.current = super().init_state(observation)
        return self.current

    def step(self, state: Count, index: int) -> Count:
        self.current = super().step(self.current, index)
        return self.current


class NeverStops(Countdown):
    def halt(self, history: History, policy: Policy) -> str:
        return ""


class StopsWithTrue(Countdown):
    def halt(self, history: History, policy: Policy) -> str:
        return True  # type: ignore[return-value]


class ForgetsAField(Countdown):
    def pack(self, state: Count) -> dict[str, Array]:
        return {"need": np.array(state.need)}

    def unpack(self, arrays: dict[str, Array]) -> Count:
        return Count(int(arrays["need"]), 0)


class OddResult(Countdown):
    def result(self, state: Count) -> Result:
        return {"state": state}


class BadRecord(Countdown):
    def emit_telemetry(self, moment: Moment) -> dict[str, Any]:
        return {**super().emit_telemetry(moment), "steps": 0}


class NaNRecord(Countdown):
    def emit_telemetry(self, moment: Moment) -> dict[str, Any]:
        return {**super().emit_telemetry(moment), "extra": {"mine": float("nan")}}


class AgainstQuality(Countdown):
    """The energy falls at last, but on the way better answers have higher energies."""

    def __init__(self) -> None:
        super().__init__(bench=BenchSpec("a", "b", "done / need"))

    def energy(self, state: Count) -> float:
        return 0.0 if state.done == state.need else 0.1 + state.done / 20

    def examples(self, source: str, limit: int | None = None) -> Examples:
        return Examples([{"need": 10}] * 8, [10] * 8)


SEEDED: list[tuple[Callable[[], Plugin[Any]], str]] = [
    (FewSamples, "samples"), (TwiceNamed, "declaration"), (lambda: Countdown(halt="nonsense:1"), "declaration"),
    (lambda: Countdown(sizes=(2, 4)), "declaration"), (TakesAnything, "bad input refused"),
    (TracebackOnBadInput, "bad input refused"), (NotFinite, "energy finite"), (BelowBest, "energy finite"),
    (SignReversed, "energy lower is better"), (Standstill, "energy lower is better"),
    (AgainstQuality, "energy lower is better"), (EnergyMoves, "energy only looks"), (EnergyWanders, "energy only looks"),
    (ProjectAdds, "project idempotent"), (Random, "steps deterministic"), (StateOnSelf, "requests independent"),
    (NeverStops, "halting terminates"), (StopsWithTrue, "halting terminates"), (ForgetsAField, "state serialisable"),
    (OddResult, "result"), (BadRecord, "telemetry valid"), (NaNRecord, "telemetry valid"),
]  # fmt: skip


@pytest.mark.parametrize(("broken", "check"), SEEDED, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_seeded_fault_is_found_by_its_check(broken: Callable[[], Plugin[Any]], check: str) -> None:
    found = failed(broken())
    assert check in found, found
    assert found[check]


def test_every_check_has_a_seeded_fault() -> None:
    assert {check for _, check in SEEDED} == set(CHECKS)


@pytest.mark.parametrize("plugin", [Countdown(), Countdown(sizes=(1, 2, 4)), Fuse()])
def test_good_plugins_pass(plugin: Plugin[Any]) -> None:
    assert failed(plugin) == {}


def test_an_engine_plugin_passes_over_the_null_runner() -> None:
    class Null(EnginePlugin):
        def energy_of(self, signals: np.ndarray) -> float:
            return super().energy_of(signals) / 10

        def samples(self, count: int) -> list[Observation]:
            return [{"inputs": np.full(4, number + 2, np.int32)} for number in range(count)]

    assert failed(Null(spec("null", 8, halt="learned"), runner=NullRunner(4))) == {}


def test_the_skeleton_is_a_working_plugin(tmp_path: Path) -> None:
    folder = new_plugin("my-first", tmp_path)
    assert failed(open_plugin(folder)) == {}


def test_plugin_reason_conforms() -> None:
    assert failed(open_plugin("reason")) == {}
