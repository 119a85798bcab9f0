"""Section "scheduler" of `sage-edge bench --suite irp`: rules for sharing one device, on one mixed load with deadlines.

The load: requests to three plugins (sudoku easy and hard, linear systems, sparse regression) arrive at random (Poisson), each
with a deadline and a halting policy certified on other data; every rule gets exactly the same requests. `load` is the
demand over the device's time if every request halted by its policy: above 1 not all can be done. With real plugins the
loop's own work counts to it: what a step takes of a request that has the loop to itself.

loss      fall of an answer's quality at its deadline against the same request at full steps, over the plugin's mean
          quality at full steps: 0 is as good as full steps, 1 as good as nothing. A step that ends after the deadline does
          not count, nor does an answer that never began.
misses    share of requests that had not halted by their policy when their deadline came

Simulated: the real loop and the real scheduler on a clock that only steps move, by stated costs; energies, signals and
qualities are those that the plugins really gave on the same held-out examples. Real: the same with plugins that work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sage_edge.errors import InputError, RefusedError
from sage_edge.irp.halting import History
from sage_edge.irp.measure import Recorded
from sage_edge.irp.plugin import Examples, Observation, Plugin, Result
from sage_edge.irp.profiles import Profile, find_profile
from sage_edge.irp.spec import PluginSpec
from sage_edge.irp.traces import steps_taken
from sage_edge.irp.worth import WorthTable
from sage_edge.sharing.clock import Clock, SimulatedClock, SystemClock
from sage_edge.sharing.costs import Costs
from sage_edge.sharing.loop import Loop
from sage_edge.sharing.requests import Ticket
from sage_edge.sharing.scheduler import Settings

LOADS = (0.7, 1.0, 1.5, 2.5)
SLACK = (1.5, 12.0)  # deadlines: times the plugin's mean time to halt, even on a logarithmic scale
# What a step costs by the simulated clock: stated, so that the section does not depend on the machine.
SIMULATED_MS = {"reason": 7.0, "solve": 1.0, "sparse": 1.5}
RULES = ("round-robin", "run-to-completion", "trust-proportional", "earliest-deadline", "worth")
BASE = "round-robin"
ALONE = 32  # requests that say what a step takes
Known = Literal["quality", "energy", "nothing"]  # what the worth of steps was learned from
WAYS: dict[str, tuple[str, Known]] = {
    **{rule: (rule, "quality") for rule in RULES},
    "worth, from energies alone": ("worth", "energy"),
    "worth, learning from nothing": ("worth", "nothing"),
}
Floats = npt.NDArray[np.float64]
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Contender:
    """One plugin of the load. recorded: its traces on the held-out examples; policy: certified on others, as text; step_ms:
    what a step costs. worth: learned on those others from their quality; worth_by_energy: from their energies alone."""

    name: str
    plugin: Plugin[Any]
    examples: Examples
    recorded: Recorded
    policy: str
    step_ms: float
    worth: WorthTable
    worth_by_energy: WorthTable

    @property
    def halting_ms(self) -> float:
        return self.step_ms * float(steps_taken(self.recorded.traces, self.policy).mean())


@dataclass(frozen=True)
class Arrival:
    plugin: str
    example: int
    at: float
    deadline_ms: float


class Traced(Plugin[dict[str, Any]]):
    """A plugin that gives what was recorded, while the clock moves by what a step costs."""

    def __init__(self, spec: PluginSpec, contender: Contender, clock: SimulatedClock) -> None:
        super().__init__(replace(spec, halt=contender.policy))
        self.extra_signals = contender.plugin.signals[1:]
        self._signals, self._clock, self._step_s = contender.recorded.traces.signals, clock, contender.step_ms / 1e3

    def init_state(self, observation: Observation) -> dict[str, Any]:
        if "example" not in observation:
            raise InputError("example: missing")
        return {"row": int(observation["example"]), "steps": 0}

    def step(self, state: dict[str, Any], index: int) -> dict[str, Any]:
        self._clock.advance(self._step_s)
        return {"row": state["row"], "steps": index + 1}

    def energy(self, state: dict[str, Any]) -> float:
        return float(self._signals[state["row"], state["steps"] - 1, 0])

    def read_signals(self, state: dict[str, Any]) -> Sequence[float]:
        return [float(v) for v in self._signals[state["row"], state["steps"] - 1, 1:]]

    def result(self, state: dict[str, Any]) -> Result:
        return {"steps": state["steps"]}


def draw_load(contenders: Sequence[Contender], load: float, seconds: float, rng: np.random.Generator) -> list[Arrival]:
    """Requests in order of arrival; every plugin has the same part in the demand."""
    arrivals = []
    for contender in contenders:
        rate = load / len(contenders) / contender.halting_ms * 1e3
        times = np.cumsum(rng.exponential(1 / rate, max(1, int(2 * rate * seconds) + 20)))
        for at in times[times < seconds]:
            slack = float(np.exp(rng.uniform(*np.log(SLACK))))
            example = int(rng.integers(len(contender.recorded)))
            arrivals.append(Arrival(contender.name, example, float(at), slack * contender.halting_ms))
    return sorted(arrivals, key=lambda arrival: arrival.at)


@dataclass(frozen=True)
class Served:
    """What one rule gave. steps: finished by each deadline. missed: not halted by then. late_ms: how long after its deadline
    a late answer came. stalled_s: the longest that a request was in flight without a step."""

    steps: npt.NDArray[np.int64]
    missed: npt.NDArray[np.bool_]
    late_ms: float
    deciding_ms: float


def serve(loop: Loop, arrivals: Sequence[Arrival], observation: Callable[[Arrival], Observation]) -> Served:
    """Drive a loop through the load; it is active."""
    clock, start = loop.clock, loop.clock.now()
    tickets: list[Ticket] = []
    while len(tickets) < len(arrivals) or not loop.idle:
        now = clock.now()
        while len(tickets) < len(arrivals) and start + arrivals[len(tickets)].at <= now:
            one = arrivals[len(tickets)]
            at = start + one.at
            tickets.append(loop.submit(one.plugin, observation(one), deadline_ms=one.deadline_ms, arrived=at))
        if loop.idle and len(tickets) < len(arrivals):
            clock.sleep_until(start + arrivals[len(tickets)].at)
        loop.work()
    return _served(tickets, arrivals, loop)


def _served(tickets: Sequence[Ticket], arrivals: Sequence[Arrival], loop: Loop) -> Served:
    steps, missed, late = [], [], [0.0]
    for ticket, arrival in zip(tickets, arrivals, strict=True):
        try:
            answer = ticket.result()
        except RefusedError:
            steps.append(0)
            missed.append(True)
            continue
        in_time = int((answer.step_ms <= arrival.deadline_ms).sum())
        steps.append(in_time)
        missed.append(answer.reason == "deadline" or in_time < answer.steps)
        late.append(max(0.0, answer.milliseconds - arrival.deadline_ms))
    deciding = loop.deciding_s / max(loop.ticks, 1) * 1e3
    return Served(np.array(steps), np.array(missed), max(late), deciding)


def losses(
    contenders: Mapping[str, Contender], arrivals: Sequence[Arrival], steps: npt.NDArray[np.int64]
) -> dict[str, Floats]:
    """Per request: `quality` and `energy`, each normalised as the module says (energy: over its fall from untouched)."""
    found: dict[str, list[float]] = {"quality": [], "energy": []}
    full = {name: float(c.recorded.quality[:, -1].mean()) for name, c in contenders.items()}
    fall = {name: 1 - float(c.recorded.energies[:, -1].mean()) for name, c in contenders.items()}
    for arrival, taken in zip(arrivals, steps, strict=True):
        recorded = contenders[arrival.plugin].recorded
        quality = np.concatenate(([0.0], recorded.quality[arrival.example]))
        energy = np.concatenate(([1.0], recorded.energies[arrival.example]))
        found["quality"].append((quality[-1] - quality[taken]) / full[arrival.plugin])
        found["energy"].append((energy[taken] - energy[-1]) / fall[arrival.plugin])
    return {name: np.array(values) for name, values in found.items()}


def simulate(contenders: Sequence[Contender], arrivals: Sequence[Arrival], rule: str, profile: Profile,
             known: Known = "quality") -> Served:  # fmt: skip
    """One rule on one load by the simulated clock. With nothing known of the worth of steps, it is learned on the way."""
    clock = SimulatedClock()
    plugins = {c.name: Traced(c.plugin.spec, c, clock) for c in contenders}
    costs = {c.name: Costs({1: c.step_ms}, {1: c.step_ms}) for c in contenders}
    tables = {
        "quality": {c.name: c.worth for c in contenders},
        "energy": {c.name: c.worth_by_energy for c in contenders},
    }
    worth = tables.get(known, {})
    with Loop(plugins, Settings(profile=profile, rule=rule, capacity=1 << 20), clock, worth=worth, costs=costs) as loop:
        return serve(loop, arrivals, lambda arrival: {"example": arrival.example})


def compare(contenders: Sequence[Contender], seconds: float, seeds: int, profile: str = "balanced",
            progress: Progress = lambda stage, done: None) -> dict[str, Any]:  # fmt: skip
    """The simulated comparison: every rule on every load, `seeds` times; means, and intervals over the seeds."""
    by_name = {c.name: c for c in contenders}
    rows = []
    for number, load in enumerate(LOADS):
        gathered: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for seed in range(seeds):
            progress(f"scheduler, simulated: load {load:g}", (number + seed / seeds) / len(LOADS))
            arrivals = draw_load(contenders, load, seconds, np.random.default_rng([number, seed]))
            for way, (rule, known) in WAYS.items():
                served = simulate(contenders, arrivals, rule, find_profile(profile), known)
                gathered[way].append(_scores(by_name, arrivals, served))
        for way, runs in gathered.items():
            rows.append({"load": load, "rule": way, **_against(runs, gathered[BASE])})
    return {
        "seconds": seconds, "seeds": seeds, "profile": profile, "slack": SLACK,
        "plugins": [{"plugin": c.name, "step_ms": c.step_ms, "policy": c.policy, "mean_ms_to_halt": c.halting_ms,
                     "examples": len(c.recorded)} for c in contenders],
        "rows": rows,
    }  # fmt: skip


def _scores(contenders: Mapping[str, Contender], arrivals: Sequence[Arrival], served: Served) -> dict[str, Any]:
    lost = losses(contenders, arrivals, served.steps)
    names = np.array([arrival.plugin for arrival in arrivals])
    return {
        "requests": len(arrivals),
        "loss": float(lost["quality"].mean()),
        "energy_loss": float(lost["energy"].mean()),
        "misses": float(served.missed.mean()),
        "never_began": float((served.steps == 0).mean()),
        "worst_plugin_loss": max(float(lost["quality"][names == name].mean()) for name in set(names.tolist())),
        "late_ms": served.late_ms,
        "deciding_ms": served.deciding_ms,
    }


def _against(runs: Sequence[Mapping[str, float]], base: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Means over seeds, and the change of the loss against the base with a 95 % interval (bootstrap over seeds, paired)."""
    means = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
    rng = np.random.default_rng(0)
    draws = rng.integers(len(runs), size=(2000, len(runs)))
    for key in ("loss", "energy_loss"):
        own, other = (np.array([run[key] for run in side]) for side in (runs, base))
        if other.mean() > 0:
            means[f"{key}_change"] = float(own.mean() / other.mean() - 1)
            ratios = own[draws].mean(1) / np.maximum(other[draws].mean(1), 1e-12) - 1
            means[f"{key}_change_low"], means[f"{key}_change_high"] = (
                float(v) for v in np.percentile(ratios, [2.5, 97.5])
            )
    return means


