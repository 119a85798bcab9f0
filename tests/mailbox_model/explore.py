"""Breadth-first search over all interleavings of a model; the shortest way to a violation when there is one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

S = TypeVar("S")


@dataclass(frozen=True)
class Result(Generic[S]):
    """How many states were seen; `violation` and the way to it (one label a step), or None and ()."""

    states: int
    violation: str | None
    trace: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.states} states" + (f": {self.violation}\n  " + "\n  ".join(self.trace) if self.violation else "")


class ViolationError(Exception):
    """Raised by a model's step for something that must not happen."""


def explore(
    start: S,
    successors: Callable[[S], Iterable[tuple[str, S]]],
    check: Callable[[S], str | None],
    limit: int = 2_000_000,
) -> Result[S]:
    """Search all states reachable from `start`. `check` names what is wrong with a state, or gives None.

    Raises RuntimeError when there are more than `limit` states: a model that was cut short has shown nothing.
    """
    parents: dict[S, tuple[S, str] | None] = {start: None}
    queue = deque([start])

    def trace(state: S, last: str | None = None) -> tuple[str, ...]:
        labels = [last] if last else []
        while (parent := parents[state]) is not None:
            state, label = parent
            labels.append(label)
        return tuple(reversed(labels))

    while queue:
        state = queue.popleft()
        if problem := check(state):
            return Result(len(parents), problem, trace(state))
        try:
            for label, following in successors(state):
                if following not in parents:
                    parents[following] = (state, label)
                    queue.append(following)
        except ViolationError as error:
            return Result(len(parents), str(error), trace(state))
        if len(parents) > limit:
            raise RuntimeError(f"more than {limit} states")
    return Result(len(parents), None, ())
