"""Slots of one engine for requests that step in changing company.

The pool steps all its slots at every tick. Here a scheduler names the requests that step next, and the others wait. Those
that step are *resident*: they share one state of the engine, and as long as the same ones go on, nothing moves. When others
take their turn, the ones that stay are selected on the device, the ones that leave are *parked* (their context and carry are
read to the host), and the ones that come are encoded, or restored from where they were parked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sage_edge.engines.runner import Runner, State
from sage_edge.errors import EngineError, InputError
from sage_edge.specs import Array


@dataclass(eq=False)
class Seat:
    """One slot's worth of a request: resident in a row, parked, or not encoded yet.

    observation: arrays [1, ...] until encoded. parked: context and carry [1, ...] while not resident. signals float32 [k]:
    after its last step, NaN before the first. lost: an engine error took its state.
    """

    observation: dict[str, Array] | None
    parked: dict[str, Array] | None
    signals: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    row: int | None = None
    lost: bool = False


class SlotBank:
    """The seats of one active runner."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._state: State | None = None
        self._resident: list[Seat | None] = []

    def take(self, observation: dict[str, Array]) -> list[Seat]:
        """Seats for n slots (arrays [n, ...], checked here); they are encoded with the first step that they take part in.

        Raises InputError for arrays that do not fit the model's observation.
        """
        checked = self.runner.model.validate_observation(observation, "observation")
        count = len(next(iter(checked.values())))
        return [
            self._seat({name: array[row : row + 1] for name, array in checked.items()}, None) for row in range(count)
        ]

    def restore(self, arrays: dict[str, Array], signals: npt.NDArray[np.float32]) -> list[Seat]:
        """Seats that go on from `pack`. Raises InputError for arrays that do not fit the model."""
        checked = self.runner.check_arrays(arrays)
        count = len(next(iter(checked.values())))
        if signals.shape != (count, len(self.runner.model.signals)):
            raise InputError(f"state: signals of shape {signals.shape} for {count} slots do not fit the model")
        seats = [
            self._seat(None, {name: array[row : row + 1] for name, array in checked.items()}) for row in range(count)
        ]
        for seat, row in zip(seats, signals, strict=True):
            seat.signals = row.astype(np.float32)
        return seats

    def _seat(self, observation: dict[str, Array] | None, parked: dict[str, Array] | None) -> Seat:
        return Seat(observation, parked, np.full(len(self.runner.model.signals), np.nan, np.float32))

    def refine(self, seats: Sequence[Seat]) -> None:
        """One step for each seat, in as few calls of the engine as its slots allow; `Seat.signals` are new afterwards.

        Raises what the engine raises; the seats of that call are lost then.
        """
        for part in self._parts(seats):
            try:
                state = self._arrange(part)
                signals = self.runner.refine(state)
            except Exception:
                self._lose()
                raise
            for seat in part:
                assert seat.row is not None
                seat.signals = signals[seat.row].copy()

    def decode(self, seats: Sequence[Seat], names: Sequence[str] = ("prediction",)) -> dict[str, Array]:
        """Outputs of the decode graph, [len(seats), ...]."""
        found: dict[str, list[Array]] = {name: [] for name in names}
        for part in self._parts(seats):
            # Seats that are all resident are decoded where they are, along with their neighbours.
            state = self._state if self._state and all(s.row is not None for s in part) else self._arrange(part)
            decoded = self.runner.decode(state, names)
            rows = [seat.row for seat in part if seat.row is not None]
            for name, array in decoded.items():
                found[name].append(array[rows])
        return {name: np.concatenate(arrays) for name, arrays in found.items()}

    def pack(self, seats: Sequence[Seat]) -> dict[str, Array]:
        """Context and carry of the seats, [len(seats), ...]; they stay where they are."""
        if any(seat.observation is not None for seat in seats):
            for part in self._parts(seats):
                self._arrange(part)
        each = [self._read(seat) for seat in seats]
        return {name: np.concatenate([arrays[name] for arrays in each]) for name in each[0]}

    def release(self, seats: Sequence[Seat]) -> None:
        """The seats are not needed any more."""
        for seat in seats:
            if seat.row is not None:
                self._resident[seat.row] = None
            seat.row = seat.observation = seat.parked = None
            seat.lost = True

    def _parts(self, seats: Sequence[Seat]) -> list[list[Seat]]:
        if any(seat.lost for seat in seats):
            raise EngineError("the request's state was lost in an engine error, or released")
        size = self.runner.slots
        return [list(seats[start : start + size]) for start in range(0, len(seats), size)]

    def _read(self, seat: Seat) -> dict[str, Array]:
        if seat.row is None:
            if seat.parked is None:
                raise EngineError("the request's state was lost in an engine error, or released")
            return seat.parked
        assert self._state is not None
        return self.runner.read(self._state, [seat.row])

    def _arrange(self, seats: list[Seat]) -> State:
        """The state in which exactly `seats` are resident."""
        wanted = set(map(id, seats))
        resident = [seat for seat in self._resident if seat is not None]
        if self._state is not None and {id(seat) for seat in resident} == wanted:
            return self._state
        stay = [seat for seat in resident if id(seat) in wanted]
        for seat in resident:
            if id(seat) not in wanted:
                seat.parked = self._read(seat)
        shape = next(size for size in self.runner.shapes if size >= len(seats))
        if stay and self._state is not None:
            state = self.runner.select(self._state, [seat.row for seat in stay if seat.row is not None], shape)
        elif self._state is not None and self._state.slots == shape:
            state = self._state  # nobody stays: every row in use is overwritten below
        else:
            state = self.runner.empty(shape)
        come = [seat for seat in seats if seat not in stay]
        for seat in resident:
            seat.row = None
        self._state, self._resident = state, [*stay, *come, *[None] * (shape - len(seats))]
        for row, seat in enumerate((*stay, *come)):
            seat.row = row
        self._fill(state, come)
        return state

    def _fill(self, state: State, come: list[Seat]) -> None:
        fresh = [seat for seat in come if seat.observation is not None]
        if fresh:
            parts = [seat.observation for seat in fresh if seat.observation is not None]
            together = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            self.runner.admit(state, [seat.row for seat in fresh if seat.row is not None], together)
        parked = [seat for seat in come if seat.parked is not None]
        if parked:
            held = [seat.parked for seat in parked if seat.parked is not None]
            arrays = {name: np.concatenate([part[name] for part in held]) for name in held[0]}
            self.runner.restore(state, [seat.row for seat in parked if seat.row is not None], arrays)
        for seat in come:
            seat.observation = seat.parked = None

    def _lose(self) -> None:
        """After an engine error nothing in the engine's state can be relied on."""
        for seat in self._resident:
            if seat is not None:
                seat.lost, seat.row = True, None
        self._state, self._resident = None, []