def run_real(contenders: Sequence[Contender], load: float, seconds: float, costs: Mapping[str, Costs], profile: str,
             progress: Progress) -> list[dict[str, Any]]:  # fmt: skip
    """Every rule in turn on one load, with plugins that work, on the system's clock; step_ms of each is `alone_ms`. The
    plugins are active."""
    by_name = {c.name: c for c in contenders}
    arrivals = draw_load(contenders, load, seconds, np.random.default_rng(0))
    rows = []
    for number, rule in enumerate(RULES):
        progress(f"scheduler, real engines: {rule}", number / len(RULES))
        clock: Clock = SystemClock()
        plugins = {c.name: _Kept(c) for c in contenders}
        settings = Settings(profile=find_profile(profile), rule=rule, capacity=1 << 20)
        worth = {c.name: c.worth for c in contenders}
        began = time.perf_counter()
        with Loop(plugins, settings, clock, worth=worth, costs=costs) as loop:
            served = serve(loop, arrivals, lambda a: by_name[a.plugin].examples.observations[a.example])
        scores = _scores(by_name, arrivals, served)
        rows.append({"load": load, "rule": rule, **scores, "wall_s": time.perf_counter() - began})
    base = next(row for row in rows if row["rule"] == BASE)["loss"]
    return [{**row, "loss_change": row["loss"] / base - 1 if base > 0 else None} for row in rows]


