"""Slots of one engine for requests that step in changing company.

The pool steps all its slots at every tick. Here a scheduler names the requests that step next, and the others wait. Seats
that step together form a *company*: they share one state of the engine, and as long as the same ones go on, nothing moves. A
large image has more tiles than an engine has slots, so there may be several companies. Where a company changes, those who
stay are selected on the device, those who leave are *parked* (their context and carry are read to the host), and those who
come are encoded, or restored from where they were parked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sage_edge.engines.accelerator import OutOfMemoryError
from sage_edge.engines.runner import Runner, State
from sage_edge.errors import EngineError, InputError
from sage_edge.specs import Array

COMPANIES = 8


@dataclass(eq=False)
class Seat:
    """One slot's worth of a request: resident in a row of a company, parked, or not encoded yet.

    observation: arrays [1, ...] until encoded. parked: context and carry [1, ...] while not resident. signals float32 [k]:
    after its last step, NaN before the first. lost: an engine error took its state.
    """

    observation: dict[str, Array] | None
    parked: dict[str, Array] | None
    signals: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    company: Company | None = None
    row: int = 0
    lost: bool = False


@dataclass(eq=False)
class Company:
    """Seats that step together. state: the engine's, None before the first step; seats: in order of their rows."""

    state: State | None = None
    seats: list[Seat] = field(default_factory=list)


