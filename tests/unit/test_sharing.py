"""The scheduler that shares a device: alone, without plugins and clock; a model of the loop in a few lines drives it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_edge.errors import InputError, RefusedError
from sage_edge.irp.profiles import PROFILES, Profile
from sage_edge.irp.worth import blank, fitted
from sage_edge.sharing.budget import FLOOR, Budget, reallocated, shares
from sage_edge.sharing.costs import Costs
from sage_edge.sharing.rules import RULES, Candidate, Choice, by_worth
from sage_edge.sharing.scheduler import (
    RESCUE,
    Account,
    Decision,
    Outcome,
    Settings,
    SharingState,
    Task,
    cancel,
    initial,
    schedule,
    submit,
    update,
)

STEP_S = 0.01  # every step of the model takes this long


def account(name: str, steps: int = 8, step_ms: float = 10.0, trust: float = 1.0, fall: float | None = None) -> Account:
    """fall: how much of the loss each step takes away, in every trace; None: nothing is known."""
    worth = blank(steps) if fall is None else fitted(np.tile((1 - fall) ** np.arange(1, steps + 1), (200, 1)))
    return Account(name, steps, (1,), Costs({1: step_ms}, {1: step_ms}), worth, trust)


def fresh(*accounts: Account, **more: object) -> SharingState:
    return initial(Settings(**more), {a.name: a for a in accounts})  # type: ignore[arg-type]


def joined(state: SharingState, *tasks: Task) -> SharingState:
    for task in tasks:
        state = submit(state, task)
    return state


def ran(
    state: SharingState, now: float, halts: Mapping[int, int] = MappingProxyType({})
) -> tuple[SharingState, Decision, float]:
    """One tick in which each step lowers the energy by a tenth; halts: by id, after how many steps."""
    decision = schedule(state, now)
    if decision.until is not None:
        return update(state, decision, Outcome(now, now)), decision, decision.until
    tasks = {task.id: task for task in state.tasks}
    energies, halted = {}, {}
    for number in decision.step:
        task = tasks[number]
        path = tuple(max(0.0, 1 - 0.1 * (task.steps + k)) for k in range(1, decision.grant + 1))
        energies[number] = path
        limit = min(halts.get(number, 99), state.accounts[task.plugin].max_steps)
        if task.steps + len(path) >= limit:
            halted[number] = "done"
    spent = STEP_S * decision.grant if decision.step else 0.0
    contributions = {number: 0.5 for number, _ in decision.answer}
    outcome = Outcome(now, now + spent, energies, halted, contributions=contributions)
    return update(state, decision, outcome), decision, now + spent


arrivals = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 2), st.integers(1, 8), st.integers(-1, 2), st.none() | st.integers(1, 60)),
    min_size=1, max_size=30,
)  # fmt: skip


@given(
    arrivals, st.sampled_from(sorted(RULES)), st.sampled_from(sorted(PROFILES)), st.sets(st.integers(0, 29), max_size=3)
)
@settings(max_examples=60)
def test_every_request_ends_exactly_once(
    load: list[tuple[int, int, int, int, int | None]], rule: str, profile: str, cancelled: set[int]
) -> None:
    state = fresh(*(account(name) for name in "abc"), rule=rule, profile=PROFILES[profile])
    pending = [
        Task(n, "abc"[which], at * STEP_S, None if wait is None else (at + wait) * STEP_S, priority)
        for n, (at, which, _, priority, wait) in enumerate(load)
    ]
    halts = {n: steps for n, (_, _, steps, _, _) in enumerate(load)}
    ended: dict[int, str] = {}
    now = 0.0
    for _ in range(3000):
        for task in [t for t in pending if t.arrived <= now]:
            state = submit(state, task)
        pending = [t for t in pending if t.arrived > now]
        for number in cancelled & {t.id for t in state.tasks}:
            if number not in ended:
                state, ended[number] = cancel(state, number), "cancelled"
        if state.idle:
            if not pending:
                break
            now = pending[0].arrived if not pending[0].arrived > now else min(t.arrived for t in pending)
            continue
        before = {task.id: task for task in state.tasks}
        state, decision, now = ran(state, now, halts)
        for number in decision.expire:
            assert number not in ended
            assert before[number].steps == 0
            ended[number] = "expired"
        for number, reason in decision.answer:
            assert number not in ended
            assert before[number].steps >= 1
            assert reason in ("done", "deadline")
            ended[number] = reason
        assert len({before[number].plugin for number in decision.step}) <= 1
        assert not set(decision.step) & set(ended)
    assert sorted(ended) == list(range(len(load)))


@given(st.integers(0, 1000), st.integers(2, 12), st.sampled_from(sorted(PROFILES)))
@settings(max_examples=25)
def test_nobody_starves_whatever_the_others_are_worth(seed: int, others: int, profile: str) -> None:
    """A request whose steps are worth nothing, of the least trusted plugin, against a full house of requests that are worth
    much, have a higher priority, tight deadlines, and are replaced as soon as they end."""
    patience, period = 0.5, 0.1
    state = fresh(
        account("dull", steps=4, trust=0.1, fall=1e-9), account("bright", trust=1.0, fall=0.4),
        profile=PROFILES[profile], budget=Budget(period * 1e3, period * 1e3), patience_s=patience,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    state = submit(state, Task(0, "dull", 0.0))
    now, number, last, gaps = 0.0, 1, 0.0, []
    bound = patience + (others + 2) * period + STEP_S
    while 0 in {task.id for task in state.tasks} and now < 8 * bound:
        while len(state.tasks) <= others:
            deadline = None if rng.random() < 0.5 else now + float(rng.uniform(0.02, 0.3))
            state = submit(state, Task(number, "bright", now, deadline, priority=3))
            number += 1
        state, decision, now = ran(state, now)
        if 0 in decision.step:
            gaps.append(now - last)
            last = now
    assert len(gaps) == 4
    assert max(gaps) <= bound


def test_rescues_take_no_more_than_their_share_of_a_period() -> None:
    state = fresh(account("a"), budget=Budget(1000.0, 1000.0), patience_s=0.2)
    state = joined(state, *(Task(n, "a", 0.0) for n in range(40)))
    now, rescued = 0.0, []
    for _ in range(100):
        began = now
        state, decision, now = ran(state, now)
        if decision.why == RESCUE:
            rescued.append(began)
    assert 5 <= sum(began < 1.0 for began in rescued) <= 5 + 1, "5 % of 1000 ms is five steps; the last may run over"


def best_by_trying(jobs: Sequence[tuple[int, float]]) -> float:
    """The largest worth that unit jobs (deadline, worth) can give: every order tried."""
    return max(
        sum(worth for place, (due, worth) in enumerate(order, 1) if place <= due)
        for order in itertools.permutations(jobs)
    )


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=5))
@settings(max_examples=80)
def test_unit_jobs_with_deadlines_are_done_as_well_as_can_be(jobs: list[tuple[int, int]]) -> None:
    """The rule, asked again after every step, reaches the optimum that trying all orders finds."""
    left = {n: Candidate(n, "p", 0.0, 0.0, float(due), ((float(worth), 1),)) for n, (due, worth) in enumerate(jobs)}
    now, gained = 0.0, 0.0
    while left:
        choice = Choice(tuple(left.values()), {"p": (1,)}, {"p": Costs({1: 1000.0}, {1: 1000.0})}, {"p": 0.0}, now)
        (number,) = by_worth(choice).step
        now += 1
        if now <= left[number].due:
            gained += left[number].ahead[0][0]
        del left[number]
    assert gained == best_by_trying([(due, float(worth)) for due, worth in jobs])


def test_with_time_to_spare_the_most_valuable_goes_first_and_without_the_most_urgent() -> None:
    costs = {"p": Costs({1: 10.0}, {1: 10.0})}
    dear = Candidate(0, "p", 0.0, 0.0, 0.100, ((0.9, 1),))

    def first(due: float) -> int:
        urgent = Candidate(1, "p", 0.0, 0.0, due, ((0.1, 1),))
        return by_worth(Choice((dear, urgent), {"p": (1,)}, costs, {"p": 0.0}, 0.0)).step[0]

    assert first(0.025) == 0
    assert first(0.015) == 1, "another step first would make it late"
    assert first(0.005) == 0, "it is too late for it anyway"


def test_requests_of_a_plugin_step_together_where_that_is_cheaper() -> None:
    candidates = tuple(Candidate(n, "p", 0.0, 0.0, None, ((0.5, 1),)) for n in range(5))
    together = Costs({1: 10.0, 2: 10.5, 4: 11.0}, {1: 10.0, 2: 10.5, 4: 11.0})
    apart = Costs({1: 10.0, 2: 20.0, 4: 40.0}, {1: 10.0, 2: 20.0, 4: 40.0})
    for rule in RULES.values():
        assert len(rule(Choice(candidates, {"p": (1, 2, 4)}, {"p": together}, {"p": 0.0}, 0.0)).step) == 4
        assert len(rule(Choice(candidates, {"p": (1, 2, 4)}, {"p": apart}, {"p": 0.0}, 0.0)).step) == 1


def test_short_steps_are_granted_several_at_a_time() -> None:
    state = joined(fresh(account("a", steps=64, step_ms=0.1, fall=0.2)), Task(0, "a", 0.0))
    assert schedule(state, 0.0).grant == 4, "as long as they are worth the same: a stage"
    state = joined(fresh(account("a", step_ms=10.0)), Task(0, "a", 0.0))
    assert schedule(state, 0.0).grant == 1


def test_trust_priority_and_worth_decide_in_proportion() -> None:
    def first(*tasks: Task, trust: float = 1.0, fall: float = 0.5) -> int:
        state = fresh(account("a", fall=0.5), account("b", trust=trust, fall=fall), profile=Profile("free", 0, 0.5, 0))
        return schedule(joined(state, *tasks), 0.0).step[0]

    a, b = Task(0, "a", 0.0), Task(1, "b", 0.0)
    assert first(a, b, fall=0.8) == 1
    assert first(a, b, fall=0.8, trust=0.3) == 0
    assert first(a, Task(1, "b", 0.0, priority=1), trust=0.6) == 1


def test_promised_budget_is_kept_and_freed_budget_goes_to_those_with_work() -> None:
    state = fresh(
        account("a", fall=0.5, steps=64), account("b", fall=1e-9, steps=64), account("c"),
        profile=Profile("strict", 0.9, 0.5, 0), budget=Budget(1000.0, 1000.0), patience_s=1e9,
    )  # fmt: skip
    state = joined(state, *(Task(n, "ab"[n % 2], 0.0) for n in range(20)))
    spent = dict.fromkeys("abc", 0.0)
    now = 0.0
    while now < 0.999:
        state, decision, now = ran(state, now)
        spent[decision.plugin] += STEP_S
    # c has no work, so 0.9 of the period is promised to a and b, half each; the rest goes where it is worth something.
    assert spent["b"] >= 0.44
    assert spent["a"] >= 0.5
    assert spent["c"] == 0


def test_a_budget_below_the_whole_device_is_kept_to() -> None:
    state = joined(
        fresh(account("a", steps=64, fall=0.1), budget=Budget(100.0, 30.0)), *(Task(n, "a", 0.0) for n in range(9))
    )
    now, steps = 0.0, 0
    while now < 0.999:
        state, decision, now = ran(state, now)
        steps += len(decision.step)
        assert decision.step or decision.until is not None
    assert 0.28 <= steps * STEP_S <= 0.33


def test_waiting_for_budget_ends_early_for_a_deadline() -> None:
    state = joined(fresh(account("a"), budget=Budget(100.0, 5.0)), Task(0, "a", 0.0, deadline=0.05), Task(1, "a", 0.0))
    state, _, now = ran(state, 0.0)
    assert schedule(state, now).until == 0.05
    (answered,) = [schedule(state, 0.05).answer or schedule(state, 0.05).expire]
    assert answered


def test_trust_follows_from_what_was_answered() -> None:
    state = joined(fresh(account("a", steps=4)), Task(0, "a", 0.0))
    now = 0.0
    while not state.idle:
        state, _, now = ran(state, now, {0: 2})
    # two steps of ten ms of the four that there might have been: efficiency 1/2; quality 1; contribution 0.5 of 0.5
    expected = 0.7 * 1 + 0.2 * 1 / (1 + np.exp(-1)) + 0.1 * 0.5
    assert state.accounts["a"].trust == pytest.approx(expected)


def test_schedule_and_update_change_nothing_in_place() -> None:
    state = joined(fresh(account("a"), account("b")), *(Task(n, "ab"[n % 2], 0.0) for n in range(4)))
    state, _, now = ran(state, 0.0)
    tasks, accounts = state.tasks, dict(state.accounts)
    counts = {name: a.worth.counts.copy() for name, a in accounts.items()}
    first = schedule(state, now)
    assert first == schedule(state, now)
    update(state, first, Outcome(now, now + STEP_S, {first.step[0]: (0.5,)}, {first.step[0]: "done"}))
    assert state.tasks == tasks
    assert dict(state.accounts) == accounts
    for name, a in state.accounts.items():
        np.testing.assert_array_equal(a.worth.counts, counts[name])


def test_what_cannot_be_taken_is_refused() -> None:
    state = fresh(account("a"), capacity=1)
    with pytest.raises(InputError, match="plugin 'b': not loaded; there are a"):
        submit(state, Task(0, "b", 0.0))
    with pytest.raises(RefusedError, match="queue_full"):
        joined(state, Task(0, "a", 0.0), Task(1, "a", 0.0))
    with pytest.raises(ValueError, match="rule: expected one of"):
        Settings(rule="fair")
    with pytest.raises(ValueError, match="positive"):
        Settings(capacity=0)
    with pytest.raises(ValueError, match="positive"):
        Budget(0.0, 1.0)


def test_a_failed_or_cancelled_request_leaves_nothing_behind() -> None:
    state = joined(fresh(account("a")), Task(0, "a", 0.0), Task(1, "a", 0.0))
    decision = schedule(state, 0.0)
    state = update(state, decision, Outcome(0.0, 0.01, failed=frozenset(decision.step)))
    assert len(state.tasks) == 1
    decision = schedule(state, 0.01)
    state = update(cancel(state, decision.step[0]), decision, Outcome(0.01, 0.02, {decision.step[0]: (0.5,)}))
    assert state.idle


trusts = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0.1, 10), min_size=1)


@given(trusts, st.floats(1, 1000))
def test_shares_add_up_and_nobody_is_below_the_floor(trust: dict[str, float], amount: float) -> None:
    given_ = shares(trust, amount, FLOOR * amount)
    assert sum(given_.values()) == pytest.approx(amount)
    assert min(given_.values()) >= min(FLOOR, 1 / len(trust)) * amount - 1e-9
    richest = max(trust, key=lambda name: trust[name])
    assert given_[richest] == pytest.approx(max(given_.values()))


def test_without_a_floor_shares_are_those_of_trust() -> None:
    assert shares({"a": 3.0, "b": 1.0}, 100.0, 0.0) == pytest.approx({"a": 75.0, "b": 25.0})
    assert shares({"a": 99.0, "b": 1.0}, 100.0, 5.0) == pytest.approx({"a": 95.0, "b": 5.0})
    assert shares({}, 100.0, 5.0) == {}


@given(trusts, st.sets(st.sampled_from("abcdefgh")), st.data())
def test_reallocation_loses_nothing(trust: dict[str, float], working: set[str], data: st.DataObject) -> None:
    left = {name: data.draw(st.floats(0, 100)) for name in trust}
    after = reallocated(left, trust, frozenset(working))
    assert sum(after.values()) == pytest.approx(sum(left.values()))
    if working & set(trust):
        assert all(after[name] == 0 for name in trust if name not in working)
        assert all(after[name] >= left[name] for name in trust if name in working)


def test_costs_are_learned_and_a_burst_of_another_program_counts_little() -> None:
    costs = Costs().learned(1, 10.0, 10.0)
    assert (costs.ms(1), costs.ms(4), Costs().ms(3)) == (10.0, 40.0, 3.0)
    assert costs.learned(1, 1000.0, 1000.0).ms(1) == pytest.approx(0.9 * 10 + 0.1 * 40)
    assert costs.learned(2, 0.0, 0.0).ms(2) > 0


def test_a_period_that_nothing_was_asked_of_is_passed_over() -> None:
    state = joined(fresh(account("a")), Task(0, "a", 0.0))
    state, _, _ = ran(state, 0.0)
    later = replace(state, tasks=())
    later = submit(later, Task(1, "a", 100.3))
    later, _, _ = ran(later, 100.3)
    assert later.period == pytest.approx(100.0)
