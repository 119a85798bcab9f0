"""The bench of plugins: what can be worked out by hand, and the goal of the scheduler on recorded traces of a real model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sage_edge.bench.irp import KEPT, fastest, judged, oracle_steps
from sage_edge.bench.sharing import ALONE, Arrival, Contender, alone_ms, compare, draw_load, losses, simulate
from sage_edge.bench.solvers import Solve, Sparse
from sage_edge.errors import InputError
from sage_edge.irp.conformance import check_plugin
from sage_edge.irp.measure import Recorded, calibrated, digest, quality_loss, record_traces, worth_of
from sage_edge.irp.plugin import Examples
from sage_edge.irp.profiles import PROFILES
from sage_edge.irp.spec import BenchSpec
from sage_edge.irp.traces import Traces, steps_taken
from sage_edge.irp.worth import fitted
from sage_edge.sharing.costs import Costs
from tests.irp_plugins import Countdown
from tests.unit.traces_fixture import recorded

BENCH = BenchSpec("calibration", "test", "done / need", max_loss=0.05)


def countdown() -> Countdown:
    return Countdown(bench=BENCH)


def test_traces_hold_every_step_of_every_example() -> None:
    with countdown() as plugin:
        plugin.sizes = (1, 2, 4)
        examples = plugin.examples("test", 7)
        done: list[int] = []
        traces = record_traces(plugin, examples, done.append)
    needs = np.array(examples.references)
    steps = np.arange(1, 11)
    np.testing.assert_allclose(traces.quality, np.minimum(steps, needs[:, None]) / needs[:, None])
    np.testing.assert_allclose(traces.energies, np.maximum(0, needs[:, None] - steps) / 10)
    assert traces.traces.signals.shape == (7, 10, 2)
    assert done == [4, 7]
    assert plugin.released == 7
    assert (oracle_steps(traces.quality) == needs).all()


def test_calibration_keeps_its_promise_on_other_examples() -> None:
    with countdown() as plugin:
        known = record_traces(plugin, plugin.examples("calibration"))
        test = record_traces(plugin, plugin.examples("test"))
        found = calibrated(plugin, known)
    taken = steps_taken(test.traces, found.chosen.policy)
    lost = quality_loss(test, 1.0).of(test.traces, taken)
    assert float(np.mean(lost)) <= BENCH.max_loss
    assert taken.mean() < 7
    assert known.sha256 != test.sha256
    assert digest(Examples([{"a": np.ones(2)}], [1])) != digest(Examples([{"a": np.ones(2)}], [2]))


def test_fastest_keeps_999_of_1000_and_takes_fewer_steps() -> None:
    with countdown() as plugin:
        known = record_traces(plugin, plugin.examples("calibration"))
    policy = fastest(known)
    taken = steps_taken(known.traces, policy)
    kept = known.quality[np.arange(len(known)), taken - 1].mean()
    assert kept >= KEPT * known.quality[:, -1].mean()
    assert taken.mean() < 6


def test_what_is_judged_is_told_with_its_interval() -> None:
    quality = np.tile([[0.5, 1.0]], (400, 1))
    half = judged(quality, np.repeat([1, 2], 200), 2)
    assert half["mean_quality"] == 0.75
    assert half["quality_loss"] == 0.25
    low, high = half["quality_loss_interval"]
    assert low < 0.25 < high < 0.32
    assert half["speed_up"] == pytest.approx(2 / 1.5)
    assert half["speed_up_interval"][0] < 2 / 1.5 < half["speed_up_interval"][1]
    full = judged(quality, np.full(400, 2), 2)
    assert (full["quality_loss"], full["quality_loss_interval"], full["steps_saved"]) == (0.0, [0.0, 0.0], 0.0)
    assert judged(np.zeros((3, 2)), np.ones(3, np.int64), 2)["quality_loss"] is None


def test_a_plugin_without_a_bench_or_with_nonsense_is_refused() -> None:
    with pytest.raises(InputError, match="names no `bench`"):
        record_traces(Countdown(), Countdown().examples("x", 2))
    with Countdown(bench=BENCH) as plugin, pytest.raises(InputError, match="NaN or Inf on some of the 1 examples"):
        record_traces(plugin, Examples([{"need": 7}], [7]))


@pytest.fixture(scope="module")
def contenders() -> list[Contender]:
    """The recorded model of tests/data (easy and hard sudoku; quality: an exact grid) and two small solvers."""
    found = []
    real = recorded()
    energies = real.signals[:, :, real.names.index("entropy_mean")].astype(np.float64) / np.log(11)
    reason = Countdown("reason", max_steps=8)
    reason.extra_signals = real.names
    halves = []
    for rows in (np.arange(0, 750), np.arange(750, 1500)):
        part = real.take(rows)
        signals = np.concatenate(
            (part.signals[:, :, real.names.index("entropy_mean")][:, :, None], part.signals), axis=2
        )
        traces = Traces(signals, part.exact, part.token_accuracy, ("energy", *real.names))
        halves.append(Recorded(traces, part.exact.astype(np.float64), np.clip(energies[rows], 0, 1), "", {}))
    nothing = Examples([{}], [0])
    found.append(
        Contender("reason", reason, nothing, halves[1], "learned", 7.0, worth_of(halves[0]), fitted(halves[0].energies))
    )
    for plugin, step_ms in ((Solve(size=96), 1.0), (Sparse(size=96, measured=64), 1.5)):
        with plugin:
            known = record_traces(plugin, plugin.examples("calibration", 240))
            test = record_traces(plugin, plugin.examples("test", 120))
        policy = calibrated(plugin, known).chosen.policy
        found.append(
            Contender(plugin.spec.name, plugin, nothing, test, policy, step_ms, worth_of(known), fitted(known.energies))
        )
    return found


def test_the_solvers_conform() -> None:
    for plugin in (Solve(size=32), Sparse(size=32, measured=24)):
        with plugin:
            assert [f"{f.name}: {f.detail}" for f in check_plugin(plugin) if not f.passed] == []


def test_the_goal_a_fifth_less_loss_than_round_robin_at_equal_time(
    contenders: list[Contender], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sage_edge.bench.sharing.LOADS", (1.0, 1.5))
    report = compare(contenders, seconds=1.5, seeds=2)
    rows = {(row["load"], row["rule"]): row for row in report["rows"]}
    for load in (1.0, 1.5):
        ours = rows[load, "worth"]
        assert ours["loss_change"] < -0.2, ours
        assert rows[load, "round-robin"]["loss_change"] == 0
        assert ours["loss"] <= min(rows[load, rule]["loss"] for rule in ("run-to-completion", "trust-proportional"))


def test_every_rule_gets_the_same_requests_and_time_moves_only_with_steps(contenders: list[Contender]) -> None:
    load = draw_load(contenders, 0.5, 0.6, np.random.default_rng(1))
    assert load == draw_load(contenders, 0.5, 0.6, np.random.default_rng(1))
    assert [a.at for a in load] == sorted(a.at for a in load)
    for rule in ("round-robin", "worth"):
        one, two = (simulate(contenders, load, rule, PROFILES["balanced"]) for _ in range(2))
        np.testing.assert_array_equal(one.steps, two.steps)
        np.testing.assert_array_equal(one.missed, two.missed)


def test_with_all_the_time_there_is_nothing_is_lost_that_halting_does_not_lose(contenders: list[Contender]) -> None:
    load = [replace(a, deadline_ms=1e6) for a in draw_load(contenders, 0.5, 0.5, np.random.default_rng(2))]
    by_name = {c.name: c for c in contenders}
    for rule in ("round-robin", "worth", "earliest-deadline"):
        served = simulate(contenders, load, rule, PROFILES["balanced"])
        assert not served.missed.any()
        for arrival, steps in zip(load, served.steps, strict=True):
            contender = by_name[arrival.plugin]
            assert steps == steps_taken(contender.recorded.traces, contender.policy)[arrival.example]


def test_a_real_load_counts_all_that_the_loop_does_for_a_step(
    contenders: list[Contender], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin, clock, steps = Solve(size=32), [0.0], [0]

    def slow(what: Any, seconds: float, count: int) -> Any:
        def called(*arguments: Any) -> Any:
            clock[0], steps[0] = clock[0] + seconds, steps[0] + count
            return what(*arguments)

        return called

    monkeypatch.setattr(plugin, "init_state", slow(plugin.init_state, 0.005, 0))
    monkeypatch.setattr(plugin, "step_many", slow(plugin.step_many, 0.002, 1))
    asked: list[int] = []

    def now() -> float:
        asked.append(steps[0])
        return clock[0]

    monkeypatch.setattr("sage_edge.bench.sharing.time.perf_counter", now)
    with plugin:
        examples = plugin.examples("test", ALONE)
        found = alone_ms(replace(contenders[1], plugin=plugin, examples=examples), Costs(), "balanced")
    counted = asked[-1] - asked[0]
    assert ALONE <= counted < ALONE * plugin.max_steps
    assert found == pytest.approx(2.0 + 5.0 * ALONE / counted)


def test_the_loss_is_one_for_nothing_and_zero_for_full_steps(contenders: list[Contender]) -> None:
    solve = contenders[1]
    arrivals = [Arrival("solve", n, 0.0, 1.0) for n in range(120)]
    by_name = {c.name: c for c in contenders}
    nothing = losses(by_name, arrivals, np.zeros(120, np.int64))
    assert nothing["quality"].mean() == pytest.approx(1.0)
    assert nothing["energy"].mean() == pytest.approx(1.0)
    full = losses(by_name, arrivals, np.full(120, solve.plugin.max_steps))
    assert not full["quality"].any()
