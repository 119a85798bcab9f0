"""`sage-edge bench --suite irp`: what certified halting saves and costs for every plugin, and what sharing a device brings.

Any plugin that names a bench dataset and writes `examples` and `quality` is measured. Policies are chosen on its
calibration examples and judged on its test examples, which had no part in the choice:

full        every step
own rule    what plugin.yaml says
certified   certified on the calibration examples, by the promise of plugin.yaml
fastest     the fewest steps that keep 99.9 % of the quality of full steps on the calibration examples
oracle      the first step that is as good as full steps; nobody can have it

Intervals are 95 %, by bootstrap over the test examples, paired between a policy and full steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sage_edge.bench import sharing
from sage_edge.bench.solvers import Solve, Sparse
from sage_edge.bench.timing import Latency
from sage_edge.errors import InputError
from sage_edge.irp.calibrate import Loss, tabulate
from sage_edge.irp.families import PLUGIN_FAMILIES
from sage_edge.irp.measure import Recorded, bench_spec, calibrated, record_traces, worth_of
from sage_edge.irp.plugin import Examples, Plugin
from sage_edge.irp.registry import find_plugins, open_plugin
from sage_edge.irp.traces import steps_taken
from sage_edge.irp.worth import fitted
from sage_edge.sharing.loop import measured_costs

KEPT = 0.999  # "99.9 % quality"
RESAMPLES = 2000
Progress = Callable[[str, float], None]
Report = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """plugins: names or folders, empty for all with a bench dataset. folders: where to look. examples: test examples of each
    (None: as plugin.yaml says). timed: how many are answered for the clock. sections: what to measure. seconds, seeds: of
    the simulated load; real_s: of the one with real engines."""

    plugins: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()
    examples: int | None = None
    timed: int = 24
    sections: tuple[str, ...] = ("plugins", "scheduler")
    seconds: float = 2.0
    seeds: int = 8
    real_s: float = 6.0
    profile: str = "balanced"


@dataclass(frozen=True)
class Measured:
    """A plugin with its traces on calibration and test examples."""

    plugin: Plugin[Any]
    calibration: Recorded
    test: Recorded
    examples: Examples
    certified: str | None
    refused: str


def run_irp(options: Options, progress: Progress) -> Report:
    """The sections `plugins` and `scheduler` of a report. Raises InputError for a plugin that cannot be measured."""
    report: Report = {}
    opened = _open(options)
    measured = []
    for plugin in opened:
        plugin.activate()
        try:
            measured.append(_measure(plugin, options, progress))
        except InputError as error:
            if options.plugins:
                raise
            # One of the many that were found: its data may not be on this machine, and the others are measured all the same.
            report.setdefault("skipped", []).append({"plugin": plugin.spec.name, "why": str(error)})
    if "plugins" in options.sections:
        report["plugins"] = [_plugin(one, options, progress) for one in measured]
    if "scheduler" in options.sections:
        report["scheduler"] = _scheduler(measured, options, progress)
    for plugin in opened:
        plugin.deactivate()
    return report


def _open(options: Options) -> list[Plugin[Any]]:
    if options.plugins:
        plugins = [open_plugin(name, options.folders) for name in options.plugins]
        for plugin in plugins:
            bench_spec(plugin)
        return plugins
    usable = [found for found in find_plugins(options.folders) if found.spec and found.spec.bench]
    if not usable:
        raise InputError("no plugin with a `bench` in its plugin.yaml was found; give --plugins DIR")
    return [open_plugin(found.folder or found.name, options.folders) for found in usable]


def _measure(plugin: Plugin[Any], options: Options, progress: Progress) -> Measured:
    spec, name = bench_spec(plugin), plugin.spec.name

    def record(source: str, count: int) -> tuple[Examples, Recorded]:
        examples = plugin.examples(source, count)
        title = f"{name}: {len(examples)} {source} examples to the last step"
        progress(title, 0.0)
        return examples, record_traces(plugin, examples, lambda done: progress(title, done / len(examples)))

    # A smaller test asks for a quick look; calibration then takes as many more as it would in full.
    share = min(1.0, options.examples / spec.test_examples) if options.examples else 1.0
    _, calibration = record(spec.calibration, max(2, round(spec.calibration_examples * share)))
    examples, test = record(spec.test, options.examples or spec.test_examples)
    if calibration.sha256 == test.sha256:
        raise InputError(
            f"plugin {name}: calibration and test examples are the same; quality would be judged on what chose"
        )
    try:
        return Measured(plugin, calibration, test, examples, calibrated(plugin, calibration).chosen.policy, "")
    except InputError as error:
        return Measured(plugin, calibration, test, examples, None, str(error))


def _plugin(one: Measured, options: Options, progress: Progress) -> Report:
    spec, test, full = bench_spec(one.plugin), one.test, one.plugin.max_steps
    policies = {"full": "full", "own rule": one.plugin.spec.halt}
    if one.certified:
        policies["certified"] = one.certified
    policies["fastest"] = fastest(one.calibration)
    taken = {name: steps_taken(test.traces, policy) for name, policy in policies.items()}
    taken["oracle"] = oracle_steps(test.quality)
    rows = [
        {"halting": name, "policy": policies.get(name), **judged(test.quality, steps, full)}
        for name, steps in taken.items()
    ]
    timed = _timed(one, policies, min(options.timed, len(test)), progress)
    for row in rows:
        row |= timed.get(row["halting"], {})
    return {
        "plugin": one.plugin.spec.name, "version": one.plugin.spec.version, "digest": one.plugin.digest,
        "quality": spec.quality, "max_steps": full, "calibration_examples": len(one.calibration),
        "test_examples": len(test), "promise": {"max_loss": spec.max_loss, "unit": spec.unit, "confidence": spec.confidence},
        "not_certified": one.refused, "halting": rows, "groups": _groups(test, taken),
    }  # fmt: skip


def judged(quality: npt.NDArray[np.float64], taken: npt.NDArray[np.int64], full: int) -> Report:
    """Quality, steps and what they are against full steps, on n examples with their intervals.

    quality float [n, steps]. quality_loss: relative fall of the mean, may be negative; speed_up: full over mean steps.
    """
    own, whole = quality[np.arange(len(quality)), taken - 1], quality[:, -1]
    rows = np.random.default_rng(0).integers(len(quality), size=(RESAMPLES, len(quality)))
    means, wholes, steps = own[rows].mean(1), whole[rows].mean(1), taken[rows].mean(1)
    lost = 1 - own.mean() / whole.mean() if whole.mean() > 0 else None
    drawn = 1 - means / np.where(wholes > 0, wholes, np.nan)
    return {
        "mean_quality": float(own.mean()), "quality_interval": _interval(means),
        "mean_steps": float(taken.mean()), "steps_interval": _interval(steps),
        "steps_saved": float(1 - taken.mean() / full),
        "quality_loss": None if lost is None else float(lost),
        "quality_loss_interval": None if lost is None else _interval(drawn),
        "speed_up": float(full / taken.mean()), "speed_up_interval": _interval(full / steps),
    }  # fmt: skip


def fastest(calibration: Recorded) -> str:
    """The policy with the fewest mean steps that keeps KEPT of the mean quality of full steps, on these examples."""
    quality = calibration.quality
    target = KEPT * float(quality[:, -1].mean())
    nothing = Loss("none", lambda traces, taken: np.zeros(len(traces)))
    best = ("full", float(quality.shape[1]))
    for table in tabulate(calibration.traces, PLUGIN_FAMILIES, nothing):
        for policy, row in zip(table.path.policies, table.taken.astype(np.int64), strict=True):
            kept = float(quality[np.arange(len(quality)), row - 1].mean())
            if kept >= target and row.mean() < best[1]:
                best = (policy, float(row.mean()))
    return best[0]


def oracle_steps(quality: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The first step of each example that is as good as its last one."""
    return np.asarray((quality >= quality[:, -1:]).argmax(axis=1) + 1, np.int64)


