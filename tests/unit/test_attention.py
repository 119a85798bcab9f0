"""Peripheral attention as pure policy: choice within a budget, fairness, pinning, demotion; then its promises as properties."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_edge.errors import InputError
from sage_edge.mailbox.attention import (
    SALIENCE,
    AttentionState,
    Decision,
    Place,
    Records,
    TrustScheduler,
    snarc_score,
)

MS = 1_000_000
NOW = 10_000 * MS


def record(
    tile: int, score: float, sensor: int = 0, cost: float = 1.0, captured: int = NOW, **fields: float
) -> Records:
    one = np.zeros((), SALIENCE)
    one["sensor"], one["tile"], one["score"], one["cost"], one["captured_ns"] = sensor, tile, score, cost, captured
    one["trust"] = 1.0
    for name, value in fields.items():
        one[name] = value
    return one


def seen(
    scheduler: TrustScheduler, *records: Records, state: AttentionState | None = None, now: int = NOW
) -> AttentionState:
    batch = np.stack(records) if records else np.zeros(0, SALIENCE)
    return scheduler.observe(state or AttentionState(), batch, now)


def levels(decision: Decision) -> dict[int, int]:
    return {item.place.tile: item.level for item in decision.issue}


def test_a_record_is_64_bytes_and_fits_a_broadcast() -> None:
    assert SALIENCE.itemsize == 64
    assert all(SALIENCE[name].str.startswith("<") for name in SALIENCE.fields or {})


def test_the_top_k_by_priority_within_the_budget() -> None:
    scheduler = TrustScheduler(top=2, budget=10, share=1)
    state = seen(scheduler, record(1, 0.2), record(2, 0.9), record(3, 0.5))
    _, decision = scheduler.decide(state, NOW)
    assert levels(decision) == {2: 0, 3: 0}
    assert decision.spent == 2


def test_what_does_not_fit_is_demoted_not_blocked() -> None:
    scheduler = TrustScheduler(top=4, budget=2.5, share=1)
    state = seen(scheduler, record(1, 0.9), record(2, 0.8), record(3, 0.7), record(4, 0.6))
    _, decision = scheduler.decide(state, NOW)
    assert levels(decision) == {1: 0, 2: 0, 3: 1, 4: 1}
    assert [item.cost for item in decision.issue] == [1, 1, 0.25, 0.25]


def test_a_demotion_is_reported_with_its_reason() -> None:
    scheduler = TrustScheduler(top=1, budget=1, share=1, pin_ns=0)
    state, _ = scheduler.decide(seen(scheduler, record(1, 0.5)), NOW)
    state, decision = scheduler.decide(seen(scheduler, record(2, 0.9), state=state), NOW)
    assert [(d.place.tile, d.before, d.after, d.reason) for d in decision.demoted] == [(1, 0, 2, "top")]
    late = NOW + scheduler.ttl_ns + 1
    state, decision = scheduler.decide(state, late)
    assert [(d.place.tile, d.reason) for d in decision.demoted] == [(2, "stale")]
    assert not state.entries


def test_a_pinned_place_keeps_its_focus_against_a_slightly_better_one() -> None:
    scheduler = TrustScheduler(top=1, budget=1, pin_ns=100 * MS)
    state, _ = scheduler.decide(seen(scheduler, record(1, 0.50)), NOW)
    state = seen(scheduler, record(2, 0.51), state=state)
    state, decision = scheduler.decide(state, NOW + 99 * MS)
    assert levels(decision) == {1: 0}
    state, decision = scheduler.decide(state, NOW + 100 * MS)
    assert levels(decision) == {2: 0}


def test_a_sensor_gets_no_more_than_its_share_while_another_wants_some() -> None:
    scheduler = TrustScheduler(top=4, budget=4, share=0.5)
    loud = [record(tile, 0.9) for tile in range(4)]
    _, decision = scheduler.decide(seen(scheduler, *loud, record(9, 0.1, sensor=1)), NOW)
    assert sorted(item.place for item in decision.issue) == [Place(0, 0), Place(0, 1), Place(0, 2), Place(1, 9)]
    _, alone = scheduler.decide(seen(scheduler, *loud), NOW)
    assert len(alone.issue) == 4


def test_a_refused_item_gives_way_and_comes_back() -> None:
    scheduler = TrustScheduler(top=1, budget=1, backoff_ns=50 * MS, ttl_ns=1000 * MS)
    state = seen(scheduler, record(1, 0.9))
    state, decision = scheduler.decide(state, NOW + MS)
    state = scheduler.refused(state, decision.issue[0], NOW + MS)
    assert state.entries[Place(0, 1)].since == NOW
    state, decision = scheduler.decide(state, NOW + 2 * MS)
    assert levels(decision) == {1: 1}
    assert [d.reason for d in decision.demoted] == ["refused"]
    state = scheduler.refused(state, decision.issue[0], NOW + 2 * MS)
    state, decision = scheduler.decide(state, NOW + 3 * MS)
    assert not decision.issue
    assert [d.reason for d in decision.demoted] == ["refused"]
    _, decision = scheduler.decide(state, NOW + 52 * MS)
    assert levels(decision) == {1: 0}


def test_calm_places_stay_peripheral() -> None:
    scheduler = TrustScheduler(top=2, budget=2, floor=0.3)
    _, decision = scheduler.decide(seen(scheduler, record(1, 0.29), record(2, 0.3)), NOW)
    assert levels(decision) == {2: 0}


def test_own_weights_replace_the_published_score() -> None:
    scheduler = TrustScheduler(top=1, budget=1, weights=(0, 0, 0, 0, 1))
    state = seen(scheduler, record(1, 0.9, surprise=1), record(2, 0.1, conflict=0.5, trust=2))
    assert state.entries[Place(0, 2)].priority == 1.0
    _, decision = scheduler.decide(state, NOW)
    assert levels(decision) == {2: 0}


def test_score_is_trust_times_the_weighted_mean() -> None:
    one = record(1, 0, trust=0.5, surprise=1, novelty=0.5)
    assert snarc_score(one[None], (1, 2, 1, 0, 0)) == pytest.approx([0.5 * 2 / 4])


@pytest.mark.parametrize(
    ("field", "value"),
    [("score", np.nan), ("score", 11), ("trust", -1), ("trust", np.inf), ("cost", 0), ("cost", np.inf), ("cost", np.nan),
     ("surprise", 1.5), ("conflict", np.nan), ("captured_ns", NOW + 1)],
)  # fmt: skip
def test_records_that_cannot_be_true_are_refused_and_counted(field: str, value: float) -> None:
    scheduler = TrustScheduler(top=1, budget=1)
    bad = record(1, 0.9)
    bad[field] = value
    state = seen(scheduler, bad, record(2, 0.1))
    assert set(state.entries) == {Place(0, 2)}
    assert state.rejected == 1


def test_an_older_capture_does_not_replace_a_newer_one() -> None:
    scheduler = TrustScheduler(top=1, budget=1)
    state = seen(scheduler, record(1, 0.9), record(1, 0.2, captured=NOW - 1))
    assert state.entries[Place(0, 1)].priority == pytest.approx(0.9)
    assert state.late == 1


def test_a_flood_of_places_neither_fills_the_memory_nor_hides_what_matters() -> None:
    scheduler = TrustScheduler(top=1, budget=1, capacity=8)
    state = seen(scheduler, record(1, 0.9), *(record(100 + n, 0.1) for n in range(50)))
    assert len(state.entries) == 8
    assert state.crowded == 43
    _, decision = scheduler.decide(state, NOW)
    assert levels(decision) == {1: 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [({"top": 0}, "top: expected at least 1, found 0"), ({"budget": float("nan")}, "budget"), ({"levels": (0.5,)}, "levels"),
     ({"levels": (1.0, 1.0)}, "levels"), ({"levels": ()}, "levels"), ({"share": 0}, "share"), ({"ttl_ns": 0}, "ttl_ns"),
     ({"weights": (1, 1)}, "weights: expected 5 numbers"), ({"weights": (0, 0, 0, 0, 0)}, "weights"),
     ({"capacity": 1, "top": 2}, "capacity"), ({"pin_ns": -1}, "pin_ns"), ({"floor": float("inf")}, "floor")],
)  # fmt: skip
def test_a_configuration_that_makes_no_policy_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=f"attention: {message}"):
        TrustScheduler(**{"top": 1, "budget": 1.0, **change})  # type: ignore[arg-type]


def test_records_of_another_layout_are_refused() -> None:
    with pytest.raises(InputError, match="expected records of dtype"):
        TrustScheduler(top=1, budget=1).observe(AttentionState(), np.zeros(3, np.uint8), NOW)


schedulers = st.builds(
    TrustScheduler,
    top=st.integers(1, 5),
    budget=st.sampled_from([0.5, 1.0, 3.0, 8.0]),
    levels=st.sampled_from([(1.0,), (1.0, 0.25), (1.0, 0.5, 0.125)]),
    share=st.sampled_from([0.25, 0.5, 1.0]),
    patience_ns=st.sampled_from([0, 20 * MS, 10_000 * MS]),
    pin_ns=st.sampled_from([0, 30 * MS]),
    backoff_ns=st.sampled_from([0, 15 * MS]),
    floor=st.sampled_from([0.0, 0.3]),
    capacity=st.just(64),
)
# One tick: records (sensor, tile, score, cost), and which of the issued items the port refuses.
ticks = st.lists(
    st.tuples(
        st.lists(
            st.tuples(
                st.integers(0, 2), st.integers(0, 4), st.floats(0, 1, width=16), st.sampled_from([0.25, 1.0, 2.0])
            ),
            max_size=12,
        ),
        st.sets(st.integers(0, 4)),
    ),
    max_size=12,
)


@given(scheduler=schedulers, script=ticks, order=st.randoms(use_true_random=False))
def test_promises_of_every_tick(scheduler: TrustScheduler, script: list, order) -> None:  # type: ignore[no-untyped-def,type-arg]
    state = AttentionState()
    for number, (rows, refuse) in enumerate(script):
        now = NOW + number * 10 * MS
        latest = {(sensor, tile): (score, cost) for sensor, tile, score, cost in rows}
        records = [record(t, p, s, c, now) for (s, t), (p, c) in latest.items()]
        shuffled = order.sample(records, len(records))
        before = seen(scheduler, *records, state=state, now=now)
        state, decision = scheduler.decide(before, now)
        _, again = scheduler.decide(seen(scheduler, *shuffled, state=_reordered(order, state=before), now=now), now)
        assert again == decision, "the order of arrival must not matter"

        assert len(decision.issue) <= scheduler.top
        assert decision.spent == pytest.approx(sum(item.cost for item in decision.issue))
        assert decision.spent <= scheduler.budget + 1e-9
        chosen = {item.place: item for item in decision.issue}
        assert len(chosen) == len(decision.issue)
        for item in decision.issue:
            entry = before.entries[item.place]
            assert now - entry.captured <= scheduler.ttl_ns
            assert entry.priority >= scheduler.floor
            assert now >= entry.backoff or item.level >= entry.ceiling
        # Nothing that wants attention is left out, or seen in less detail, while there is room for better.
        left = scheduler.budget - decision.spent
        for entry in before.entries.values():
            best = entry.ceiling if now < entry.backoff else 0
            if (
                now - entry.captured > scheduler.ttl_ns
                or entry.priority < scheduler.floor
                or best == len(scheduler.levels)
            ):
                continue
            if entry.place not in chosen:
                assert len(chosen) == scheduler.top or entry.cost * scheduler.levels[-1] > left - 1e-9
            elif chosen[entry.place].level > best:
                better = scheduler.levels[chosen[entry.place].level - 1]
                assert entry.cost * better - chosen[entry.place].cost > left - 1e-9
        for place, was in ((p, e.level) for p, e in before.entries.items()):
            after = chosen[place].level if place in chosen else len(scheduler.levels)
            reported = [d for d in decision.demoted if d.place == place]
            assert [(d.before, d.after) for d in reported] == ([(was, after)] if after > was else [])
        for index in sorted(refuse):
            if index < len(decision.issue):
                state = scheduler.refused(state, decision.issue[index], now)


def _reordered(order, state: AttentionState) -> AttentionState:  # type: ignore[no-untyped-def]
    places = order.sample(sorted(state.entries), len(state.entries))
    return dataclasses.replace(state, entries={place: state.entries[place] for place in places})


@given(
    scores=st.lists(st.floats(0, 1, width=16), min_size=1, max_size=12),
    costs=st.lists(st.sampled_from([0.25, 1.0, 2.0, 3.9]), min_size=12, max_size=12),
    top=st.integers(1, 3),
    pin=st.sampled_from([0, 50 * MS, 100_000 * MS]),
)
def test_nobody_starves(scores: list[float], costs: list[float], top: int, pin: int) -> None:
    """Each place that stays fresh is attended within patience plus one tick for each place, whatever the priorities and pins."""
    scheduler = TrustScheduler(top=top, budget=1.0, pin_ns=pin, patience_ns=40 * MS)
    state, tick = AttentionState(), 10 * MS
    attended = dict.fromkeys(range(len(scores)), NOW)
    for number in range(60):
        now = NOW + number * tick
        records = [record(tile, score, tile % 2, costs[tile], now) for tile, score in enumerate(scores)]
        state, decision = scheduler.decide(seen(scheduler, *records, state=state, now=now), now)
        attended |= {item.place.tile: now for item in decision.issue}
        for tile, last in attended.items():
            assert now - last <= scheduler.patience_ns + (len(scores) + 1) * tick, tile


@given(scores=st.lists(st.lists(st.floats(0, 1, width=16), min_size=6, max_size=6), min_size=1, max_size=15))
def test_who_is_pinned_stays_while_nobody_is_overdue(scores: list[list[float]]) -> None:
    scheduler = TrustScheduler(top=2, budget=2, pin_ns=50 * MS, patience_ns=10**15)
    state = AttentionState()
    until: dict[Place, int] = {}
    for number, row in enumerate(scores):
        now = NOW + number * 10 * MS
        records = [record(tile, score, captured=now) for tile, score in enumerate(row)]
        state, decision = scheduler.decide(seen(scheduler, *records, state=state, now=now), now)
        places = {item.place for item in decision.issue}
        assert {place for place, end in until.items() if end > now} <= places
        until = {
            place: until.get(place, 0) if until.get(place, 0) > now else now + scheduler.pin_ns for place in places
        }