def alone_ms(contender: Contender, costs: Costs, profile: str) -> float:
    """Milliseconds of a step in a loop that serves one request after the other, all of the loop's own work included. The
    plugin is active."""
    settings = Settings(profile=find_profile(profile))
    chosen = contender.examples.observations[:ALONE]
    name = contender.name
    with Loop({name: _Kept(contender)}, settings, worth={name: contender.worth}, costs={name: costs}) as loop:
        loop.submit(name, chosen[0]).result()  # the first one wakes up what sleeps
        began = time.perf_counter()
        steps = sum(loop.submit(name, observation).result().steps for observation in chosen)
        return (time.perf_counter() - began) * 1e3 / steps


class _Kept(Plugin[Any]):
    """A plugin that stays active between loops and halts by the certified policy."""

    def __init__(self, contender: Contender) -> None:
        super().__init__(replace(contender.plugin.spec, halt=contender.policy))
        inner = contender.plugin
        self._inner, self.extra_signals = inner, inner.extra_signals
        self.init_state, self.step, self.energy = inner.init_state, inner.step, inner.energy  # type: ignore[method-assign]
        self.result, self.release = inner.result, inner.release  # type: ignore[method-assign]
        self.step_many, self.read_signals = inner.step_many, inner.read_signals  # type: ignore[method-assign]

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        return self._inner.batch_sizes

    def halt(self, history: History, policy: Any) -> str:
        return self._inner.halt(history, policy)

    def init_state(self, observation: Observation) -> Any: ...

    def step(self, state: Any, index: int) -> Any: ...

    def energy(self, state: Any) -> float: ...  # type: ignore[empty-body]

    def result(self, state: Any) -> Result: ...  # type: ignore[empty-body]
