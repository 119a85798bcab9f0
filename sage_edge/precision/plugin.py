"""The engine of a plugin lowered: ranges from the plugin's own examples, and the plugin's own quality as the judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sage_edge.bundle import BUNDLE_FILE
from sage_edge.errors import GateError, InputError
from sage_edge.files import replacing_directory
from sage_edge.irp.engine import EnginePlugin
from sage_edge.irp.measure import allowed_loss, bench_spec, is_binary, quality_lost, record_traces
from sage_edge.irp.plugin import Examples
from sage_edge.irp.registry import open_plugin
from sage_edge.irp.risk import upper_bound
from sage_edge.models import bundle_of, locate
from sage_edge.precision.lower import LoweredBundle, lower_bundle
from sage_edge.precision.plan import Request
from sage_edge.precision.workbench import DESIGN_SHARE


@dataclass(frozen=True)
class Quality:
    """Mean quality after all steps on `items` examples, in the plugin's unit; lost: the mean fall, where gains count 0, and
    its upper bound at `confidence`."""

    unit: str
    items: int
    fp32: float
    lowered: float
    lost: float
    bound: float
    allowed: float
    confidence: float

    @property
    def passed(self) -> bool:
        return self.bound <= self.allowed


def lower_plugin(
    plugin: EnginePlugin, output: Path, request: Request, count: int | None = None, allowed: float | None = None,
    threads: int = 1, progress: Callable[[str], None] = lambda stage: None,
) -> tuple[LoweredBundle, Quality]:  # fmt: skip
    """Write the lowered bundle of the plugin's fp32 bundle to `output`.

    A quarter of the calibration examples (`count` of them, default: as many as plugin.yaml says) sets the ranges; on the
    others it may lose at most `allowed` (default: the promise of plugin.yaml), both taken to the last step. Raises InputError
    for a plugin that has no bundle or no examples, and for `allowed` from the unit of a loss on, GateError when it may lose more;
    nothing is written then.
    """
    spec = bench_spec(plugin)
    share = allowed_loss(plugin, allowed)
    source = bundle_of(locate(plugin.engine), progress)
    # Around all of the work, so that an output that will not do is refused before it.
    with replacing_directory(output, BUNDLE_FILE) as folder:
        examples = plugin.examples(spec.calibration, count or spec.calibration_examples)
        design = round(DESIGN_SHARE * len(examples))
        if not 0 < design < len(examples):
            raise InputError(f"plugin {plugin.spec.name}: expected at least 4 examples, found {len(examples)}")
        arrays = [plugin.prepare(observation)[0] for observation in examples.observations[:design]]
        whole = {name: np.concatenate([array[name] for array in arrays]) for name in arrays[0]}
        rest = Examples(examples.observations[design:], examples.references[design:])
        made = lower_bundle(source, folder, request, whole, threads=threads, progress=progress)
        options = {**plugin.options, "engine": str(folder)}
        lowered = open_plugin(plugin.folder or plugin.spec.name, options=options)
        last = []
        for name, each in (("fp32", plugin), ("lowered", lowered)):
            progress(f"{name} quality of {len(rest)} examples")
            with each:
                last.append(record_traces(each, rest).quality[:, -1])
        binary = is_binary(np.stack(last), spec.unit)
        losses = quality_lost(last[0], last[1], spec.unit, binary)
        quality = Quality(
            spec.quality, len(rest), float(last[0].mean()), float(last[1].mean()), float(losses.mean()) * spec.unit,
            upper_bound(losses, 1 - spec.confidence, binary) * spec.unit,
            share * spec.unit, spec.confidence,
        )  # fmt: skip
        if not quality.passed:
            raise GateError(
                f"plugin {plugin.spec.name}: {request.text} may lose {quality.bound:.3g} of {quality.fp32:.4g} ({quality.unit}), "
                f"allowed {quality.allowed:g}: {quality.lost:.3g} lost on {quality.items} examples; lower fewer modules "
                f"(--precision 'MODULE: int8'), allow more (--max-loss), or give more --examples"
            )
    return LoweredBundle(output, made.bundle, made.report), quality
