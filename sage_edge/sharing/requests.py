"""What the loop holds of a request, what it gives for it, and whom it tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sage_edge.errors import SageError
from sage_edge.irp.halting import History, Policy
from sage_edge.irp.plugin import Observation, Plugin, Result
from sage_edge.irp.telemetry import Spent
from sage_edge.sharing.scheduler import Decision, Outcome, Task

if TYPE_CHECKING:
    from sage_edge.sharing.loop import Loop


@dataclass(frozen=True, eq=False)
class Refinement:
    """What one request got.

    result: see `Plugin.result`. steps, reason: as `pool.Answer`. energies float64 [steps], in the plugin's unit. trace float32
    [steps, k], signals: their names. step_ms float64 [steps]: when each step ended, from arrival. waited_ms: from arrival to
    the first step; milliseconds: from arrival to the answer. spent: of the whole request. settled: as `pool.Answer`.
    """

    result: Result
    steps: int
    reason: str
    energies: npt.NDArray[np.float64]
    trace: npt.NDArray[np.float32]
    signals: tuple[str, ...]
    step_ms: npt.NDArray[np.float64]
    waited_ms: float
    milliseconds: float
    spent: Spent
    settled: bool = True


class Ticket:
    """A claim to one answer."""

    def __init__(self, loop: Loop, number: int) -> None:
        self.loop, self.id = loop, number
        self._outcome: Refinement | SageError | None = None

    @property
    def done(self) -> bool:
        return self._outcome is not None

    def result(self) -> Refinement:
        """The answer; works the loop until it is there. Raises RefusedError or EngineError when there will be none."""
        while self._outcome is None:
            self.loop.work()
        if isinstance(self._outcome, SageError):
            raise self._outcome
        return self._outcome

    def cancel(self) -> bool:
        """Give the request up. False when it is done already."""
        return self.loop.cancel(self)


@dataclass(eq=False)
class Flight:
    """A request in flight: what the scheduler need not know."""

    ticket: Ticket
    plugin: Plugin[Any]
    state: Any
    policy: Policy
    accepts: Policy | None
    entity_id: str
    arrived: float
    trace: npt.NDArray[np.float32]
    energies: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    began: float = 0.0
    atp: float = 0.0
    time_ms: float = 0.0
    energy_mJ: float = 0.0

    def history(self, now: float) -> History:
        steps = len(self.energies)
        elapsed = np.array([(now - self.began) * 1e3])
        return History(self.trace[None], np.array([steps], np.int64), elapsed, self.plugin.signals)

    def add(self, row: Sequence[float]) -> None:
        steps = len(self.energies)
        if steps == len(self.trace):
            self.trace = np.concatenate((self.trace, np.full_like(self.trace, np.nan)))
        self.trace[steps] = row
        self.energies.append(float(row[0]))


Rows = Mapping[int, Sequence[Sequence[float]]]


class Recorder:
    """What the loop tells of itself, for `recording`; this one keeps nothing."""

    def starting(self) -> None:
        """A submission, a tick or a cancellation begins."""

    def submitted(
        self, task: Task, observation: Observation, halt: str, entity_id: str, deadline_ms: float | None
    ) -> None:
        """halt: the text of the whole policy."""

    def ticked(self, decision: Decision, outcome: Outcome, results: Mapping[int, Result], rows: Rows) -> None:
        """rows: energy and signals after each step that was taken, by request."""

    def cancelled(self, number: int) -> None:
        pass
