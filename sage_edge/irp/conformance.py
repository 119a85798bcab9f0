"""The protocol's conformance suite: does this plugin keep what the loop, halting and the scheduler rely on?

Every check runs on the plugin's own samples and is told by its name, so that a plugin's author knows what to mend. A check
that the plugin answers with an exception fails with it. What cannot be checked from outside is said in docs/irp.md: that the
energy needs nothing a robot lacks, and that `commit` alone changes what outlives a request.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sage_edge.check import Finding
from sage_edge.errors import InputError
from sage_edge.irp.halting import History, Policy
from sage_edge.irp.plugin import Observation, Plugin
from sage_edge.irp.profiles import PROFILES
from sage_edge.irp.telemetry import Moment, Spent, problems
from sage_edge.specs import Array

SAMPLES = 4
RELATIVE, ABSOLUTE = (
    1e-4,
    1e-6,
)  # engines may differ in the last bits between batch sizes; nothing seeded here is smaller
Progress = Callable[[str], None]


@dataclass
class Subject:
    """The plugin, its samples, and one whole run of each."""

    plugin: Plugin[Any]
    observations: list[Observation]
    energies: list[list[float]] = field(default_factory=list)


def check_plugin(plugin: Plugin[Any], progress: Progress = lambda name: None) -> list[Finding]:
    """All findings on an active plugin, in the order of the protocol. Nothing is written."""
    subject = Subject(plugin, [])
    findings = []
    for name, check in CHECKS.items():
        progress(name)
        try:
            fault = check(subject)
        except Exception as error:  # whatever a plugin raises is the finding
            fault = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        findings.append(Finding(name, not fault, fault))
        if fault and name in ("samples", "energy finite"):
            break  # the others need them
    return findings


class Run:
    """One request, driven by hand."""

    def __init__(self, plugin: Plugin[Any], observation: Observation | None = None, state: Any = None) -> None:
        self.plugin = plugin
        self.state = plugin.init_state(observation) if observation is not None else state
        self.rows: list[list[float]] = []

    @property
    def energies(self) -> list[float]:
        return [row[0] for row in self.rows]

    def step(self, count: int = 1, first: int | None = None) -> Run:
        for _ in range(count):
            index = len(self.rows) if first is None else first + len(self.rows)
            self.take(self.plugin.step_many([self.state], [index])[0])
        return self

    def take(self, state: Any) -> None:
        self.state = self.plugin.project(state)
        self.rows.append([float(self.plugin.energy(self.state)), *map(float, self.plugin.read_signals(self.state))])

    def history(self) -> History:
        table = np.array(self.rows, np.float32)[None]
        return History(table, np.array([len(self.rows)], np.int64), np.zeros(1), self.plugin.signals)

    def stops(self, policy: Policy) -> str:
        return self.plugin.halt(self.history(), policy)


def _samples(subject: Subject) -> str:
    given = subject.plugin.samples(SAMPLES)
    if len(given) < 2:
        return f"samples({SAMPLES}) gives {len(given)} observations; at least 2 are needed"
    subject.observations = list(given[:SAMPLES])
    return ""


def _declared(subject: Subject) -> str:
    plugin = subject.plugin
    plugin.policy(plugin.spec.halt)
    lacking = [name for name in ("energy", *plugin.extra_signals) if name not in plugin.signals]
    if lacking or len(set(plugin.signals)) != len(plugin.signals):
        return f"signals {plugin.signals} lack {lacking} or hold a name twice"
    sizes = plugin.batch_sizes
    return (
        ""
        if sizes and sizes[0] == 1 and list(sizes) == sorted(set(sizes))
        else f"batch_sizes {sizes}: expected 1, rising"
    )


def _bad_input(subject: Subject) -> str:
    for wrong in ({}, {"no such field": 0}):
        try:
            state = subject.plugin.init_state(wrong)
        except InputError:
            continue
        except Exception as error:
            return f"init_state({wrong!r}) raises {type(error).__name__}, expected InputError: {error}"
        subject.plugin.release(state)
        return f"init_state({wrong!r}) is accepted, expected InputError"
    return ""


def _finite(subject: Subject) -> str:
    plugin, span = subject.plugin, subject.plugin.spec.energy_range
    for number, observation in enumerate(subject.observations):
        run = Run(plugin, observation).step(plugin.max_steps)
        plugin.release(run.state)
        subject.energies.append(run.energies)
        for step, energy in enumerate(run.energies, 1):
            if not math.isfinite(energy):
                return f"sample {number}, step {step}: the energy is {energy}"
            if energy < span.best - 1e-6 * (span.untouched - span.best):
                return f"sample {number}, step {step}: the energy {energy:g} is below energy_range.best, {span.best:g}"
        if len(run.rows[0]) != len(plugin.signals):
            return f"read_signals gives {len(run.rows[0]) - 1} values for the {len(plugin.signals) - 1} extra_signals"
    return ""


def _lower_is_better(subject: Subject) -> str:
    plugin, span = subject.plugin, subject.plugin.spec.energy_range
    first = [span.normalise(e[0]) for e in subject.energies]
    last = [span.normalise(e[-1]) for e in subject.energies]
    if float(np.mean(last)) >= 1:
        return "after all steps the energy is not below energy_range.untouched: nothing was refined"
    if plugin.max_steps > 1 and max(first) > 0 and float(np.mean(last)) >= float(np.mean(first)):
        return f"over {plugin.max_steps} steps the mean normalised energy goes from {np.mean(first):.4g} to {np.mean(last):.4g}"
    return _agrees_with_quality(subject) if plugin.spec.bench and plugin.max_steps > 1 else ""


def _agrees_with_quality(subject: Subject) -> str:
    """Of two steps of one example with different quality, the better one has the lower energy, more often than not."""
    plugin = subject.plugin
    assert plugin.spec.bench is not None
    try:
        examples = plugin.examples(plugin.spec.bench.calibration, 2 * SAMPLES)
    except InputError:
        return ""  # data that may not be passed on is not on every machine; `plugin calibrate` says what is missing
    agree, pairs = 0.0, 0
    for observation, reference in zip(examples.observations, examples.references, strict=True):
        run, quality = Run(plugin, observation), []
        for _ in range(plugin.max_steps):
            run.step()
            quality.append(plugin.quality(plugin.result(run.state), reference))
        plugin.release(run.state)
        energy = np.array(run.energies)
        better = np.subtract.outer(quality, quality) > 0
        lower = np.subtract.outer(energy, energy)
        pairs += int(better.sum())
        agree += float(((lower < 0) + 0.5 * (lower == 0))[better].sum())
    return (
        f"of {pairs} pairs of steps, the better one has the lower energy in {agree / pairs:.0%}"
        if agree < pairs / 2
        else ""
    )


def _energy_only_looks(subject: Subject) -> str:
    plugin = subject.plugin
    for observation in subject.observations:
        run = Run(plugin, observation).step()
        before = {name: array.copy() for name, array in plugin.pack(run.state).items()}
        values = [float(plugin.energy(run.state)) for _ in range(3)]
        plugin.result(run.state)
        changed = _differs(before, plugin.pack(run.state))
        plugin.release(run.state)
        if len(set(values)) > 1:
            return f"asked three times it says {values}"
        if changed:
            return f"energy or result changes the state: {changed}"
    return ""


def _idempotent(subject: Subject) -> str:
    plugin = subject.plugin
    for observation in subject.observations:
        run = Run(plugin, observation).step(min(2, plugin.max_steps))
        once = {name: array.copy() for name, array in plugin.pack(run.state).items()}
        run.state = plugin.project(run.state)
        changed = _differs(once, plugin.pack(run.state))
        plugin.release(run.state)
        if changed:
            return f"a projected state changes when it is projected again: {changed}"
    return ""


def _deterministic(subject: Subject) -> str:
    for number, observation in enumerate(subject.observations):
        run = Run(subject.plugin, observation).step(subject.plugin.max_steps)
        subject.plugin.release(run.state)
        if fault := _apart(subject.energies[number], run.energies):
            return f"sample {number} run a second time: {fault}"
    return ""


def _independent(subject: Subject) -> str:
    """Every request as it is alone, whoever steps in between or along."""
    plugin = subject.plugin
    runs = [Run(plugin, observation) for observation in subject.observations]
    size = max(s for s in plugin.batch_sizes if s <= len(runs))
    for index in range(plugin.max_steps):
        for start in range(0, len(runs), size):
            part = runs[start : start + size]
            for run, state in zip(part, plugin.step_many([r.state for r in part], [index] * len(part)), strict=True):
                run.take(state)
    for run in runs:
        plugin.release(run.state)
    faults = [_apart(alone, run.energies) for alone, run in zip(subject.energies, runs, strict=True)]
    return next((f"sample {n} in company: {fault}" for n, fault in enumerate(faults) if fault), "")


def _halts(subject: Subject) -> str:
    plugin = subject.plugin
    for text in (plugin.default_halt, "full"):
        policy = plugin.policy(text)
        for number, observation in enumerate(subject.observations):
            run, reason = Run(plugin, observation), ""
            while not reason and len(run.rows) < plugin.max_steps:
                reason = run.step().stops(policy)
                if not isinstance(reason, str):
                    return f"halt gives {reason!r}, expected a string"
            plugin.release(run.state)
            if not reason:
                return f"sample {number}, policy {text!r}: halt gives no reason even after max_steps ({plugin.max_steps}) steps"
    return ""


def _serialisable(subject: Subject) -> str:
    from safetensors.numpy import load, save

    plugin = subject.plugin
    for number, observation in enumerate(subject.observations):
        taken = min(1, plugin.max_steps - 1) or 0
        run = Run(plugin, observation).step(max(taken, 1))
        packed = plugin.pack(run.state)
        copy = load(save({name: np.asarray(array, order="C") for name, array in packed.items()}))
        plugin.release(run.state)
        again = Run(plugin, state=plugin.unpack(copy))
        if changed := _differs(packed, plugin.pack(again.state)):
            return f"sample {number}: packed, unpacked and packed again it is another state: {changed}"
        left = plugin.max_steps - len(run.rows)
        again.step(left, first=len(run.rows))
        plugin.result(again.state)
        plugin.release(again.state)
        if fault := _apart(subject.energies[number][len(run.rows) :], again.energies):
            return f"sample {number} goes on differently after unpack: {fault}"
    return ""


def _answers(subject: Subject) -> str:
    plugin = subject.plugin
    for observation in subject.observations:
        run = Run(plugin, observation).step()
        result = plugin.result(run.state)
        plugin.release(run.state)
        if not isinstance(result, dict) or not result:
            return f"result gives {type(result).__name__}, expected a dict that is not empty"
        for name, value in result.items():
            if not isinstance(name, str) or not isinstance(value, (np.ndarray, np.generic, str, int, float, bool)):
                return f"result: {name!r} is a {type(value).__name__}, expected an array, a string or a number"
    return ""


def _telemetry(subject: Subject) -> str:
    plugin = subject.plugin
    energies = tuple(subject.energies[0])
    for kind in ("step", "request"):
        whole = kind == "request"
        moment = Moment(
            record="request" if whole else "step", time=0.0, entity_id="check", request=0,
            energies=energies if whole else energies[:1], span=plugin.spec.energy_range, trust=1.0, spent=Spent(1.0, 1.0),
            profile=PROFILES["balanced"], signals=dict.fromkeys(plugin.signals, 0.0), halt_reason="full" if whole else None,
            contribution=float(plugin.contribution(energies)) if whole else None,
        )  # fmt: skip
        record = plugin.emit_telemetry(moment)
        if faults := problems(record):
            return f"{kind}: {faults[0]}"
        json.dumps(record, allow_nan=False)
    return ""


def _apart(expected: Sequence[float], found: Sequence[float]) -> str:
    """Where two runs part, or ""."""
    for step, (a, b) in enumerate(zip(expected, found, strict=True), 1):
        if not math.isclose(a, b, rel_tol=RELATIVE, abs_tol=ABSOLUTE):
            return f"energy {b:.9g} instead of {a:.9g} at step {step} of {len(expected)}"
    return ""


def _differs(before: dict[str, Array], after: dict[str, Array]) -> str:
    if set(before) != set(after):
        return f"arrays {sorted(after)} instead of {sorted(before)}"
    for name, array in before.items():
        if array.shape != after[name].shape or not np.allclose(
            array, after[name], RELATIVE, ABSOLUTE, equal_nan=array.dtype.kind == "f"
        ):
            return f"array {name!r}"
    return ""


CHECKS: dict[str, Callable[[Subject], str]] = {
    "samples": _samples,
    "declaration": _declared,
    "bad input refused": _bad_input,
    "energy finite": _finite,
    "energy lower is better": _lower_is_better,
    "energy only looks": _energy_only_looks,
    "project idempotent": _idempotent,
    "steps deterministic": _deterministic,
    "requests independent": _independent,
    "halting terminates": _halts,
    "state serialisable": _serialisable,
    "result": _answers,
    "telemetry valid": _telemetry,
}
