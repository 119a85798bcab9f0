"""Peripheral attention: which places deserve a closer look now. Pure policy: no clock, no port, no thread.

Many producers broadcast how salient each tile of each sensor is (`SALIENCE`, 64 bytes a record); `TrustScheduler` keeps
the top K of them within a budget and says for which a focus item is to be issued, and at what level of detail:

    scheduler = TrustScheduler(top=4, budget=8.0)
    state = scheduler.observe(AttentionState(), records, now)     # after every read of the broadcast
    state, decision = scheduler.decide(state, now)                # once a tick
    state = scheduler.refused(state, item, now)                   # the focus port had no room for this item

Nobody waits for anybody: what does not fit is looked at in less detail, or stays peripheral until it fits (it is
*demoted*). The order of a tick:

1. of the places that have waited longer than `patience_ns`, the one that has waited longest, at the least detail;
2. pinned places: who was attended less than `pin_ns` ago stays in focus, so that two places of nearly equal salience
   do not take turns (coherence);
3. the others by priority, as long as their sensor stays within its share of places and budget;
4. the others by priority whatever their sensor;
5. what is left of the budget raises the detail of those chosen, in the order in which they were chosen.

By 1, a place that is fresh, salient enough and affordable is attended within `patience_ns` plus one tick for each place
that has waited longer: nobody starves. Times are nanoseconds of CLOCK_MONOTONIC, as in the ports.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from sage_edge.errors import InputError

SNARC = ("surprise", "novelty", "arousal", "reward", "conflict")
SECOND = 1_000_000_000
MAX_TRUST = 10.0

# What one record of a salience broadcast is. sensor, tile: which place. frame: the sensor's own count. captured_ns:
# CLOCK_MONOTONIC. cost: of looking at it in full detail, in the unit of the budget. trust: 0..10, in the producer. score: the
# producer's own trust-weighted score, 0..10. SNARC fields: 0..1. row, column, height, width: the tile, in pixels.
SALIENCE = np.dtype(
    [("sensor", "<u4"), ("tile", "<u4"), ("frame", "<u8"), ("captured_ns", "<u8"), ("cost", "<f4"), ("trust", "<f4"),
     ("score", "<f4"), *((name, "<f4") for name in SNARC),
     ("row", "<u2"), ("column", "<u2"), ("height", "<u2"), ("width", "<u2")]
)  # fmt: skip

Records = npt.NDArray[np.void]
Reason = Literal["stale", "calm", "refused", "budget", "top"]


class Place(NamedTuple):
    """A tile of a sensor."""

    sensor: int
    tile: int


class Rectangle(NamedTuple):
    """Pixels of the sensor's image; all zero for a sensor without one."""

    row: int
    column: int
    height: int
    width: int


@dataclass(frozen=True)
class Entry:
    """What is known of a place. since: from when it waits (first seen, or last attended). pinned: until when it stays in
    focus. level: at which it is attended now, the number of levels where it is peripheral. ceiling: the best level
    it may have until `backoff`."""

    place: Place
    rectangle: Rectangle
    frame: int
    captured: int
    cost: float
    trust: float
    priority: float
    since: int
    pinned: int
    level: int
    ceiling: int = 0
    backoff: int = 0


@dataclass(frozen=True)
class AttentionState:
    """All there is to know between two calls. rejected: records refused as invalid. crowded: records of new places for
    which there was no room, or places that made room. late: records older than what was known."""

    entries: Mapping[Place, Entry] = field(default_factory=dict)
    rejected: int = 0
    crowded: int = 0
    late: int = 0


@dataclass(frozen=True)
class FocusItem:
    """Look at this place now. level: 0 is full detail. scale: share of the cost in full detail. cost: what it takes of the
    budget. trust: priority for ports that drop the lowest trust. ttl_ns: how long the record stays fresh. waiting: since
    when it had waited, which `refused` restores."""

    place: Place
    rectangle: Rectangle
    frame: int
    captured: int
    level: int
    scale: float
    cost: float
    trust: float
    priority: float
    ttl_ns: int
    waiting: int


@dataclass(frozen=True)
class Demotion:
    """A place that was attended at level `before` is now attended at level `after`, or is peripheral (the number of levels)."""

    place: Place
    before: int
    after: int
    reason: Reason


@dataclass(frozen=True)
class Decision:
    """What a tick does. issue: in the order of choice. spent: of the budget."""

    issue: tuple[FocusItem, ...]
    demoted: tuple[Demotion, ...]
    spent: float


