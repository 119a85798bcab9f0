"""Whole traces of a plugin on examples with references: what calibration, the worth of steps and the bench are made from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sage_edge.arrays import write_npz
from sage_edge.errors import InputError
from sage_edge.irp.calibrate import Calibration, Loss, Promise, calibrate
from sage_edge.irp.certificate import Certificate, certify, save_certificate
from sage_edge.irp.families import PLUGIN_FAMILIES
from sage_edge.irp.home import WORTH_FILE, make_home
from sage_edge.irp.plugin import Examples, Plugin
from sage_edge.irp.spec import BenchSpec
from sage_edge.irp.traces import Steps, Traces
from sage_edge.irp.worth import WorthTable, fitted, to_arrays

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Recorded:
    """n examples over s steps. traces: for policies; its `token_accuracy` holds the quality, `exact` whether that is right.
    quality float [n, s], in the plugin's unit. energies float [n, s], normalised. sha256: of the examples. groups as there."""

    traces: Traces
    quality: Floats
    energies: Floats
    sha256: str
    groups: dict[str, Floats]

    def __len__(self) -> int:
        return len(self.quality)


def bench_spec(plugin: Plugin[Any]) -> BenchSpec:
    """Raises InputError for a plugin that names no bench dataset."""
    if plugin.spec.bench is None:
        raise InputError(f"plugin {plugin.spec.name}: plugin.yaml names no `bench` with calibration, test and quality")
    return plugin.spec.bench


def record_traces(
    plugin: Plugin[Any], examples: Examples, progress: Callable[[int], None] = lambda done: None
) -> Recorded:
    """Run every example to the last step, asking for a result after each. The plugin is active."""
    spec = bench_spec(plugin)
    size = plugin.batch_sizes[-1]
    signals = np.empty((len(examples), plugin.max_steps, len(plugin.signals)), np.float32)
    quality = np.empty((len(examples), plugin.max_steps))
    energies = np.empty_like(quality)
    for start in range(0, len(examples), size):
        rows = range(start, min(start + size, len(examples)))
        states = [plugin.init_state(examples.observations[row]) for row in rows]
        for step in range(plugin.max_steps):
            states = [plugin.project(state) for state in plugin.step_many(states, [step] * len(states))]
            for row, state in zip(rows, states, strict=True):
                energy = float(plugin.energy(state))
                signals[row, step] = [energy, *plugin.read_signals(state)]
                energies[row, step] = plugin.spec.energy_range.normalise(energy)
                quality[row, step] = plugin.quality(plugin.result(state), examples.references[row])
        for state in states:
            plugin.release(state)
        progress(rows[-1] + 1)
    if not (np.isfinite(quality).all() and np.isfinite(signals[:, :, 0]).all()):
        raise InputError(
            f"plugin {plugin.spec.name}: quality or energy is NaN or Inf on some of the {len(examples)} examples"
        )
    traces = Traces(signals, quality >= spec.right, quality, plugin.signals)
    groups = {name: np.asarray(values, np.float64) for name, values in examples.groups.items()}
    return Recorded(traces, quality, energies, digest(examples), groups)


def quality_lost(full: Floats, other: Floats, unit: float, binary: bool) -> Floats:
    """The fall from `full` to `other`, both [n], in units, cut to -1..1: what some gain counts against what others lose, so that
    the mean is the fall of the mean. binary (`is_binary`): cut to 0..1, only what is lost counts, for an exact test."""
    return np.clip((full - other) / unit, 0.0 if binary else -1.0, 1.0)


def is_binary(quality: Floats, unit: float) -> bool:
    """Whether every loss of such qualities is 0 or 1."""
    return unit == 1.0 and bool(np.isin(quality, (0.0, 1.0)).all())


def quality_loss(recorded: Recorded, unit: float) -> Loss:
    """The loss that halting is certified for: fall of quality against full steps, see `quality_lost`."""
    quality = recorded.quality
    binary = is_binary(quality, unit)

    def lost(traces: Traces, taken: Steps) -> Floats:
        return quality_lost(quality[:, -1], quality[np.arange(len(quality)), taken - 1], unit, binary)

    return Loss("quality_lost", lost, binary)


def allowed_loss(plugin: Plugin[Any], max_loss: float | None) -> float:
    """What may be lost on average, in units of loss: `max_loss`, of quality, or what plugin.yaml promises. Raises InputError
    from one unit on, where losses are cut off."""
    spec = bench_spec(plugin)
    if max_loss is None:
        return spec.max_loss
    if not 0 < max_loss < spec.unit:
        raise InputError(
            f"plugin {plugin.spec.name}: --max-loss {max_loss:g}: expected less than {spec.unit:g} ({spec.quality}), where "
            "losses are cut off"
        )
    return max_loss / spec.unit


def promise_of(plugin: Plugin[Any], recorded: Recorded, max_loss: float | None) -> Promise:
    """What halting is certified for, see `allowed_loss`."""
    spec = bench_spec(plugin)
    return Promise(allowed_loss(plugin, max_loss), spec.confidence, quality_loss(recorded, spec.unit))


def calibrated(plugin: Plugin[Any], recorded: Recorded, max_loss: float | None = None) -> Calibration:
    """Raises InputError for a `max_loss` that will not do, and when this data cannot carry the promise."""
    return calibrate(recorded.traces, promise_of(plugin, recorded, max_loss), PLUGIN_FAMILIES)


def keep_calibration(
    plugin: Plugin[Any], recorded: Recorded, max_loss: float | None = None
) -> tuple[Certificate, Path]:
    """Certify halting and learn what steps are worth; both go to the plugin's home and take effect in `plugin` at once.

    Raises what `calibrated` raises; nothing is written then.
    """
    promise = promise_of(plugin, recorded, max_loss)
    found = calibrate(recorded.traces, promise, PLUGIN_FAMILIES)
    home = make_home(plugin)
    worth = worth_of(recorded)
    write_npz(home / WORTH_FILE, to_arrays(worth))
    certificate = certify(found, promise, PLUGIN_FAMILIES, engine=home, data_sha256=recorded.sha256, items=len(recorded),
                          max_steps=plugin.max_steps)  # fmt: skip
    path = save_certificate(home, certificate)
    plugin.certificate, plugin.worth = certificate, worth
    return certificate, path


def worth_of(recorded: Recorded) -> WorthTable:
    """What steps are worth, taught by the quality of these examples; by their energies where quality does not rise."""
    gain = float(recorded.quality[:, -1].mean())
    if gain <= 0:
        return fitted(recorded.energies)
    return fitted(recorded.energies, 1 - recorded.quality / gain)


def digest(examples: Examples) -> str:
    """Hex SHA-256 of observations and references."""
    found = hashlib.sha256()
    for value in (*examples.observations, *examples.references):
        _feed(found, value)
    return found.hexdigest()


def _feed(found: hashlib._Hash, value: Any) -> None:
    if isinstance(value, Mapping):
        for name in sorted(value):
            found.update(f"\n{name}:".encode())
            _feed(found, value[name])
    elif isinstance(value, (list, tuple)):
        found.update(f"[{len(value)}]".encode())
        for item in value:
            _feed(found, item)
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        found.update(f"{value.dtype.str}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    else:
        found.update(repr(value).encode() + b"\n")
