"""The Iterative Refinement Primitive: a plugin refines a state step by step, lowers an energy, and stops when it may.

    state = plugin.init_state(observation)
    for index in range(plugin.max_steps):
        state = plugin.project(plugin.step(state, index))
        energy = plugin.energy(state)          # lower is better
        if plugin.halt(history, policy):       # a reason, or "" to go on
            break
    answer = plugin.result(state)

Those lines are all there is to it; `irp.loop` runs them for many requests of many plugins on one device. A plugin is plain
Python over whatever state it likes (`Plugin`), or an engine's encode, refine and decode graphs (`irp.engine.EnginePlugin`).
What must be written: `init_state`, `step`, `energy`, `result`. `sage-edge plugin check` judges the rest.

The protocol follows IRP 1.0 (dp-web4/HRM, docs/how/IRP_PROTOCOL.md): four declared invariants and the methods init_state,
step, energy, project, halt and emit_telemetry. Ours are: `result`; policies and certificates for `halt`; `commit`, the one
place where a plugin may change what outlives a request; `pack` and `unpack`, so that a state can be kept and moved.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Generic, TypeVar, cast

import numpy as np

from sage_edge.errors import InputError
from sage_edge.irp.certificate import CERTIFIED, Certificate, uses_certificate
from sage_edge.irp.halting import History, Policy, limited
from sage_edge.irp.spec import PluginSpec
from sage_edge.irp.telemetry import Moment, record
from sage_edge.irp.worth import WorthTable
from sage_edge.specs import Array

S = TypeVar("S")
P = TypeVar("P", bound="Plugin[Any]")
Observation = Mapping[str, Any]  # arrays, strings, numbers by name: one request, no axis of requests
Result = dict[str, Any]  # the same, of one answer
ENERGY = "energy"


@dataclasses.dataclass(frozen=True)
class Examples:
    """Observations with what is right for each, for calibration and bench. references[i] is whatever `quality` compares
    with. groups: a number an example by name, to break results down by (`holes`, `sigma`)."""

    observations: Sequence[Observation]
    references: Sequence[Any]
    groups: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = {len(self.observations), len(self.references), *map(len, self.groups.values())}
        if len(counts) != 1 or not self.observations:
            raise ValueError("observations, references and groups: expected as many of each, and at least one")

    def __len__(self) -> int:
        return len(self.observations)


class Plugin(ABC, Generic[S]):
    """One plugin, for any number of requests; a request lives in its state S alone. Not thread-safe.

    The loop calls `activate` before anything else and `deactivate` at the end. Steps must be deterministic, must not
    depend on other requests, and must not change anything but the state they return. They may change their argument:
    it is not used again.
    """

    # The dataclass that `pack` and `unpack` take apart and put together; not needed for arrays and dicts of arrays.
    state_type: ClassVar[type | None] = None
    # Signals beside the energy that halting policies may read (see `read_signals`): `changed`, `margin`, your own.
    extra_signals: tuple[str, ...] = ()

    def __init__(self, spec: PluginSpec) -> None:
        self.spec = spec
        # Set by who opened the plugin (`irp.registry`): what halting was certified as, what its steps are worth, a
        # digest that names its code, options and weights, the folder it was found in, and the options given beside plugin.yaml.
        self.certificate: Certificate | None = None
        self.worth: WorthTable | None = None
        self.digest = ""
        self.folder: Path | None = None
        self.options: dict[str, Any] = {}

    # --- what a plugin must write -------------------------------------------------------------------------------------

    @abstractmethod
    def init_state(self, observation: Observation) -> S:
        """The state before the first step. Raises InputError for an observation that does not fit, naming the field."""

    @abstractmethod
    def step(self, state: S, index: int) -> S:
        """One refinement step; index counts from 0."""

    @abstractmethod
    def energy(self, state: S) -> float:
        """How far from done, in the declared unit, lower is better; finite after every step, asked after steps only.

        It must not need what a robot does not have (the clean image, the true label), and must not change the state.
        """

    @abstractmethod
    def result(self, state: S) -> Result:
        """The best answer so far, by name: arrays, strings, numbers. May be asked after any step."""

    # --- what a plugin may write --------------------------------------------------------------------------------------

    def project(self, state: S) -> S:
        """The state made to fit its constraints, after every step. Must be idempotent. Default: as it is."""
        return state

    def read_signals(self, state: S) -> Sequence[float]:
        """The values of `extra_signals` after a step."""
        return ()

    def halt(self, history: History, policy: Policy) -> str:
        """Why this request stops now, or "" to go on. history: of this one request. Default: what the policy says.

        The loop stops a request at `max_steps` whatever is said here.
        """
        return policy.reasons(history)[0]

    def emit_telemetry(self, moment: Moment) -> dict[str, Any]:
        """The record of one step or of one finished request (docs/irp.md). A plugin may add numbers under `extra`."""
        return record(self.spec.name, moment)

    def contribution(self, energies: Sequence[float]) -> float:
        """What a finished request did for the system, about -1..1; `energies` after each step.

        Default (ours): the share of the untouched energy that is gone, which may be negative for a result that is worse
        than knowing nothing.
        """
        span = self.spec.energy_range
        return max(-1.0, min(1.0, (span.untouched - energies[-1]) / (span.untouched - span.best)))

    def commit(self, state: S, reason: str) -> None:
        """Called once, when a request is answered: the only place to change what outlives it (a memory, a map).

        Never called for a request that was cancelled, failed, or ran out of its deadline before the first step.
        """

    def release(self, state: S) -> None:
        """The state is not needed any more, however the request ended."""

    def samples(self, count: int) -> list[Observation]:
        """`count` observations for `sage-edge plugin check`. Default: the first calibration examples."""
        if self.spec.bench is None:
            raise InputError(f"plugin {self.spec.name}: write samples(count), or name a bench dataset in plugin.yaml")
        return list(self.examples(self.spec.bench.calibration, count).observations)

    def examples(self, source: str, limit: int | None = None) -> Examples:
        """The first `limit` examples of what plugin.yaml names under `bench`. Raises InputError when there are none."""
        raise InputError(f"plugin {self.spec.name}: cannot read {source!r}: it has no examples(source, limit)")

    def quality(self, result: Result, reference: Any) -> float:
        """How good a result is, higher is better, in the unit named in plugin.yaml."""
        raise InputError(f"plugin {self.spec.name}: has no quality(result, reference)")

    def weights_digest(self) -> str:
        """Names what the plugin loads from outside of its folder (weights, an engine); "" for nothing."""
        return ""

    def activate(self) -> None:
        """Load what the plugin needs: engines, tables, the store. May be called twice."""

    def deactivate(self) -> None:
        """Give it back, and write the store. May be called twice."""

    # --- steps of several requests at once ----------------------------------------------------------------------------

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """How many requests one call of `step_many` may carry, rising; the scheduler learns the cost of each."""
        return (1,)

    def step_many(self, states: Sequence[S], indices: Sequence[int]) -> list[S]:
        """One step for each state, which may stand at different steps. Default: one after the other."""
        return [self.step(state, index) for state, index in zip(states, indices, strict=True)]

    # --- a state as plain arrays --------------------------------------------------------------------------------------

    def pack(self, state: S) -> dict[str, Array]:
        """The state as named arrays, enough for `unpack` to go on from there, in this or another process.

        Default: for a dict of arrays, an array, or a dataclass `state_type` of arrays, numbers, booleans and strings.
        """
        if isinstance(state, np.ndarray):
            return {"state": state.copy()}
        if isinstance(state, dict):
            return {str(name): np.array(value) for name, value in state.items()}
        if self.state_type is not None and isinstance(state, self.state_type):
            return {f.name: _to_array(getattr(state, f.name)) for f in dataclasses.fields(state)}  # type: ignore[arg-type]
        raise NotImplementedError(
            f"{type(self).__name__}: set state_type to the state's dataclass, or write pack and unpack"
        )

    def unpack(self, arrays: dict[str, Array]) -> S:
        """The state that `pack` took apart."""
        if self.state_type is not None:
            hints = {f.name: f.type for f in dataclasses.fields(self.state_type)}
            values = {name: _from_array(arrays[name], str(hint)) for name, hint in hints.items()}
            return cast(S, self.state_type(**values))
        if set(arrays) == {"state"}:
            return cast(S, arrays["state"].copy())
        return cast(S, {name: array.copy() for name, array in arrays.items()})

    # --- what follows from the above ----------------------------------------------------------------------------------

    @property
    def max_steps(self) -> int:
        return self.spec.max_steps

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the columns of a request's trace: the energy, then `extra_signals`."""
        return (ENERGY, *self.extra_signals)

    @property
    def default_halt(self) -> str:
        """`certified` for a plugin with a certificate, else what plugin.yaml says."""
        return CERTIFIED if self.certificate else self.spec.halt

    def policy(self, halt: str | Policy | None = None) -> Policy:
        """The policy that `halt` names (None: the default), never beyond `max_steps`.

        Raises InputError, also for `certified` when the plugin has no certificate.
        """
        halt = self.default_halt if halt is None else halt
        if isinstance(halt, str) and uses_certificate(halt):
            if self.certificate is None:
                raise InputError(
                    f"halting policy {halt!r}: plugin {self.spec.name} has no certificate; `sage-edge plugin calibrate "
                    f"{self.spec.name}` makes one"
                )
            halt = self.certificate.expand(halt)
        return limited(halt, self.max_steps)

    def __enter__(self: P) -> P:
        self.activate()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.deactivate()


def _to_array(value: Any) -> Array:
    array: Array = np.array(list(value.encode()), np.uint8) if isinstance(value, str) else np.array(value)
    if array.dtype.kind not in "biuf":
        raise NotImplementedError(f"a {type(value).__name__} in a state cannot be packed; write pack and unpack")
    return array


def _from_array(array: Array, hint: str) -> Any:
    """A field's value again; its annotation tells numbers and strings from arrays."""
    kind = hint.removeprefix("<class '").removesuffix("'>")
    if kind == "str":
        return array.astype(np.uint8).tobytes().decode()
    numbers = {"int": int, "float": float, "bool": bool}
    return numbers[kind](array) if kind in numbers else array.copy()
