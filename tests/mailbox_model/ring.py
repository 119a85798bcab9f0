"""A broadcast ring as a model: claim, write, read, sweep, one shared access a step.

Weak memory: a relaxed store or load may change places with its neighbours unless a fence stands between. So the writer stores the
two words of a record in either order, and a seeded bug moves an access over the fence that LAYOUT.md section 8 puts there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tests.mailbox_model.explore import ViolationError


class Shared(NamedTuple):
    owner: int
    head: int
    first: tuple[int, ...]  # two words a cell; a record n is written as (n + 1, n + 1), tagged by its writer
    second: tuple[int, ...]
    dead: frozenset[int]
    born: int
    published: tuple[int, ...]  # what each published record holds


class Actor(NamedTuple):
    role: str  # writer, reader, sweeper
    pc: str
    identity: int = 0
    left: int = 0
    n: int = 0  # record at work; for the reader its cursor
    head: int = 0
    value: int = 0
    other: int = 0
    lost: int = 0
    suspect: int = 0


class State(NamedTuple):
    shared: Shared
    actors: tuple[Actor, ...]
    kills: int


@dataclass(frozen=True)
class Bugs:
    """One seeded mistake each."""

    no_writer_fence: bool = False  # a word of the next record may be stored before the head that announces the last one
    head_first: bool = False  # published before it is written
    no_second_look: bool = False  # the reader does not load head again
    reach_too_far: bool = False  # the reader takes all cells for readable, also the one that may be written
    reader_loads_early: bool = False  # the second load of head passes before the words
    sweep_blindly: bool = False  # the sweeper stores 0 instead of CAS(dead → 0)


@dataclass(frozen=True)
class Ring:
    """The model: `writers` one after the other or at once on the same ring, each with `records` to write."""

    cells: int
    writers: int
    records: int
    readers: int
    sweepers: int
    kills: int
    bugs: Bugs = Bugs()

    def start(self) -> State:
        actors = [Actor("writer", "claim", number + 1, self.records) for number in range(self.writers)]
        actors += [Actor("reader", "idle")] * self.readers + [Actor("sweeper", "look")] * self.sweepers
        empty = (0,) * self.cells
        return State(Shared(0, 0, empty, empty, frozenset(), self.writers, ()), tuple(actors), self.kills)

    def successors(self, state: State) -> Iterator[tuple[str, State]]:
        for number, actor in enumerate(state.actors):
            if actor.pc in ("done", "dead"):
                continue
            before, after = state.actors[:number], state.actors[number + 1 :]
            for label, shared, following in getattr(self, f"_{actor.role}")(state.shared, actor):
                yield f"{actor.role} {number}: {label}", State(shared, (*before, following, *after), state.kills)
            if state.kills and actor.role == "writer":
                shared = state.shared._replace(dead=state.shared.dead | {actor.identity})
                gone = (*before, actor._replace(pc="dead"), *after)
                yield f"kill writer {number}", State(shared, gone, state.kills - 1)

    def _writer(self, s: Shared, a: Actor) -> Iterator[tuple[str, Shared, Actor]]:
        if a.pc == "claim":
            if s.owner == 0:
                yield "claims the ring", s._replace(owner=a.identity), a._replace(pc="begin")
            return
        if s.owner != a.identity:
            raise ViolationError("a living writer lost its ring")
        cell = a.n % self.cells
        value = a.identity * 100 + a.n + 1
        if a.pc == "begin":
            if a.left == 0:
                yield "leaves", s._replace(owner=0), a._replace(pc="done")
                return
            n = s.head
            yield "load head", s, a._replace(pc="announce" if self.bugs.head_first else "words", n=n)
        elif a.pc == "words":
            yield "first word", s._replace(first=_put(s.first, cell, value)), a._replace(pc="second")
            yield "second word", s._replace(second=_put(s.second, cell, value)), a._replace(pc="first")
        elif a.pc in ("first", "second"):
            if a.pc == "first":
                shared = s._replace(first=_put(s.first, cell, value))
            else:
                shared = s._replace(second=_put(s.second, cell, value))
            yield f"{a.pc} word", shared, self._next(a) if self.bugs.head_first else a._replace(pc="publish")
        elif a.pc == "publish":
            shared = s._replace(head=a.n + 1, published=(*s.published, value))
            yield "publish", shared, self._next(a)
            if self.bugs.no_writer_fence and a.left > 1:
                # A word of record n + 1 becomes visible before this head does.
                early = (a.n + 1) % self.cells
                shared = s._replace(first=_put(s.first, early, value + 1))
                yield "a word of the next record", shared, a._replace(pc="late head")
        elif a.pc == "late head":
            yield "publish", s._replace(head=a.n + 1, published=(*s.published, value)), self._next(a)
        elif a.pc == "announce":
            shared = s._replace(head=a.n + 1, published=(*s.published, value))
            yield "publish", shared, a._replace(pc="words")

    def _next(self, a: Actor) -> Actor:
        return a._replace(pc="begin", left=a.left - 1, n=0)

    def _reader(self, s: Shared, a: Actor) -> Iterator[tuple[str, Shared, Actor]]:
        reach = self.cells if self.bugs.reach_too_far else self.cells - 1
        if a.pc == "idle":
            if s.head != a.n:
                lost = max(0, s.head - a.n - reach)
                yield "load head", s, a._replace(pc="copy", n=a.n + lost, lost=a.lost + lost)
        elif a.pc == "copy":
            yield "first word", s, a._replace(pc="copy on", value=s.first[a.n % self.cells])
            if self.bugs.reader_loads_early:
                yield "head, too early", s, a._replace(pc="early", head=s.head)
        elif a.pc == "copy on":
            yield "second word", s, a._replace(pc="again", other=s.second[a.n % self.cells])
        elif a.pc == "early":
            yield "first word", s, a._replace(pc="early on", value=s.first[a.n % self.cells])
        elif a.pc == "early on":
            yield "second word", s, a._replace(pc="accept", other=s.second[a.n % self.cells])
        elif a.pc == "again":
            head = a.n + 1 if self.bugs.no_second_look else s.head
            yield "load head again", s, a._replace(pc="accept", head=head)
        elif a.pc == "accept":
            clean = Actor("reader", "idle", n=a.n, lost=a.lost)
            if a.head - a.n > reach:
                yield "thrown away", s, clean
                return
            if a.value != a.other:
                raise ViolationError(f"torn: {a.value} and {a.other}")
            if a.value != s.published[a.n]:
                raise ViolationError(f"record {a.n} was published as {s.published[a.n]} and read as {a.value}")
            yield "delivered", s, clean._replace(n=a.n + 1)

    def _sweeper(self, s: Shared, a: Actor) -> Iterator[tuple[str, Shared, Actor]]:
        if a.pc == "look":
            if s.owner in s.dead:
                yield "owner is dead", s, a._replace(pc="free", suspect=s.owner)
        elif a.pc == "free":
            freed = s.owner == a.suspect or self.bugs.sweep_blindly
            yield "free ring", s._replace(owner=0) if freed else s, Actor("sweeper", "look")

    def check(self, state: State) -> str | None:
        s = state.shared
        if len(s.published) != s.head:
            return f"head is {s.head}, published were {len(s.published)}"
        if len([a for a in state.actors if a.role == "writer" and a.pc not in ("claim", "done", "dead")]) > 1:
            return "two living owners of the ring"
        return None


def _put(items: tuple[int, ...], index: int, value: int) -> tuple[int, ...]:
    return (*items[:index], value, *items[index + 1 :])
