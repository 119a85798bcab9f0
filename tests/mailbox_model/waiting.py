"""Event words as a model: signal and wait (LAYOUT.md section 7), one shared access a step, with kills.

Each signaller makes one change and signals; each waiter wants to see all changes. Without a kill a sleeper may never be left
with something to see and nobody about to wake it. After a kill only the timer of its sleep may help, and must.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class State(NamedTuple):
    changes: int
    bit: bool
    turns: int
    signallers: tuple[tuple[str, int, bool], ...]  # pc, the word it loaded (count), and its bit
    waiters: tuple[tuple[str, int, int], ...]  # pc, changes seen, the count it will sleep on
    kills: int
    killed: bool


@dataclass(frozen=True)
class Bugs:
    """One seeded mistake each."""

    look_before_bit: bool = False  # the waiter's last look comes before it sets the bit
    signal_before_change: bool = False
    no_count: bool = False  # the signal clears the bit only: the word may look the same again
    no_compare: bool = False  # the sleep does not compare the word
    wake_one: bool = False  # one sleeper is woken, all bits are cleared


@dataclass(frozen=True)
class Waiting:
    """The model: `signallers` with one change each, `waiters` that each want to see all of them (broadcast)."""

    signallers: int
    waiters: int
    kills: int
    bugs: Bugs = Bugs()

    def start(self) -> State:
        first = "load" if self.bugs.signal_before_change else "change"
        return State(
            0, False, 0, ((first, 0, False),) * self.signallers, (("look", 0, 0),) * self.waiters, self.kills, False
        )

    def successors(self, state: State) -> Iterator[tuple[str, State]]:
        for number in range(self.signallers):
            for label, following in self._signal(state, number):
                yield f"signaller {number}: {label}", following
            if state.kills and state.signallers[number][0] not in ("done", "dead"):
                gone = _put(state.signallers, number, ("dead", 0, False))
                yield f"kill signaller {number}", state._replace(signallers=gone, kills=state.kills - 1, killed=True)
        for number in range(self.waiters):
            for label, following in self._wait(state, number):
                yield f"waiter {number}: {label}", following
            if state.kills and state.waiters[number][0] not in ("done", "dead"):
                gone = _put(state.waiters, number, ("dead", 0, 0))
                yield f"kill waiter {number}", state._replace(waiters=gone, kills=state.kills - 1, killed=True)

    def _signal(self, s: State, number: int) -> Iterator[tuple[str, State]]:
        pc, count, bit = s.signallers[number]
        after = "change" if self.bugs.signal_before_change else "done"

        def moved(state: State, pc: str, count: int = 0, bit: bool = False) -> State:
            return state._replace(signallers=_put(state.signallers, number, (pc, count, bit)))

        if pc == "change":
            yield (
                "change",
                moved(s._replace(changes=s.changes + 1), "done" if self.bugs.signal_before_change else "load"),
            )
        elif pc == "load":
            yield "load word", moved(s, "clear", s.turns, s.bit) if s.bit else moved(s, after)
        elif pc == "clear":
            if (s.turns, s.bit) != (count, bit):
                yield "word changed", moved(s, "load")
            else:
                yield "clear bit", moved(s._replace(bit=False, turns=s.turns + (not self.bugs.no_count)), "wake")
        elif pc == "wake":
            sleeping = [k for k, waiter in enumerate(s.waiters) if waiter[0] == "asleep"]
            for chosen in [sleeping[:1]] if self.bugs.wake_one else [sleeping]:
                waiters = s.waiters
                for k in chosen:
                    waiters = _put(waiters, k, ("look", waiters[k][1], 0))
                yield "wake", moved(s._replace(waiters=waiters), after)

    def _wait(self, s: State, number: int) -> Iterator[tuple[str, State]]:
        pc, seen, count = s.waiters[number]

        def moved(state: State, pc: str, seen: int = seen, count: int = 0) -> State:
            return state._replace(waiters=_put(state.waiters, number, (pc, seen, count)))

        if pc == "look":
            if s.changes > seen:
                seen = s.changes
                yield "sees a change", moved(s, "done" if seen == self.signallers else "look", seen)
            else:
                yield "sees nothing", moved(s, "arm")
        elif pc == "arm":
            yield (
                "set bit",
                moved(s._replace(bit=True), "sleep" if self.bugs.look_before_bit else "look again", seen, s.turns),
            )
        elif pc == "look again":
            yield "look again", moved(s, "look") if s.changes > seen else moved(s, "sleep", seen, count)
        elif pc == "sleep":
            same = (s.turns == count and s.bit) or self.bugs.no_compare
            yield "sleep", moved(s, "asleep", seen, count) if same else moved(s, "look")
        elif pc == "asleep" and s.killed:
            yield "timer", moved(s, "look")

    def check(self, s: State) -> str | None:
        if s.killed or any(pc not in ("done", "dead") for pc, _, _ in s.signallers):
            return None  # somebody may still wake, or the timer does
        for number, (pc, seen, _) in enumerate(s.waiters):
            if pc == "asleep" and s.changes > seen:
                return f"waiter {number} sleeps, though change {s.changes} is there and all signals were given"
        return None


def _put(items: tuple, index: int, value: object) -> tuple:  # type: ignore[type-arg]
    return (*items[:index], value, *items[index + 1 :])
