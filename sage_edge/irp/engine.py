"""A plugin over an engine: encode is `init_state`, refine is `step`, a function of the signals is `energy`.

    class Reason(EnginePlugin):
        def prepare(self, observation): ...     # one request as arrays [slots, ...]; most take one slot
        def finish(self, outputs, note): ...    # what decode gives, as a result

plugin.yaml names the engine under `options: engine:`; any bundle, model folder or shipped model will do, and is built when it
is missing. A request may take several slots (the tiles of a large image); they step together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sage_edge.engines.manifest import MANIFEST_FILE
from sage_edge.engines.runner import Runner
from sage_edge.errors import InputError
from sage_edge.files import sha256
from sage_edge.irp.certificate import load_certificate
from sage_edge.irp.plugin import ENERGY, Observation, Plugin, Result
from sage_edge.irp.slots import Seat, SlotBank
from sage_edge.irp.spec import PluginSpec
from sage_edge.specs import Array

SIGNALS = "signals"


@dataclass(eq=False)
class EngineState:
    """A request in an engine: its slots, and what `prepare` noted for `finish`."""

    seats: list[Seat]
    note: Any = None


class EnginePlugin(Plugin[EngineState]):
    """See the module. engine: what `sage_edge.load` takes. threads: CPU threads (default: the engine's own).

    energy_signal: the signal that is the energy, unless `energy_of` is written. outputs: of the decode graph. Give `runner`
    instead of an engine's name in tests.
    """

    energy_signal = "entropy_mean"
    outputs: tuple[str, ...] = ("prediction",)

    def __init__(
        self, spec: PluginSpec, engine: str = "", threads: int | None = None, runner: Runner | None = None
    ) -> None:
        super().__init__(spec)
        if runner is None and not engine:
            raise InputError(f"plugin {spec.name}: `engine` is missing from its options in plugin.yaml")
        self.engine, self.threads = engine, threads
        self._runner = runner
        self._bank: SlotBank | None = None

    # --- hooks --------------------------------------------------------------------------------------------------------

    def prepare(self, observation: Observation) -> tuple[dict[str, Array], Any]:
        """Arrays [slots, ...] of one request by the model's names, and a note for `finish`. Default: one slot, as it is."""
        return {name: np.asarray(value)[None] for name, value in observation.items()}, None

    def energy_of(self, signals: npt.NDArray[np.float32]) -> float:
        """The energy from the signals of the request's slots, float32 [slots, k]. Default: mean of `energy_signal`."""
        return float(signals[:, self.runner.model.signal(self.energy_signal)].mean())

    def finish(self, outputs: dict[str, Array], note: Any) -> Result:
        """The result from the decoded outputs [slots, ...]. Default: those of the only slot."""
        return {name: array[0] for name, array in outputs.items()}

    # --- the protocol -------------------------------------------------------------------------------------------------

    def init_state(self, observation: Observation) -> EngineState:
        missing = [s.name for s in self.runner.model.observation if s.name not in observation]
        try:
            arrays, note = self.prepare(observation)
        except KeyError as error:
            raise InputError(f"plugin {self.spec.name}: observation: {error} is missing (model: {missing})") from error
        return EngineState(self.bank.take(arrays), note)

    def step(self, state: EngineState, index: int) -> EngineState:
        return self.step_many([state], [index])[0]

    def step_many(self, states: Sequence[EngineState], indices: Sequence[int]) -> list[EngineState]:
        self.bank.refine([seat for state in states for seat in state.seats])
        return list(states)

    def energy(self, state: EngineState) -> float:
        return self.energy_of(np.stack([seat.signals for seat in state.seats]))

    def read_signals(self, state: EngineState) -> Sequence[float]:
        """The engine's own signals: of several slots their mean, but the largest of those that bound something from above
        (`changed`, `entropy_max`), so that "unchanged" means all slots."""
        table = np.stack([seat.signals for seat in state.seats])
        worst = [name in ("changed", "entropy_max") for name in self.runner.model.signals]
        return [float(v) for v in np.where(worst, table.max(axis=0), table.mean(axis=0))]

    def result(self, state: EngineState) -> Result:
        return self.finish(self.bank.decode(state.seats, self.outputs), state.note)

    def release(self, state: EngineState) -> None:
        self.bank.release(state.seats)

    def pack(self, state: EngineState) -> dict[str, Array]:
        """Context, carry and signals [slots, ...]. A plugin whose `prepare` notes something packs that as well."""
        if state.note is not None:
            raise NotImplementedError(f"{type(self).__name__}: its states hold a note; write pack and unpack for it")
        return self.pack_seats(state)

    def unpack(self, arrays: dict[str, Array]) -> EngineState:
        return self.unpack_seats(arrays)

    def pack_seats(self, state: EngineState) -> dict[str, Array]:
        """What `pack` is made of: everything but the note."""
        return {**self.bank.pack(state.seats), SIGNALS: np.stack([seat.signals for seat in state.seats])}

    def unpack_seats(self, arrays: dict[str, Array], note: Any = None) -> EngineState:
        if SIGNALS not in arrays:
            raise InputError("state: the array 'signals' is missing")
        rest = {name: array for name, array in arrays.items() if name != SIGNALS}
        return EngineState(self.bank.restore(rest, arrays[SIGNALS]), note)

    def samples(self, count: int) -> list[Observation]:
        """Calibration examples if there are any, else random ones within the model's specification."""
        if self.spec.bench is not None:
            return super().samples(count)
        drawn = self.runner.model.random_observation(count)
        return [{name: array[row] for name, array in drawn.items()} for row in range(count)]

    # --- the engine ---------------------------------------------------------------------------------------------------

    def activate(self) -> None:
        """Open the engine (building it when it is missing), and take over its certificate unless the plugin has one."""
        if self._bank is not None:
            return
        if self._runner is None:
            from sage_edge.engines.build import open_engine  # waits for onnx; `plugin ls` should not

            folder = self._folder()
            self._runner = open_engine(folder, self.threads)
            self.certificate = self.certificate or load_certificate(folder)
        self._runner.activate()
        if ENERGY in self._runner.model.signals:
            raise InputError(f"plugin {self.spec.name}: the model's signals already hold {ENERGY!r}; rename it there")
        self.extra_signals = self._runner.model.signals
        self._bank = SlotBank(self._runner)

    def weights_digest(self) -> str:
        """Digest of the engine's manifest, which holds those of all its files; builds the engine when it is missing."""
        return self._runner.digest if self._runner else sha256(self._folder() / MANIFEST_FILE)

    def _folder(self) -> Path:
        from sage_edge.models import engine_of  # the module that finds engines lies above this one

        return engine_of(self.engine)

    def deactivate(self) -> None:
        if self._runner is not None:
            self._runner.deactivate()
        self._bank = None

    @property
    def runner(self) -> Runner:
        if self._runner is None or self._bank is None:
            raise RuntimeError(f"plugin {self.spec.name} is not active; use `with plugin:` or call activate() first")
        return self._runner

    @property
    def bank(self) -> SlotBank:
        assert self.runner
        assert self._bank is not None
        return self._bank

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        return self.runner.shapes
