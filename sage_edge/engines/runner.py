"""The runner contract: what every engine does, whatever it runs on.

    with open_engine(path) as runner:
        state = runner.encode(observation)      # n requests become n slots; the carry stays where the engine runs
        signals = runner.refine(state)          # one step for every slot; float32 [n, k] comes back
        prediction = runner.decode(state, ("prediction",))

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
    """Slots in flight: n of them, and the engine's own handle on their context and carry."""

    slots: int
    handle: Any


class Runner(ABC):
    """One engine. Not thread-safe; use one runner a thread.

    Raises RuntimeError when used outside `activate` / `deactivate`: that is a bug in the caller, not bad input.
    """

    def __init__(self, model: ModelSpec, slots: int) -> None:
        self.model = model
        self.slots = slots
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

    def encode(self, observation: dict[str, Array]) -> State:
        """Admit n requests, 1 <= n <= slots. Raises InputError for arrays that do not fit the model's observation."""
        checked = self.model.validate_observation(observation)
        count = len(next(iter(checked.values())))
        if count > self.slots:
            raise InputError(f"{count} requests at once, but this engine has {self.slots} slots; send fewer at a time")
        self._require_active()
        return State(count, self._encode(checked, count))

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

    def select(self, state: State, rows: Sequence[int]) -> State:
        """A state of the given slots, in that order; the old state must not be used any more."""
        self._require_active()
        if not rows or not all(0 <= row < state.slots for row in rows):
            raise InputError(f"slots {list(rows)} are not within 0..{state.slots - 1}")
        return State(len(rows), self._select(state.handle, list(rows)))

    def read(self, state: State) -> dict[str, Array]:
        """A copy of context and carry on the host, by name; for checks and snapshots."""
        self._require_active()
        return self._read(state.handle)

    def write(self, arrays: dict[str, Array]) -> State:
        """A state from context and carry as `read` gives them. Raises InputError for arrays that do not fit."""
        specs = (*self.model.context, *self.model.carry)
        if set(arrays) != {spec.name for spec in specs}:
            raise InputError(f"state: expected the arrays {', '.join(s.name for s in specs)}, found {sorted(arrays)}")
        checked = {spec.name: spec.validate(arrays[spec.name], "state") for spec in specs}
        counts = {len(array) for array in checked.values()}
        if len(counts) != 1:
            raise InputError(f"state: the arrays disagree on the number of slots: {sorted(counts)}")
        self._require_active()
        return State(counts.pop(), self._write(checked))

    def _require_active(self) -> None:
        if not self._active:
            raise RuntimeError("the runner is not active; use `with runner:` or call activate() first")

    @abstractmethod
    def _activate(self) -> None: ...

    @abstractmethod
    def _deactivate(self) -> None: ...

    @abstractmethod
    def _encode(self, observation: dict[str, Array], count: int) -> Any: ...

    @abstractmethod
    def _refine(self, handle: Any) -> npt.NDArray[np.float32]: ...

    @abstractmethod
    def _decode(self, handle: Any, names: tuple[str, ...]) -> dict[str, Array]: ...

    @abstractmethod
    def _select(self, handle: Any, rows: list[int]) -> Any: ...

    @abstractmethod
    def _read(self, handle: Any) -> dict[str, Array]: ...

    @abstractmethod
    def _write(self, arrays: dict[str, Array]) -> Any: ...
