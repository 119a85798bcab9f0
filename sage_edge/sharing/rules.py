"""Rules that say which requests step next, among those that may: ours by worth, and the usual ones. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sage_edge.sharing.costs import Costs

NEGLIGIBLE = 1e-6  # a step that is expected to bring less of the loss than this is worth nothing


@dataclass(frozen=True, eq=False)
class Candidate:
    """A request that may step. ahead: worth of its next stages, a step, falling; stride: steps a stage."""

    id: int
    plugin: str
    arrived: float
    served: float
    deadline: float | None
    ahead: npt.NDArray[np.float64]
    stride: int

    @property
    def due(self) -> float:
        return np.inf if self.deadline is None else self.deadline


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
    """The requests of one plugin that step together, and why."""

    plugin: str
    step: tuple[int, ...]
    why: str


def by_worth(choice: Choice) -> Chosen:
    """Where the loss is expected to fall most per ATP, deadlines kept; see `scheduler`."""
    pieces = _pieces(choice)
    if not pieces:  # nothing is expected of anybody: who has waited longest
        first = min(choice.candidates, key=lambda c: (c.served, c.id))
        return _joined(choice, first, _mates(choice, first), "nothing is expected; least recently served")
    accepted, slack, dues = _in_time(pieces, choice.now)
    if not accepted:  # none of them can be done in time: whatever comes of it, by density
        accepted, slack = pieces, np.full(len(dues), np.inf)
    for piece in accepted:
        before = slack[: int(np.searchsorted(dues, piece.owner.due))]
        if piece.first and (not len(before) or before.min() >= piece.each_ms):
            wanted = {p.owner.id: p.density for p in accepted if p.first and p.owner.plugin == piece.owner.plugin}
            mates = sorted(
                (c for c in choice.candidates if c.id in wanted and c.id != piece.owner.id),
                key=lambda c: (-wanted[c.id], c.id),
            )
            return _joined(choice, piece.owner, mates, f"worth {piece.density:.3g} per ATP")
    urgent = min((p for p in accepted if p.first), key=lambda p: (p.owner.due, p.owner.id))
    return _joined(choice, urgent.owner, [], f"deadline; worth {urgent.density:.3g} per ATP")


@dataclass(frozen=True, eq=False)
class _Piece:
    """Steps of one request that are worth the same. each_ms: of one of them."""

    owner: Candidate
    density: float
    steps: int
    each_ms: float
    first: bool


def _pieces(choice: Choice) -> list[_Piece]:
    """All steps worth having, most valuable first. Of one request, earlier ones are never worth less, so they come first."""
    counts: dict[str, int] = {}
    for candidate in choice.candidates:
        counts[candidate.plugin] = counts.get(candidate.plugin, 0) + 1
    unit = {}
    for name, count in counts.items():
        size = max((s for s in choice.sizes[name] if s <= count), default=choice.sizes[name][0])
        unit[name] = (choice.costs[name].ms(size) / size * choice.stretch, choice.costs[name].atp(size) / size)
    pieces = []
    for candidate in choice.candidates:
        each_ms, each_atp = unit[candidate.plugin]
        ahead, at = candidate.ahead, 0
        while at < len(ahead) and ahead[at] > NEGLIGIBLE:
            end = at + 1
            while end < len(ahead) and ahead[end] == ahead[at]:
                end += 1
            steps = (end - at) * candidate.stride
            pieces.append(_Piece(candidate, float(ahead[at]) / each_atp, steps, each_ms, at == 0))
            at = end
    return sorted(pieces, key=lambda p: (-p.density, p.owner.due, p.owner.id, not p.first))


def _in_time(
    pieces: Sequence[_Piece], now: float
) -> tuple[list[_Piece], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The pieces, most valuable first, that can all be done before their deadlines; the milliseconds to spare before each
    deadline; and the deadlines, rising."""
    dues = np.unique([p.owner.due for p in pieces])
    slack = (dues - now) * 1e3
    accepted, lost = [], set()
    for piece in pieces:
        if piece.owner.id in lost:
            continue  # its earlier steps do not fit, so the later ones cannot come either
        at = int(np.searchsorted(dues, piece.owner.due))
        room = slack[at:].min()
        steps = min(piece.steps, int(room // piece.each_ms)) if np.isfinite(room) else piece.steps
        if steps < piece.steps:
            lost.add(piece.owner.id)
        if steps > 0:
            slack[at:] -= steps * piece.each_ms
            accepted.append(piece)
    return accepted, slack, dues


def _joined(choice: Choice, first: Candidate, mates: Sequence[Candidate], why: str) -> Chosen:
    """`first` and as many of `mates` (same plugin, best first) as make a step cheapest per request, or worth most."""
    sizes, costs = choice.sizes[first.plugin], choice.costs[first.plugin]
    row = [first, *mates]
    worth = [max(float(c.ahead[0]) if len(c.ahead) else 0.0, NEGLIGIBLE) for c in row]
    fitting = [size for size in sizes if size <= len(row)] or [1]
    best = max(fitting, key=lambda size: (sum(worth[:size]) / costs.atp(size), -size))
    return Chosen(first.plugin, tuple(c.id for c in row[:best]), why)


def _mates(choice: Choice, first: Candidate) -> list[Candidate]:
    """The other requests of the same plugin, least recently served first."""
    others = (c for c in choice.candidates if c.plugin == first.plugin and c.id != first.id)
    return sorted(others, key=lambda c: (c.served, c.id))


def _filled(choice: Choice, first: Candidate, mates: Sequence[Candidate], why: str) -> Chosen:
    """`first` and so many of `mates` that a step costs least per request; the same for all rules that know no worth."""
    sizes, costs = choice.sizes[first.plugin], choice.costs[first.plugin]
    row = [first, *mates]
    fitting = [size for size in sizes if size <= len(row)] or [1]
    best = min(fitting, key=lambda size: (round(costs.atp(size) / size / costs.atp(1), 1), size))
    return Chosen(first.plugin, tuple(c.id for c in row[:best]), why)


def round_robin(choice: Choice) -> Chosen:
    """Every request in turn, one step each."""
    first = min(choice.candidates, key=lambda c: (c.served, c.id))
    return _filled(choice, first, _mates(choice, first), "its turn")


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
    first = min((c for c in choice.candidates if c.plugin == plugin), key=lambda c: (c.served, c.id))
    return _filled(choice, first, _mates(choice, first), "least spent for its trust")


RULES: dict[str, Callable[[Choice], Chosen]] = {
    "worth": by_worth,
    "round-robin": round_robin,
    "run-to-completion": run_to_completion,
    "trust-proportional": by_trust,
    "earliest-deadline": earliest_deadline,
}