def _timed(one: Measured, policies: Mapping[str, str], count: int, progress: Progress) -> dict[str, Report]:
    """Milliseconds from request to result, one request at a time, the policies in turn; and the speed-up in time."""
    plugin, title = one.plugin, f"{one.plugin.spec.name}: time of an answer"
    spent: dict[str, list[float]] = {name: [] for name in policies}
    compiled = {name: plugin.policy(policy) for name, policy in policies.items()}
    for row in range(-1, count):  # the first round only warms up
        progress(title, max(0, row) / count)
        for name, policy in compiled.items():
            began = time.perf_counter()
            _answer(plugin, one.examples.observations[max(row, 0)], policy)
            if row >= 0:
                spent[name].append(time.perf_counter() - began)
    rows = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    full = np.array(spent["full"])
    report = {}
    for name, seconds in spent.items():
        own = np.array(seconds)
        report[name] = {
            "latency": asdict(Latency.of(seconds)), "time_speed_up": float(full.mean() / own.mean()),
            "time_speed_up_interval": _interval(full[rows].mean(1) / own[rows].mean(1)),
        }  # fmt: skip
    return report


def _answer(plugin: Plugin[Any], observation: Any, policy: Any) -> None:
    from sage_edge.irp.halting import History

    state, reason, table = (
        plugin.init_state(observation),
        "",
        np.empty((plugin.max_steps, len(plugin.signals)), np.float32),
    )
    for index in range(plugin.max_steps):
        state = plugin.project(plugin.step_many([state], [index])[0])
        table[index] = [plugin.energy(state), *plugin.read_signals(state)]
        reason = plugin.halt(History(table[None], np.array([index + 1], np.int64), np.zeros(1), plugin.signals), policy)
        if reason:
            break
    plugin.result(state)
    plugin.release(state)