@dataclass(frozen=True)
class TrustScheduler:
    """The policy; its fields are its configuration, and all state is passed in and out.

    top: K, the most places a tick. budget: the most cost a tick. levels: share of the full cost at each level of detail,
    falling from 1. share: of `top` and `budget` that one sensor may take while others want some. patience_ns: who has waited
    longer goes first. pin_ns: how long a place stays in focus at least. ttl_ns: age from capture at which a record counts no
    more. backoff_ns: how long a refused place stays demoted. floor: priorities below are not attended. weights: of the five
    SNARC fields, to compute priorities from them and `trust`; None takes the score that the producer published.
    capacity: the most places that are remembered.

    Raises InputError, naming the field, for values that make no policy.
    """

    top: int
    budget: float
    levels: tuple[float, ...] = (1.0, 0.25)
    share: float = 0.5
    patience_ns: int = SECOND
    pin_ns: int = SECOND // 5
    ttl_ns: int = SECOND // 2
    backoff_ns: int = SECOND // 10
    floor: float = 0.0
    weights: tuple[float, ...] | None = None
    capacity: int = 4096

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in zip(self.levels, self.levels[1:], strict=False))
        weights = (1.0,) if self.weights is None else self.weights
        checks = {
            "top": (self.top >= 1, "at least 1"),
            "budget": (_positive(self.budget), "a finite number above 0"),
            "levels": (bool(self.levels) and self.levels[0] == 1.0 and falling and self.levels[-1] > 0,
                       "shares of the full cost, falling from 1.0 and above 0"),
            "share": (0 < self.share <= 1, "more than 0, at most 1"),
            "patience_ns": (self.patience_ns >= 0, "0 or more"),
            "pin_ns": (self.pin_ns >= 0, "0 or more"),
            "ttl_ns": (self.ttl_ns > 0, "more than 0"),
            "backoff_ns": (self.backoff_ns >= 0, "0 or more"),
            "floor": (np.isfinite(self.floor), "a finite number"),
            "weights": (all(np.isfinite(w) and w >= 0 for w in weights) and sum(weights) > 0
                        and (self.weights is None or len(weights) == len(SNARC)),
                        f"{len(SNARC)} numbers of 0 or more ({', '.join(SNARC)}), not all 0"),
            "capacity": (self.capacity >= self.top, "at least `top`"),
        }  # fmt: skip
        for name, (good, expected) in checks.items():
            if not good:
                raise InputError(f"attention: {name}: expected {expected}, found {getattr(self, name)}")

    def observe(self, state: AttentionState, records: Records, now: int) -> AttentionState:
        """The state with what `records` (dtype SALIENCE, any shape) say. Of a place, the latest capture counts.

        Records with numbers outside of their range, or captured after `now`, are refused and counted: a producer may be buggy
        or hostile. Raises InputError when `records` has another dtype.
        """
        if records.dtype != SALIENCE:
            raise InputError(f"attention: expected records of dtype {SALIENCE}, found {records.dtype}")
        flat = np.atleast_1d(records).ravel()
        valid = _valid(flat, now)
        good = flat[valid]
        priorities = self.priorities(good).tolist()
        entries = dict(state.entries)
        late = 0
        for values, priority in zip(good.tolist(), priorities, strict=True):
            sensor, tile, frame, captured, cost, trust = values[:6]
            place = Place(sensor, tile)
            known = entries.get(place)
            if known is not None and known.captured > captured:
                late += 1
                continue
            history = (now, 0, len(self.levels), 0, 0)
            if known is not None:
                history = (known.since, known.pinned, known.level, known.ceiling, known.backoff)
            entries[place] = Entry(place, Rectangle(*values[-4:]), frame, captured, cost, trust, priority, *history)
        kept = _freshest(entries, self.capacity, now - self.ttl_ns)
        return AttentionState(
            kept,
            state.rejected + int((~valid).sum()),
            state.crowded + len(entries) - len(kept),
            state.late + late,
        )

    def priorities(self, records: Records) -> npt.NDArray[np.float64]:
        """float64 [n]: the published score, or trust x weighted mean of the SNARC fields."""
        if self.weights is None:
            return records["score"].astype(np.float64)
        return snarc_score(records, self.weights)

    def decide(self, state: AttentionState, now: int) -> tuple[AttentionState, Decision]:
        """The state after this tick, and what it does. The state takes it that every item is issued: see `refused`."""
        everyone = len(self.levels)
        fresh = [e for e in state.entries.values() if now - e.captured <= self.ttl_ns]
        wanting = [e for e in fresh if e.priority >= self.floor and self._best(e, now) < everyone]
        chosen = _Selection(self, now)
        ordered = sorted(wanting, key=lambda e: (-e.priority, e.since, e.place))
        overdue = [e for e in wanting if now - e.since > self.patience_ns and e.cost * self.levels[-1] <= self.budget]
        if overdue:
            chosen.take(min(overdue, key=lambda e: (e.since, -e.priority, e.place)), least=True)
        for entry in ordered:
            if entry.pinned > now:
                chosen.take(entry)
        for capped in (True, False):
            for entry in ordered:
                chosen.take(entry, capped=capped)
        chosen.raise_detail()

        entries: dict[Place, Entry] = {}
        demoted: list[Demotion] = []
        for entry in sorted(state.entries.values(), key=lambda e: e.place):
            level = chosen.level.get(entry.place, everyone)
            if level > entry.level:
                demoted.append(Demotion(entry.place, entry.level, level, self._why(entry, now, chosen)))
            if now - entry.captured > self.ttl_ns:
                continue
            if level < everyone:
                pinned = entry.pinned if entry.pinned > now else now + self.pin_ns
                entry = replace(entry, since=now, pinned=pinned, level=level)
            elif level != entry.level:
                entry = replace(entry, level=level)
            entries[entry.place] = entry
        issue = tuple(self._item(state.entries[place], level) for place, level in chosen.level.items())
        return replace(state, entries=entries), Decision(issue, tuple(demoted), chosen.spent)

    def refused(self, state: AttentionState, item: FocusItem, now: int) -> AttentionState:
        """The state after the port refused `item`: the place has not been attended, is no longer pinned, and gets at most the
        next lower level (or stays peripheral, below the lowest) for `backoff_ns`. The next decision reports the demotion."""
        entry = state.entries.get(item.place)
        if entry is None:
            return state
        changed = replace(entry, since=item.waiting, pinned=0, ceiling=item.level + 1, backoff=now + self.backoff_ns)
        return replace(state, entries={**state.entries, item.place: changed})

    def _best(self, entry: Entry, now: int) -> int:
        """The best level that `entry` may have."""
        return entry.ceiling if now < entry.backoff else 0

    def _item(self, entry: Entry, level: int) -> FocusItem:
        scale = self.levels[level]
        return FocusItem(entry.place, entry.rectangle, entry.frame, entry.captured, level, scale, entry.cost * scale,
                         entry.trust, entry.priority, self.ttl_ns, entry.since)  # fmt: skip

    def _why(self, entry: Entry, now: int, chosen: _Selection) -> Reason:
        if now - entry.captured > self.ttl_ns:
            return "stale"
        if entry.priority < self.floor:
            return "calm"
        if self._best(entry, now) > entry.level:
            return "refused"
        return "top" if entry.place not in chosen.level and len(chosen.level) >= self.top else "budget"


