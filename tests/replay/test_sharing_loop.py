"""The loop that shares a device: answers that depend on nothing but the request, failures that stay where they belong."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sage_edge.engines.null import NullRunner
from sage_edge.errors import EngineError, InputError, RefusedError
from sage_edge.irp.engine import EnginePlugin
from sage_edge.irp.halting import History, Policy
from sage_edge.irp.plugin import Plugin, Result
from sage_edge.irp.profiles import PROFILES
from sage_edge.irp.registry import open_plugin
from sage_edge.sharing.budget import Budget
from sage_edge.sharing.clock import SimulatedClock
from sage_edge.sharing.costs import Costs
from sage_edge.sharing.loop import Loop, measured_costs
from sage_edge.sharing.power import EnergySensor
from sage_edge.sharing.rules import RULES
from sage_edge.sharing.scheduler import Settings
from tests.irp_plugins import Count, Countdown, Fuse, spec


class Timed(Countdown):
    """A step takes ten simulated milliseconds."""

    def __init__(self, clock: SimulatedClock, **more: Any) -> None:
        super().__init__(**more)
        self.clock = clock

    def step_many(self, states: Sequence[Count], indices: Sequence[int]) -> list[Count]:
        self.clock.advance(0.01)
        return super().step_many(states, indices)


class Null(EnginePlugin):
    def energy_of(self, signals: np.ndarray) -> float:
        return super().energy_of(signals) / 1000


def null() -> Null:
    return Null(spec("null", 16, halt="learned"), runner=NullRunner(4))


@pytest.mark.parametrize("rule", sorted(RULES))
def test_answers_are_those_of_each_request_alone_under_every_rule(rule: str) -> None:
    needs = [int(n) for n in np.random.default_rng(0).integers(1, 7, 60)]
    with Loop({"count": Countdown(sizes=(1, 2, 4)), "null": null(), "fuse": Fuse()}, Settings(rule=rule)) as loop:
        counted = [loop.submit("count", {"need": need}, priority=need % 2) for need in needs if need != 7]
        engine = [loop.submit("null", {"inputs": np.full(4, need, np.int32)}) for need in needs]
        fused = loop.submit("fuse", {"measured": np.ones(3)})
        loop.run_until_idle()
    for ticket, need in zip(counted, needs, strict=True):
        answer = ticket.result()
        assert (answer.steps, answer.reason, answer.result) == (need, "energy:0.01", {"done": need})
        assert answer.energies.tolist() == [(need - k) / 10 for k in range(1, need + 1)]
        assert answer.trace.shape == (need, 2)
        assert (np.diff(answer.step_ms) >= 0).all()
        assert answer.waited_ms <= answer.step_ms[0] <= answer.milliseconds
        assert answer.spent.atp == pytest.approx(answer.spent.time_ms)
    for ticket, need in zip(engine, needs, strict=True):
        answer = ticket.result()
        assert (answer.steps, answer.reason) == (need, "learned")
        np.testing.assert_array_equal(answer.result["prediction"], np.full(4, need))
    assert fused.result().result["variance"] == 0.25


def test_failures_stay_with_their_request() -> None:
    with Loop({"count": Countdown()}) as loop:
        good = loop.submit("count", {"need": 3})
        raises, not_finite = loop.submit("count", {"need": 13}), loop.submit("count", {"need": 7})
        with pytest.raises(InputError, match="need: missing"):
            loop.submit("count", {})
        loop.run_until_idle()
        assert good.result().result == {"done": 3}
        with pytest.raises(EngineError, match="plugin count failed at step: OSError: thirteen"):
            raises.result()
        with pytest.raises(EngineError, match="the energy is nan"):
            not_finite.result()
        plugin = loop.plugins["count"]
        assert isinstance(plugin, Countdown)
        assert plugin.released == 3, "however a request ends, its state is given back"


class BadResult(Countdown):
    def result(self, state: Count) -> Result:
        raise ValueError("no result")


class BadHalt(Countdown):
    def halt(self, history: History, policy: Policy) -> str:
        raise ZeroDivisionError


def test_a_result_that_fails_is_the_requests_failure_and_a_halt_that_fails_ends_it() -> None:
    with Loop({"bad": BadResult(), "halt": BadHalt()}) as loop:
        one, other = loop.submit("bad", {"need": 2}), loop.submit("halt", {"need": 2})
        loop.run_until_idle()
        with pytest.raises(EngineError, match="failed at result: ValueError: no result"):
            one.result()
        answer = other.result()
        assert (answer.steps, answer.reason) == (1, "halt failed: ZeroDivisionError")


def test_a_deadline_gives_the_best_so_far_or_refuses_what_never_began() -> None:
    clock = SimulatedClock()
    costs = {"count": Costs({1: 10.0}, {1: 10.0})}
    with Loop({"count": Timed(clock)}, clock=clock, costs=costs) as loop:
        first = loop.submit("count", {"need": 10}, deadline_ms=35)
        late = loop.submit("count", {"need": 10}, deadline_ms=1)
        loop.run_until_idle()
    answer = first.result()
    assert (answer.reason, answer.result) == ("deadline", {"done": answer.steps})
    assert answer.steps == 4, "a step that was begun is finished"
    assert answer.step_ms.tolist() == pytest.approx([10 * k for k in range(1, answer.steps + 1)])
    with pytest.raises(RefusedError, match="deadline: it passed before the first step"):
        late.result()


def test_a_request_that_is_cancelled_is_gone_and_its_state_given_back() -> None:
    with Loop({"count": Countdown()}) as loop:
        ticket = loop.submit("count", {"need": 9})
        loop.tick()
        assert ticket.cancel()
        assert not ticket.cancel()
        assert loop.idle
        with pytest.raises(RefusedError, match="cancelled"):
            ticket.result()
        assert loop.plugins["count"].released == 1  # type: ignore[attr-defined]


def test_threads_may_submit_cancel_and_wait() -> None:
    results: dict[int, int] = {}

    def client(loop: Loop, start: int) -> None:
        for number in range(start, start + 12):
            need = 1 + number % 6
            ticket = loop.submit("count", {"need": need})
            if number % 5 == 4:
                ticket.cancel()
            else:
                results[number] = ticket.result().steps

    with Loop({"count": Countdown()}) as loop:
        threads = [threading.Thread(target=client, args=(loop, 100 * k)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert results == {n: 1 + n % 6 for k in range(4) for n in range(100 * k, 100 * k + 12) if n % 5 != 4}


def test_a_budget_below_the_whole_device_waits_for_its_next_period() -> None:
    clock = SimulatedClock()
    settings = Settings(budget=Budget(100.0, 20.0))
    with Loop({"count": Timed(clock)}, settings, clock) as loop:
        loop.submit("count", {"need": 6})
        loop.run_until_idle()
    assert 0.2 <= clock.now() <= 0.26, "six steps of 10 ms at 20 ms in every 100"


class Meter(EnergySensor):
    """Three millijoules between two readings."""

    def __init__(self) -> None:
        self.value = 0.0

    def read(self) -> float:
        self.value += 3.0
        return self.value


def test_a_budget_in_millijoules_counts_what_the_sensor_says_and_needs_one() -> None:
    clock = SimulatedClock()
    settings = Settings(budget=Budget(100.0, 6.0, "mJ"))
    with pytest.raises(InputError, match="needs an energy sensor"):
        Loop({"count": Countdown()}, settings)
    with Loop({"count": Timed(clock)}, settings, clock, sensor=Meter()) as loop:
        ticket = loop.submit("count", {"need": 6})
        loop.run_until_idle()
    spent = ticket.result().spent
    assert (spent.atp, spent.energy_mJ) == (18.0, 18.0)
    assert clock.now() >= 0.2, "two steps a period"


def test_a_profile_chooses_the_halting_of_requests_that_ask_for_none() -> None:
    for profile, steps in (("safety-critical", 10), ("balanced", 3)):
        with Loop({"count": Countdown()}, Settings(profile=PROFILES[profile])) as loop:
            assert loop.submit("count", {"need": 3}).result().steps == steps
            assert loop.submit("count", {"need": 3}, halt="max_steps:2").result().steps == 2


def test_trust_falls_for_a_plugin_that_wanders() -> None:
    class Wanders(Countdown):
        def energy(self, state: Count) -> float:
            return 0.5 + 0.1 * (state.done % 2)

    plugins: Mapping[str, Plugin[Any]] = {"good": Countdown("good"), "bad": Wanders("bad", halt="full")}
    with Loop(plugins) as loop:
        for _ in range(15):
            loop.submit("good", {"need": 5})
            loop.submit("bad", {"need": 9})
        loop.run_until_idle()
        accounts = loop.state.accounts
    assert accounts["bad"].trust < 0.75 * accounts["good"].trust


def test_a_loop_is_used_inside_of_with() -> None:
    loop = Loop({"count": Countdown()})
    with pytest.raises(RuntimeError, match="use `with loop:`"):
        loop.submit("count", {"need": 1})
    with loop, pytest.raises(InputError, match="plugin 'vision': not loaded; there are count"):
        loop.submit("vision", {})


def test_costs_are_measured_for_every_batch_size() -> None:
    with null() as plugin:
        costs = measured_costs(plugin, rounds=2)
    assert set(costs.ms_by_size) == {1, 2, 4}
    clock = SimulatedClock()
    assert measured_costs(Timed(clock, sizes=(1,)), clock).ms(1) == pytest.approx(10)


def test_the_shipped_plugin_answers_as_the_engine_does(tmp_path: Path) -> None:
    import sage_edge

    plugin = open_plugin("reason")
    observations = plugin.examples("test", 6).observations
    with Loop({"reason": plugin}) as loop:
        answers = [loop.submit("reason", one, halt="learned") for one in observations]
        loop.run_until_idle()
    with sage_edge.load("sudoku9") as session:
        expected = session.infer({"inputs": np.stack([one["inputs"] for one in observations])}, halt="learned")
    for ticket, other in zip(answers, expected, strict=True):
        own = ticket.result()
        assert (own.steps, own.reason) == (other.steps, other.reason)
        np.testing.assert_array_equal(own.result["prediction"], other.prediction)