def _groups(test: Recorded, taken: Mapping[str, npt.NDArray[np.int64]]) -> list[Report]:
    """Steps and quality under the certified policy (the own rule without one), by up to five parts of each group."""
    steps = taken.get("certified", taken["own rule"])
    found = []
    for name, values in test.groups.items():
        distinct = np.unique(values)
        edges = distinct if len(distinct) <= 5 else np.unique(np.quantile(values, [0, 0.2, 0.4, 0.6, 0.8]))
        part = np.searchsorted(edges, values, side="right") - 1
        for index in range(len(edges)):
            rows = np.flatnonzero(part == index)
            if len(rows):
                found.append({
                    "group": name, "from": float(values[rows].min()), "to": float(values[rows].max()), "examples": len(rows),
                    "mean_steps": float(steps[rows].mean()),
                    "mean_quality": float(test.quality[rows, steps[rows] - 1].mean()),
                    "full_quality": float(test.quality[rows, -1].mean()),
                })  # fmt: skip
    return found


def _scheduler(measured: Sequence[Measured], options: Options, progress: Progress) -> Report:
    """The mixed load: plugin `reason` and the two solvers."""
    chosen = [one for one in measured if one.plugin.spec.name == "reason"]
    if not chosen:
        raise InputError("section scheduler: the mixed load needs plugin reason; name it too, or leave the section out")
    solvers: list[Plugin[Any]] = [Solve(), Sparse()]
    everything = [*chosen, *(_measure(plugin, options, progress) for plugin in solvers)]
    contenders = [
        sharing.Contender(
            name=one.plugin.spec.name, plugin=one.plugin, examples=one.examples, recorded=one.test,
            policy=one.certified or one.plugin.spec.halt, step_ms=sharing.SIMULATED_MS[one.plugin.spec.name],
            worth=worth_of(one.calibration), worth_by_energy=fitted(one.calibration.energies),
        )
        for one in everything
    ]  # fmt: skip
    progress("scheduler: costs of a step", 0.0)
    costs = {c.name: measured_costs(c.plugin) for c in contenders}
    alone = {c.name: sharing.alone_ms(c, costs[c.name], options.profile) for c in contenders}
    working = [replace(c, step_ms=alone[c.name]) for c in contenders]
    return {
        "simulated": sharing.compare(contenders, options.seconds, options.seeds, options.profile, progress),
        "real": {
            "seconds": options.real_s, "step_ms": {name: dict(c.ms_by_size) for name, c in costs.items()}, "alone_ms": alone,
            "rows": sharing.run_real(working, 1.5, options.real_s, costs, options.profile, progress),
        },
    }  # fmt: skip


def _interval(values: npt.NDArray[np.float64]) -> list[float]:
    return [float(v) for v in np.nanpercentile(values, [2.5, 97.5])]
