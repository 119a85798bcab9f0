"""The runner contract: what every engine does, whatever it runs on.

    with open_engine(path) as runner:
        state = runner.encode(observation)      # n requests become n slots; the carry stays where the engine runs
        signals = runner.refine(state)          # one step for every slot; float32 [n, k] comes back
        prediction = runner.decode(state, ("prediction",))
        state = runner.select(state, [2, 0], 4) # two slots go on in a state of four; the other two are free
        runner.admit(state, [2, 3], newcomers)  # and are taken by two new requests

What a slot computes depends on its own content and on the number of slots of its state, not on its row nor on its
neighbours: bit for bit (tests/conformance). A free slot is computed along; nobody reads it.

Public methods check, `_`-methods work; making a runner touches neither files nor devices (after Polygraphy's runners).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from sage_edge.errors import InputError
from sage_edge.specs import Array, ModelSpec

R = TypeVar("R", bound="Runner")


@dataclass(eq=False)
class State:
    """Slots in flight: how many, and the engine's own handle on their context and carry."""

    slots: int
    handle: Any


class Runner(ABC):
    """One engine. Not thread-safe; use one runner a thread.

    slots: the largest state. shapes: the sizes of state worth using, rising, the last one `slots`. digest: hex SHA-256
    that names the model; states may be carried between runners of the same digest (`read`, `restore`).
    Raises RuntimeError when used outside `activate` / `deactivate`: that is a bug in the caller, not bad input.
    """

    def __init__(self, model: ModelSpec, slots: int, digest: str) -> None:
        self.model = model
        self.slots = slots
        self.digest = digest
        self.shapes = (*(1 << power for power in range((slots - 1).bit_length())), slots)
        self._active = False

    def __enter__(self: R) -> R:
        self.activate()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.deactivate()

    def activate(self) -> None:
        """Load the engine; does nothing when it is loaded already."""
        if not self._active:
            self._activate()
            self._active = True

    def deactivate(self) -> None:
        """Give back everything the engine holds; states made by it are void. May be called twice."""
        if self._active:
            self._active = False
            self._deactivate()

    def empty(self, slots: int) -> State:
        """A state whose slots are all free (zeros), 1 <= slots <= self.slots."""
        if not 1 <= slots <= self.slots:
            raise InputError(f"{slots} requests at once, but this engine has {self.slots} slots; send fewer at a time")
        self._require_active()
        return State(slots, self._empty(slots))

    def encode(self, observation: dict[str, Array]) -> State:
        """Admit n requests, 1 <= n <= slots. Raises InputError for arrays that do not fit the model's observation."""
        checked = self.model.validate_observation(observation)
        state = self.empty(len(next(iter(checked.values()))))
        self._admit(state.handle, list(range(state.slots)), checked)
        return state

    def admit(self, state: State, rows: Sequence[int], observation: dict[str, Array]) -> None:
        """Put n requests into the n given slots: their context and carry are overwritten in full, no others change.

        Raises InputError for arrays that do not fit the model's observation, or rows that are not n different slots.
        """
        checked = self.model.validate_observation(observation)
        self._check_rows(state, rows, len(next(iter(checked.values()))))
        self._require_active()
        self._admit(state.handle, list(rows), checked)

    def refine(self, state: State) -> npt.NDArray[np.float32]:
        """One step for every slot, in place. Returns the signals, float32 [slots, k], valid until the next call."""
        self._require_active()
        return self._refine(state.handle)

    def decode(self, state: State, names: Sequence[str] = ("prediction",)) -> dict[str, Array]:
        """The named outputs of the decode graph for every slot. Raises InputError for a name that it does not give."""
        known = [spec.name for spec in self.model.prediction]
        if unknown := [name for name in names if name not in known]:
            raise InputError(f"output {unknown[0]!r} is not given by this model; it gives {', '.join(known)}")
        self._require_active()
        return self._decode(state.handle, tuple(names))

    def select(self, state: State, rows: Sequence[int], slots: int | None = None) -> State:
        """A state of `slots` slots (default: as many as `rows`) that begins with the given slots in that order.

        The others are free. The carry does not leave the device; the old state must not be used any more.
        """
        self._require_active()
        size = len(rows) if slots is None else slots
        if not rows or len(rows) > size or size > self.slots or not all(0 <= row < state.slots for row in rows):
            raise InputError(f"slots {list(rows)} are not within 0..{state.slots - 1}, or not 1..{size} of them")
        return State(size, self._select(state.handle, list(rows), size))

    def read(self, state: State, rows: Sequence[int] | None = None) -> dict[str, Array]:
        """A copy of context and carry of the given slots (default: all) on the host, by name; for checks, snapshots."""
        self._require_active()
        chosen = range(state.slots) if rows is None else rows
        self._check_rows(state, chosen, len(chosen))
        return self._read(state.handle, list(chosen))

    def write(self, arrays: dict[str, Array]) -> State:
        """A state from context and carry as `read` gives them. Raises InputError for arrays that do not fit."""
        checked = self.check_arrays(arrays)
        state = self.empty(len(next(iter(checked.values()))))
        self._write(state.handle, list(range(state.slots)), checked)
        return state

    def restore(self, state: State, rows: Sequence[int], arrays: dict[str, Array]) -> None:
        """Overwrite the given slots with context and carry as `read` gives them. Raises InputError as `admit` does."""
        checked = self.check_arrays(arrays)
        self._check_rows(state, rows, len(next(iter(checked.values()))))
        self._require_active()
        self._write(state.handle, list(rows), checked)

    def check_arrays(self, arrays: dict[str, Array]) -> dict[str, Array]:
        """Context and carry of n slots, checked. Raises InputError for arrays that do not fit the model."""
        specs = (*self.model.context, *self.model.carry)
        if set(arrays) != {spec.name for spec in specs}:
            raise InputError(f"state: expected the arrays {', '.join(s.name for s in specs)}, found {sorted(arrays)}")
        checked = {spec.name: spec.validate(arrays[spec.name], "state") for spec in specs}
        counts = {len(array) for array in checked.values()}
        if len(counts) != 1:
            raise InputError(f"state: the arrays disagree on the number of slots: {sorted(counts)}")
        return checked

    @staticmethod
    def _check_rows(state: State, rows: Sequence[int], count: int) -> None:
        if len(rows) != count or len(set(rows)) != count or not all(0 <= row < state.slots for row in rows):
            raise InputError(f"slots {list(rows)} are not {count} different ones within 0..{state.slots - 1}")

    def _require_active(self) -> None:
        if not self._active:
            raise RuntimeError("the runner is not active; use `with runner:` or call activate() first")

    @abstractmethod
    def _activate(self) -> None: ...

    @abstractmethod
    def _deactivate(self) -> None: ...

    @abstractmethod
    def _empty(self, slots: int) -> Any: ...

    @abstractmethod
    def _admit(self, handle: Any, rows: list[int], observation: dict[str, Array]) -> None: ...

    @abstractmethod
    def _refine(self, handle: Any) -> npt.NDArray[np.float32]: ...

    @abstractmethod
    def _decode(self, handle: Any, names: tuple[str, ...]) -> dict[str, Array]: ...

    @abstractmethod
    def _select(self, handle: Any, rows: list[int], slots: int) -> Any: ...

    @abstractmethod
    def _read(self, handle: Any, rows: list[int]) -> dict[str, Array]: ...

    @abstractmethod
    def _write(self, handle: Any, rows: list[int], arrays: dict[str, Array]) -> None: ...