class SlotBank:
    """The seats of one active runner. companies: at most so many states at once; fewer where the device has no memory."""

    def __init__(self, runner: Runner, companies: int = COMPANIES) -> None:
        self.runner = runner
        self.limit = companies
        self._companies: list[Company] = []  # least recently used first

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
        """One step for each seat, in few calls of the engine; `Seat.signals` are new afterwards.

        Raises what the engine raises; the seats of that call are lost then.
        """
        self._require_all(seats)
        parts, homeless = self._by_company(seats)
        parts.sort(key=len)
        needed = -(-len(seats) // self.runner.slots)
        while len(parts) > needed:  # small companies dissolve
            for seat in (smallest := parts.pop(0)):
                self._park(seat)
            homeless += smallest
        for part in parts:  # who comes sits down where there is room
            room = self.runner.slots - len(part)
            part += homeless[:room]
            del homeless[:room]
        for part in (*parts, *self._calls(homeless)):
            company = next((seat.company for seat in part if seat.company is not None), None) or self._new_company()
            with self._losing(company, part):
                signals = self.runner.refine(self._arrange(company, part))
            for seat in part:
                seat.signals = signals[seat.row].copy()

    def decode(self, seats: Sequence[Seat], names: Sequence[str] = ("prediction",)) -> dict[str, Array]:
        """Outputs of the decode graph, [len(seats), ...]. Raises what the engine raises; seats that were being
        filled are lost then."""
        self._require_all(seats)
        parts, homeless = self._by_company(seats)
        found: dict[Seat, dict[str, Array]] = {}
        for part in (*parts, *self._calls(homeless)):
            # Residents are decoded where they are, along with their neighbours.
            company = part[0].company or self._new_company()
            if part[0].company is None or company.state is None:
                with self._losing(company):
                    self._arrange(company, part)
            assert company.state is not None
            decoded = self.runner.decode(company.state, names)
            found |= {seat: {name: array[seat.row] for name, array in decoded.items()} for seat in part}
        return {name: np.stack([found[seat][name] for seat in seats]) for name in names}

    def pack(self, seats: Sequence[Seat]) -> dict[str, Array]:
        """Context and carry of the seats, [len(seats), ...]; those who are resident stay where they are. Raises as `decode`."""
        self._require_all(seats)
        for part in self._calls([seat for seat in seats if seat.observation is not None]):
            company = self._new_company()
            with self._losing(company):
                self._arrange(company, part)
        each = [self._read(seat) for seat in seats]
        return {name: np.concatenate([arrays[name] for arrays in each]) for name in each[0]}

    def release(self, seats: Sequence[Seat]) -> None:
        """The seats are not needed any more."""
        for seat in seats:
            if seat.company is not None:
                seat.company.seats.remove(seat)
        self._lose(seats)

    def _require_all(self, seats: Iterable[Seat]) -> None:
        if any(seat.lost for seat in seats):
            raise EngineError("the request's state was lost in an engine error, or released")

    def _by_company(self, seats: Sequence[Seat]) -> tuple[list[list[Seat]], list[Seat]]:
        """The seats of each company that has some of them, and those of none."""
        parts: dict[Company, list[Seat]] = {}
        for seat in seats:
            if seat.company is not None:
                parts.setdefault(seat.company, []).append(seat)
        return list(parts.values()), [seat for seat in seats if seat.company is None]

    def _calls(self, seats: list[Seat]) -> list[list[Seat]]:
        """As many at a time as the engine takes."""
        size = self.runner.slots
        return [seats[start : start + size] for start in range(0, len(seats), size)]

    def _park(self, seat: Seat) -> None:
        seat.parked = self._read(seat)
        assert seat.company is not None
        seat.company.seats.remove(seat)
        seat.company = None

    def _park_all(self, company: Company) -> None:
        for seat in list(company.seats):
            self._park(seat)

    def _read(self, seat: Seat) -> dict[str, Array]:
        if seat.company is None or seat.company.state is None:
            assert seat.parked is not None
            return seat.parked
        return self.runner.read(seat.company.state, [seat.row])

    def _new_company(self) -> Company:
        """An empty one: unused, new, or the least recently used one after its seats were parked."""
        company = next((c for c in self._companies if not c.seats), None)
        if company is None and len(self._companies) < self.limit:
            company = Company()
            self._companies.append(company)
        if company is None:
            company = self._companies[0]
            self._park_all(company)
        return company

    def _arrange(self, company: Company, seats: list[Seat]) -> State:
        """The company's state in which exactly `seats` are resident. Nobody of them is resident in another."""
        self._companies.remove(company)
        self._companies.append(company)
        stay = [seat for seat in company.seats if seat in seats]
        if company.state is not None and len(stay) == len(company.seats) == len(seats):
            return company.state
        for seat in [seat for seat in company.seats if seat not in seats]:
            self._park(seat)
        shape = next(size for size in self.runner.shapes if size >= len(seats))
        if stay:
            old, rows = company.state, [seat.row for seat in stay]
            assert old is not None
            company.state = self._make(company, lambda: self.runner.select(old, rows, shape))
        elif company.state is None or company.state.slots != shape:
            company.state = None
            company.state = self._make(company, lambda: self.runner.empty(shape))
        # else nobody stays: every row in use is overwritten below
        come = [seat for seat in seats if seat.company is None]
        company.seats = [*stay, *come]
        for row, seat in enumerate(company.seats):
            seat.company, seat.row = company, row
        self._fill(company.state, come)
        return company.state

    def _make(self, company: Company, make: Callable[[], State]) -> State:
        """What `make` makes for `company`; where memory does not suffice, the states of others are given up one by one."""
        while True:
            try:
                return make()
            except OutOfMemoryError:
                other = next((c for c in self._companies if c is not company), None)
                if other is None:
                    raise
                self._park_all(other)
                self._companies.remove(other)
                other.state = None
                self.limit = len(self._companies)

    def _fill(self, state: State, come: list[Seat]) -> None:
        fresh = [seat for seat in come if seat.observation is not None]
        if fresh:
            parts = [seat.observation for seat in fresh if seat.observation is not None]
            together = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            self.runner.admit(state, [seat.row for seat in fresh], together)
        parked = [seat for seat in come if seat.parked is not None]
        if parked:
            held = [seat.parked for seat in parked if seat.parked is not None]
            arrays = {name: np.concatenate([part[name] for part in held]) for name in held[0]}
            self.runner.restore(state, [seat.row for seat in parked], arrays)
        for seat in come:
            seat.observation = seat.parked = None

    @contextmanager
    def _losing(self, company: Company, seats: Sequence[Seat] = ()) -> Iterator[None]:
        """An error inside leaves rows that hold nobody's state: all who sit there are lost, and `seats`."""
        try:
            yield
        except Exception:
            lost = {*company.seats, *seats}
            company.state, company.seats = None, []
            self._lose(lost)
            raise

    def _lose(self, seats: Iterable[Seat]) -> None:
        for seat in seats:
            seat.company = seat.observation = seat.parked = None
            seat.lost = True
