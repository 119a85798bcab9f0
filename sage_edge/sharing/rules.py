"""Rules that say which requests step next, among those that may: ours by worth, and the usual ones. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from sage_edge.irp.worth import Pieces
from sage_edge.sharing.costs import Costs


@dataclass(frozen=True, eq=False)
class Candidate:
    """A request that may step. ahead: its next steps, as (worth of a step, how many steps), falling."""

    id: int
    plugin: str
    arrived: float
    served: float
    deadline: float | None
    ahead: Pieces

    @property
    def due(self) -> float:
        return math.inf if self.deadline is None else self.deadline


@dataclass(frozen=True, eq=False)
class Choice:
    """Who may go. sizes, costs: by plugin. used: what each has spent in this period over its trust. stretch: milliseconds of
    the clock for one of the device."""

    candidates: tuple[Candidate, ...]
    sizes: Mapping[str, tuple[int, ...]]
    costs: Mapping[str, Costs]
    used: Mapping[str, float]
    now: float
    stretch: float = 1.0


@dataclass(frozen=True)
class Chosen:
    """The requests of one plugin that step together, and why. most: steps for which the reason holds."""

    plugin: str
    step: tuple[int, ...]
    why: str
    most: int = 1 << 30


def by_worth(choice: Choice) -> Chosen:
    """Where the loss is expected to fall most per ATP, deadlines kept; see `scheduler`."""
    pieces = _pieces(choice)
    if not pieces:  # nothing is expected of anybody
        return _filled(choice, *_in_turn(choice.candidates), "nothing is expected; least recently served")
    dues = sorted({piece.owner.due for piece in pieces})
    places = {due: place for place, due in enumerate(dues)}
    accepted, slack = _in_time(pieces, places, [(due - choice.now) * 1e3 for due in dues])
    firsts = [piece for piece in accepted if piece.first]
    kept = {piece.owner.due: slack[places[piece.owner.due]] for piece in firsts}
    if not firsts:  # none of them can be done in time: whatever comes of it, by density
        firsts = [piece for piece in pieces if piece.first]
    # The earliest deadline makes nobody late, so there is always one.
    piece = next(p for p in firsts if all(spare >= p.each_ms for due, spare in kept.items() if due < p.owner.due))
    mates = [p for p in firsts if p.owner.plugin == piece.owner.plugin and p is not piece]
    return _together(choice, [piece, *mates])


@dataclass(frozen=True, eq=False)
class _Piece:
    """Steps of one request that are worth the same. density: worth per ATP. each_ms: what one takes, on the clock."""

    owner: Candidate
    density: float
    steps: int
    each_ms: float
    first: bool


def _pieces(choice: Choice) -> list[_Piece]:
    """All steps worth having, most valuable first. Of one request, earlier ones are never worth less, so they come first."""
    counts = Counter(candidate.plugin for candidate in choice.candidates)
    unit = {}
    for name, count in counts.items():
        size = max((s for s in choice.sizes[name] if s <= count), default=choice.sizes[name][0])
        unit[name] = (choice.costs[name].ms(size) / size * choice.stretch, choice.costs[name].atp(size) / size)
    pieces = []
    for candidate in choice.candidates:
        each_ms, each_atp = unit[candidate.plugin]
        for place, (worth, steps) in enumerate(candidate.ahead):
            pieces.append(_Piece(candidate, worth / each_atp, steps, each_ms, place == 0))
    return sorted(pieces, key=lambda p: (-p.density, p.owner.due, p.owner.id, not p.first))


def _in_time(
    pieces: Sequence[_Piece], places: Mapping[float, int], slack: list[float]
) -> tuple[list[_Piece], list[float]]:
    """The pieces, most valuable first, that can all be done before their deadlines, and the milliseconds to spare before
    each deadline, of which `slack` says how far off they are and `places` where they stand in it."""
    demand = [0.0] * len(slack)
    for piece in pieces:
        demand[places[piece.owner.due]] += piece.steps * piece.each_ms
    spare = [room - load for room, load in zip(slack, accumulate(demand), strict=True)]
    if min(spare) >= 0:
        return list(pieces), spare
    accepted, lost = [], set()
    for piece in pieces:
        if piece.owner.id in lost:
            continue  # its earlier steps do not fit, so the later ones cannot come either
        at = places[piece.owner.due]
        room = min(slack[at:])
        steps = piece.steps if room >= piece.steps * piece.each_ms else int(room // piece.each_ms)
        if steps < piece.steps:
            lost.add(piece.owner.id)
        if steps > 0:
            used = steps * piece.each_ms
            slack[at:] = [spare - used for spare in slack[at:]]
            accepted.append(piece)
    return accepted, slack


def _together(choice: Choice, row: Sequence[_Piece]) -> Chosen:
    """The first of `row`, and as many of the others (same plugin, best first) as make a step worth most per ATP."""
    first = row[0]
    sizes, costs = choice.sizes[first.owner.plugin], choice.costs[first.owner.plugin]
    fitting = [size for size in sizes if size <= len(row)] or [1]
    best = max(fitting, key=lambda size: (sum(p.density for p in row[:size]) / costs.atp(size), -size))
    return Chosen(
        first.owner.plugin, tuple(p.owner.id for p in row[:best]), f"worth {first.density:.3g} per ATP", first.steps
    )


def _in_turn(candidates: Sequence[Candidate]) -> tuple[Candidate, list[Candidate]]:
    """The least recently served candidate, and the others of its plugin in that order."""
    first = min(candidates, key=lambda c: (c.served, c.id))
    mates = (c for c in candidates if c.plugin == first.plugin and c.id != first.id)
    return first, sorted(mates, key=lambda c: (c.served, c.id))


def _filled(choice: Choice, first: Candidate, mates: Sequence[Candidate], why: str) -> Chosen:
    """`first` and so many of `mates` that a step costs least per request; the same for all rules that know no worth."""
    sizes, costs = choice.sizes[first.plugin], choice.costs[first.plugin]
    row = [first, *mates]
    fitting = [size for size in sizes if size <= len(row)] or [1]
    best = min(fitting, key=lambda size: (round(costs.atp(size) / size / costs.atp(1), 1), size))
    return Chosen(first.plugin, tuple(c.id for c in row[:best]), why)


def round_robin(choice: Choice) -> Chosen:
    """Every request in turn, one step each."""
    return _filled(choice, *_in_turn(choice.candidates), "its turn")


def run_to_completion(choice: Choice) -> Chosen:
    """In order of arrival, each until it halts."""
    first = min(choice.candidates, key=lambda c: (c.arrived, c.id))
    others = [c for c in choice.candidates if c.plugin == first.plugin and c.id != first.id]
    return _filled(choice, first, sorted(others, key=lambda c: (c.arrived, c.id)), "arrived first")


def earliest_deadline(choice: Choice) -> Chosen:
    """The earliest deadline first, each until it halts."""
    first = min(choice.candidates, key=lambda c: (c.due, c.arrived, c.id))
    others = [c for c in choice.candidates if c.plugin == first.plugin and c.id != first.id]
    return _filled(choice, first, sorted(others, key=lambda c: (c.due, c.arrived, c.id)), "earliest deadline")


def by_trust(choice: Choice) -> Chosen:
    """The plugin that has spent least for its trust in this period; its requests in turn."""
    plugin = min({c.plugin for c in choice.candidates}, key=lambda name: (choice.used[name], name))
    own = [c for c in choice.candidates if c.plugin == plugin]
    return _filled(choice, *_in_turn(own), "least spent for its trust")


RULES: dict[str, Callable[[Choice], Chosen]] = {
    "worth": by_worth,
    "round-robin": round_robin,
    "run-to-completion": run_to_completion,
    "trust-proportional": by_trust,
    "earliest-deadline": earliest_deadline,
}