class _Selection:
    """The places chosen in one tick, in the order of choice, with what they take."""

    def __init__(self, scheduler: TrustScheduler, now: int) -> None:
        self.scheduler = scheduler
        self.now = now
        self.level: dict[Place, int] = {}
        self.entries: list[Entry] = []
        self.spent = 0.0

    def take(self, entry: Entry, least: bool = False, capped: bool = False) -> None:
        """Choose `entry` at the best level (with `least`: the last) that fits; with `capped`, within its sensor's share."""
        rules = self.scheduler
        if entry.place in self.level or len(self.level) >= rules.top:
            return
        left = rules.budget - self.spent
        best = len(rules.levels) - 1 if least else rules._best(entry, self.now)
        for level in range(best, len(rules.levels)):
            if entry.cost * rules.levels[level] <= left:
                break
        else:
            return
        if capped:
            own = [e for e in self.entries if e.place.sensor == entry.place.sensor]
            taken = sum(e.cost * rules.levels[self.level[e.place]] for e in own)
            if len(own) + 1 > max(1, rules.share * rules.top):
                return
            if taken + entry.cost * rules.levels[level] > rules.share * rules.budget:
                return
        self.level[entry.place] = level
        self.entries.append(entry)
        self.spent += entry.cost * rules.levels[level]

    def raise_detail(self) -> None:
        """Spend what is left on better levels for those chosen."""
        rules = self.scheduler
        for entry in self.entries:
            for level in range(rules._best(entry, self.now), self.level[entry.place]):
                extra = entry.cost * (rules.levels[level] - rules.levels[self.level[entry.place]])
                if self.spent + extra <= rules.budget:
                    self.level[entry.place] = level
                    self.spent += extra
                    break


def snarc_score(records: Records, weights: tuple[float, ...]) -> npt.NDArray[np.float64]:
    """float64 [n]: trust x weighted mean of the SNARC fields; what a producer writes into `score` with its own weights."""
    fields = np.stack([records[name].astype(np.float64) for name in SNARC], axis=-1)
    return np.asarray(records["trust"].astype(np.float64) * (fields @ np.asarray(weights)) / sum(weights))


def _positive(value: float) -> bool:
    return bool(np.isfinite(value)) and value > 0


def _valid(records: Records, now: int) -> npt.NDArray[np.bool_]:
    # Comparisons with NaN are False, so NaN is refused by each of them.
    good = (records["cost"] > 0) & np.isfinite(records["cost"]) & (records["captured_ns"] <= np.uint64(now))
    for name, most in (("trust", MAX_TRUST), ("score", MAX_TRUST), *((name, 1.0) for name in SNARC)):
        good &= (records[name] >= 0) & (records[name] <= most)
    return np.asarray(good)


def _freshest(entries: dict[Place, Entry], capacity: int, oldest: int) -> dict[Place, Entry]:
    """At most `capacity` entries: the fresh before the stale, then by priority, so that a flood of names of places cannot
    push out what matters, nor fill the memory."""
    if len(entries) <= capacity:
        return entries
    ranked = sorted(entries.values(), key=lambda e: (e.captured < oldest, -e.priority, e.since, e.place))
    return {entry.place: entry for entry in ranked[:capacity]}
