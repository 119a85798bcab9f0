"""The focus port as a model: loan, send, cancel, drop-oldest, receive, release, join, sweep, tap; one shared access a step.

Left out where it changes nothing: the load before a CAS that compares the whole word again (a stale load only means another
try). Kept apart, step by step: what the proofs in LAYOUT.md rest on - both looks of receive word by word, and the sweep's
word, identity, ticket and CAS.

A bug (`Bugs`) seeds one mistake each; the tests show that the model finds every one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tests.mailbox_model.explore import ViolationError

FREE, LOANED, READY, HELD = "FREE", "LOANED", "READY", "HELD"
Word = tuple[str, int, int]  # state, owner, ticket
Value = tuple[int, int]  # identity of the producer, number of its item
NOTHING: Value = (0, 0)


class Shared(NamedTuple):
    words: tuple[Word, ...]
    tickets: int
    first: tuple[Value, ...]  # two halves of each slot's payload: a torn read shows as two values
    second: tuple[Value, ...]
    described: tuple[int, ...]  # ticket in the descriptor
    identities: tuple[int, ...]  # participants' entries, 0 = free
    dead: frozenset[int]
    born: int  # identities given out so far
    delivered: frozenset[Value]


class Actor(NamedTuple):
    role: str  # producer, consumer, sweeper
    pc: str
    identity: int = 0
    place: int = -1  # index of its entry
    left: int = 0  # items to send or receive
    sent: int = 0
    slot: int = -1
    word: Word = (FREE, 0, 0)
    ticket: int = 0
    look: int = 0  # next word to load
    best: tuple[int, Word] = (-1, (FREE, 0, 0))
    chosen: tuple[int, Word] = (-1, (FREE, 0, 0))
    value: Value = NOTHING
    seen: tuple[Value, ...] = ()  # last item of each producer, for the order
    entry: int = 0
    suspect: int = 0


class State(NamedTuple):
    shared: Shared
    actors: tuple[Actor, ...]
    kills: int
    restarts: int


@dataclass(frozen=True)
class Bugs:
    """One seeded mistake each."""

    sweep_without_recheck: bool = False  # step 2 of the sweep trusts the word alone
    sweep_keeps_ticket: bool = False  # a loan comes back under its old ticket
    cancel_keeps_ticket: bool = False
    identity_first: bool = False  # the entry is freed before the slots
    publish_first: bool = False  # READY before the payload is written
    blind_take: bool = False  # HELD is stored, whatever the word is by now
    careless_tap: bool = False  # the tap does not look at the word again
    one_look: bool = False  # receive takes the smallest of a single look
    release_first: bool = False  # the slot is given back before the payload is read
    timeout_is_death: bool = False  # whoever is slow is taken for dead
    steal_held: bool = False  # drop-oldest takes a slot that a consumer holds


@dataclass(frozen=True)
class Focus:
    """The model for so many producers and consumers, with at most `kills` kills and `restarts` new processes after them."""

    producers: int
    consumers: int
    sweepers: int
    items: int
    slots: int
    entries: int
    kills: int
    restarts: int = 0
    drop_oldest: bool = False
    cancels: bool = False
    taps: int = 0
    bugs: Bugs = Bugs()

    def start(self) -> State:
        actors: list[Actor] = []
        for role, count in (("producer", self.producers), ("consumer", self.consumers)):
            for _ in range(count):
                number = len(actors) + 1
                left = self.items if role == "producer" else self.items * self.producers
                actors.append(Actor(role, "idle", number, number - 1, left))
        identities = tuple(actor.identity for actor in actors) + (0,) * (self.entries - len(actors))
        born = len(actors)
        actors += [Actor("sweeper", "entry")] * self.sweepers + [Actor("tap", "word")] * self.taps
        nothing = (NOTHING,) * self.slots
        words: tuple[Word, ...] = ((FREE, 0, 0),) * self.slots
        shared = Shared(words, 1, nothing, nothing, (0,) * self.slots, identities, frozenset(), born, frozenset())
        return State(shared, tuple(actors), self.kills, self.restarts)

    # --- what may happen next

    def successors(self, state: State) -> Iterator[tuple[str, State]]:
        for number, actor in enumerate(state.actors):
            if actor.pc in ("done", "dead"):
                continue
            for label, shared, following in getattr(self, f"_{actor.role}")(state.shared, actor):
                actors = (*state.actors[:number], following, *state.actors[number + 1 :])
                yield f"{actor.role} {number}: {label}", State(shared, actors, state.kills, state.restarts)
            if state.kills and actor.role in ("producer", "consumer"):
                yield from self._kill(state, number, actor)

    def _kill(self, state: State, number: int, actor: Actor) -> Iterator[tuple[str, State]]:
        shared = state.shared._replace(dead=state.shared.dead | {actor.identity})
        before, after = state.actors[:number], state.actors[number + 1 :]
        gone = actor._replace(pc="dead")
        yield f"kill {actor.role} {number}", State(shared, (*before, gone, *after), state.kills - 1, state.restarts)
        if state.restarts:
            reborn = Actor(actor.role, "join", shared.born + 1, -1, max(actor.left, 1))
            shared = shared._replace(born=shared.born + 1)
            label = f"kill and restart {actor.role} {number}"
            yield label, State(shared, (*before, reborn, *after), state.kills - 1, state.restarts - 1)

    def _join(self, s: Shared, a: Actor) -> Iterator[tuple[str, Shared, Actor]]:
        if 0 in s.identities:
            index = s.identities.index(0)
            identities = _put(s.identities, index, a.identity)
            yield f"joins as {index}", s._replace(identities=identities), a._replace(pc="idle", place=index)

    def _producer(self, s: Shared, a: Actor) -> Iterator[tuple[str, Shared, Actor]]:
        if a.pc == "join":
            yield from self._join(s, a)
        elif a.pc == "idle":
            if a.left == 0:
                yield "done", s, a._replace(pc="done")
                return
            free = False
            for slot, (state, _, ticket) in enumerate(s.words):
                free = free or state == FREE
                wanted = state == FREE or (self.drop_oldest and state == READY and FREE not in [w[0] for w in s.words])
                if self.bugs.steal_held and state == HELD:
                    wanted = True
                if wanted:
                    word = (LOANED, a.place, ticket)
                    pc = "ticket" if self.bugs.publish_first else "first"
                    value = (a.identity, a.sent + 1)
                    following = a._replace(pc=pc, slot=slot, word=word, value=value)
                    yield f"loan {slot}", s._replace(words=_put(s.words, slot, word)), following
        elif a.pc == "first":
            yield "write first half", s._replace(first=_put(s.first, a.slot, a.value)), a._replace(pc="second")
        elif a.pc == "second":
            shared = s._replace(second=_put(s.second, a.slot, a.value))
            sent = _settled(a)._replace(left=a.left - 1, sent=a.sent + 1)
            yield "write second half", shared, sent if self.bugs.publish_first else a._replace(pc="ticket")
            if self.cancels:
                yield "cancel", s, a._replace(pc="cancel ticket")
        elif a.pc == "ticket":
            yield "ticket", s._replace(tickets=s.tickets + 1), a._replace(pc="describe", ticket=s.tickets)
        elif a.pc == "describe":
            yield "descriptor", s._replace(described=_put(s.described, a.slot, a.ticket)), a._replace(pc="publish")
        elif a.pc == "publish":
            if s.words[a.slot] != a.word:
                raise ViolationError(f"the loan of a living producer was taken: {a.word} is now {s.words[a.slot]}")
            shared = s._replace(words=_put(s.words, a.slot, (READY, a.place, a.ticket)))
            sent = _settled(a)._replace(left=a.left - 1, sent=a.sent + 1)
            yield "publish", shared, a._replace(pc="first") if self.bugs.publish_first else sent
        elif a.pc == "cancel ticket":
            yield "ticket", s._replace(tickets=s.tickets + 1), a._replace(pc="cancel", ticket=s.tickets)
        elif a.pc == "cancel":
            if s.words[a.slot] != a.word:
                raise ViolationError(f"the loan of a living producer was taken: {a.word} is now {s.words[a.slot]}")
            ticket = a.word[2] if self.bugs.cancel_keeps_ticket else a.ticket
            shared = s._replace(words=_put(s.words, a.slot, (FREE, 0, ticket)))
            yield "cancelled", shared, _settled(a)._replace(left=a.left - 1)

    def _consumer(self, s: Shared, a: Actor) -> Iterator[tuple[str, Shared, Actor]]:
        none = (-1, (FREE, 0, 0))
        if a.pc == "join":
            yield from self._join(s, a)
        elif a.pc == "idle":
            if a.left == 0:
                yield "done", s, a._replace(pc="done")
            elif any(word[0] == READY for word in s.words):  # else it would only look again
                yield from self._consumer(s, a._replace(pc="look", look=0, best=none, chosen=none))
        elif a.pc == "look":
            word = s.words[a.look]
            best = a.best
            if word[0] == READY and (best[0] < 0 or word[2] < best[1][2]):
                best = (a.look, word)
            following = a._replace(best=best, look=a.look + 1)
            if following.look == self.slots:
                if best[0] < 0:
                    following = _settled(a)
                elif best == a.chosen or self.bugs.one_look:
                    following = following._replace(pc="take", chosen=best)
                else:
                    following = following._replace(look=0, best=none, chosen=best)
            yield f"look at {a.look}", s, following
        elif a.pc == "take":
            slot, word = a.chosen
            if s.words[slot] != word and not self.bugs.blind_take:
                yield "too late", s, _settled(a)
                return
            held = (HELD, a.place, word[2])
            pc = "release" if self.bugs.release_first else "read"
            following = a._replace(pc=pc, slot=slot, word=held)
            yield f"take {slot}", s._replace(words=_put(s.words, slot, held)), following
        elif a.pc == "read":
            yield "read first half", s, a._replace(pc="read on", value=s.first[a.slot])
        elif a.pc == "read on":
            yield "read second half", *self._receive(s, a)
        elif a.pc == "release":
            if s.words[a.slot] != a.word:
                raise ViolationError(f"the item of a living consumer was taken: {a.word} is now {s.words[a.slot]}")
            shared = s._replace(words=_put(s.words, a.slot, (FREE, 0, a.word[2])))
            if self.bugs.release_first:
                yield "release", shared, a._replace(pc="read")
            else:
                yield "release", shared, _settled(a)._replace(left=a.left - 1)

    def _receive(self, s: Shared, a: Actor) -> tuple[Shared, Actor]:
        value = s.second[a.slot]
        if value != a.value:
            raise ViolationError(f"torn: {a.value} and {value}")
        if value == NOTHING or value in s.delivered:
            raise ViolationError(f"{value} was received twice, or never sent")
        if not self.bugs.release_first and s.described[a.slot] != a.word[2]:
            raise ViolationError(
                f"the descriptor of slot {a.slot} has ticket {s.described[a.slot]}, the word {a.word[2]}"
            )
        seen = dict(a.seen)
        if seen.get(value[0], 0) > value[1]:
            raise ViolationError(f"out of order: {value} after {(value[0], seen[value[0]])}")
        seen[value[0]] = value[1]
        shared = s._replace(delivered=s.delivered | {value})
        following = a._replace(pc="release", seen=tuple(sorted(seen.items())))
        if self.bugs.release_first:
            following = _settled(following)._replace(left=a.left - 1)
        return shared, following

    def _sweeper(self, s: Shared, a: Actor) -> Iterator[tuple[str, Shared, Actor]]:
        done = Actor("sweeper", "entry", entry=(a.entry + 1) % self.entries)
        if a.pc == "entry":
            # One entry after the other; those of the living are passed over in one go.
            for step in range(self.entries):
                entry = (a.entry + step) % self.entries
                identity = s.identities[entry]
                if identity and (identity in s.dead or self.bugs.timeout_is_death):
                    pc = "free entry" if self.bugs.identity_first else "word"
                    yield f"finds {entry} dead", s, a._replace(pc=pc, entry=entry, suspect=identity, look=0)
                    return
        elif a.pc == "word":
            if a.look == self.slots:
                yield "all seen", s, done if self.bugs.identity_first else a._replace(pc="free entry")
                return
            word = s.words[a.look]
            if word[1] == a.entry and word[0] in (LOANED, HELD):
                unchecked = self.bugs.sweep_without_recheck or self.bugs.identity_first
                yield f"load {a.look}", s, a._replace(pc="ticket" if unchecked else "recheck", word=word)
            else:
                yield f"load {a.look}", s, a._replace(look=a.look + 1)
        elif a.pc == "recheck":
            if s.identities[a.entry] == a.suspect:
                yield "still dead", s, a._replace(pc="ticket")
            else:
                yield "another owner by now", s, done
        elif a.pc == "ticket":
            if a.word[0] == HELD or self.bugs.sweep_keeps_ticket:
                yield from self._sweeper(s, a._replace(pc="take back", ticket=a.word[2]))
            else:
                yield "ticket", s._replace(tickets=s.tickets + 1), a._replace(pc="take back", ticket=s.tickets)
        elif a.pc == "take back":
            shared = s
            if s.words[a.look] == a.word:
                shared = s._replace(words=_put(s.words, a.look, (FREE, 0, a.ticket)))
            yield f"take back {a.look}", shared, a._replace(pc="word", look=a.look + 1)
        elif a.pc == "free entry":
            shared = s
            if s.identities[a.entry] == a.suspect:
                shared = s._replace(identities=_put(s.identities, a.entry, 0))
            yield "free entry", shared, a._replace(pc="word") if self.bugs.identity_first else done

    def _tap(self, s: Shared, a: Actor) -> Iterator[tuple[str, Shared, Actor]]:
        if a.pc == "word":
            for slot, word in enumerate(s.words):
                if word[0] != LOANED and word[2] > 0:
                    yield f"load {slot}", s, a._replace(pc="descriptor", slot=slot, word=word)
        elif a.pc == "descriptor":
            other = s.described[a.slot] != a.word[2]
            yield "descriptor", s, Actor("tap", "word") if other else a._replace(pc="first")
        elif a.pc == "first":
            yield "copy first half", s, a._replace(pc="second", value=s.first[a.slot])
        elif a.pc == "second":
            # The two halves stand for the whole copy: different ones are told apart when it is accepted.
            value = a.value if s.second[a.slot] == a.value else NOTHING
            yield "copy second half", s, a._replace(pc="again", value=value)
        elif a.pc == "again":
            state, _, ticket = s.words[a.slot]
            accepted = (ticket == a.word[2] and state != LOANED) or self.bugs.careless_tap
            if accepted and a.value == NOTHING:
                raise ViolationError("the tap accepted a torn copy")
            yield "look again", s, Actor("tap", "word")

    # --- what must hold in every state

    def check(self, state: State) -> str | None:
        s = state.shared
        owned: set[int] = set()
        for actor in state.actors:
            if actor.slot < 0 or actor.role == "tap" or actor.pc in ("dead", "done"):
                continue
            if actor.slot in owned:
                return f"two living owners of slot {actor.slot}"
            owned.add(actor.slot)
        # Recovery from here, by one sweep alone: nothing of the dead is left.
        words, identities = s.words, s.identities
        if not any(a.pc not in ("entry",) for a in state.actors if a.role == "sweeper"):
            for entry, identity in enumerate(identities):
                if identity in s.dead:
                    words = tuple((FREE, 0, w[2]) if w[1] == entry and w[0] in (LOANED, HELD) else w for w in words)
                    identities = _put(identities, entry, 0)
            for state_name, owner, _ in words:
                if state_name in (LOANED, HELD) and not self._lives(state, owner):
                    return f"a slot is {state_name} for entry {owner}, which nobody living has: leaked"
        return None

    def _lives(self, state: State, index: int) -> bool:
        return any(a.place == index and a.pc != "dead" for a in state.actors)


def _put(items: tuple, index: int, value: object) -> tuple:  # type: ignore[type-arg]
    return (*items[:index], value, *items[index + 1 :])


def _settled(a: Actor) -> Actor:
    """Between two operations: what is no longer looked at is reset, so that equal states are equal."""
    return Actor(a.role, "idle", a.identity, a.place, a.left, a.sent, seen=a.seen)
