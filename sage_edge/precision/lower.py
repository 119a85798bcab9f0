"""From an fp32 bundle to a lowered bundle: calibrate, rewrite, search what must stay higher, pass the gate, write."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import onnx

from sage_edge.bundle import (
    BUNDLE_FILE,
    GRAPH_NAMES,
    REFERENCE_FILE,
    Bundle,
    GateResult,
    LayerPrecision,
    Lowering,
    load_bundle,
    save_bundle,
)  # fmt: skip
from sage_edge.dataset import Dataset
from sage_edge.errors import GateError, InputError
from sage_edge.files import replacing_directory, sha256
from sage_edge.precision.formats import COST
from sage_edge.precision.gate import PrecisionReport
from sage_edge.precision.layers import Layer, modules
from sage_edge.precision.plan import Request
from sage_edge.precision.search import lowest
from sage_edge.precision.workbench import Plan, Workbench
from sage_edge.specs import Array, Precision

Progress = Callable[[str], None]

HIGHER: dict[Precision, Precision] = {"fp32": "fp32", "fp16": "fp32", "int8": "fp16", "fp8": "fp16"}
# How often a plan may go before the final gate: as found, with half of its lowered layers one level higher, with all of
# them. The error budget of the interval is divided by it, so that the promise holds for whichever passes.
ATTEMPTS = 3


class LoweringError(GateError):
    """Nothing that was asked for passes the gate. `lowering` says what was tried last and which findings failed."""

    def __init__(self, message: str, lowering: Lowering) -> None:
        super().__init__(message)
        self.lowering = lowering


@dataclass(frozen=True)
class LoweredBundle:
    """What `lower_bundle` made."""

    path: Path
    bundle: Bundle
    report: PrecisionReport


@dataclass(frozen=True)
class _Found:
    """A plan that passed its screening, from which it was reached, the sensitivity of layers and why some stayed higher."""

    asked: Plan
    plan: Plan
    errors: dict[str, float]
    reasons: dict[str, str]


def lower_bundle(
    source: Path, output: Path, request: Request, data: Dataset | dict[str, Array], *, strict: bool = False,
    threads: int = 1, progress: Progress = lambda stage: None,
) -> LoweredBundle:  # fmt: skip
    """Write the lowered bundle of the fp32 bundle in `source` to the folder `output`.

    data: a dataset, whose first share calibrates and screens and whose rest decides; or observations alone, for models
    that were never trained: then nothing is said of accuracy. strict: refuse what was asked for rather than keep layers
    higher. Raises InputError for a source or a plan that does not fit, GateError when no graph lower than fp32 passes.
    """
    bundle = load_bundle(source)
    if bundle.lowering is not None:
        raise InputError(
            f"{source}: is lowered already ({bundle.precision}); lower the fp32 bundle that it was made from"
        )
    attempts = 1 if strict else ATTEMPTS
    with Workbench(source, bundle, data, request.plan.limits, threads, progress, attempts) as bench:
        asked = _asked(request, bench.layers)
        found, report = _settle(bench, asked, strict)
        lowering = _describe(bench, found, report, request)
        if not report.passed:
            raise LoweringError(f"{bundle.name}: the gate refused {request.text}: {_reasons(report)}", lowering)
        if not request.plan.auto and not set(found.plan.values()) & (set(found.asked.values()) - {"fp32"}):
            raise LoweringError(
                f"{bundle.name}: {request.text} fails the gate in every layer; what passes is {_summary(found.plan)}",
                lowering,
            )
        with replacing_directory(output, BUNDLE_FILE) as folder:
            for name in (*(f"{graph}.onnx" for graph in GRAPH_NAMES), REFERENCE_FILE):
                shutil.copyfile(source / name, folder / name)
            for graph, low in bench.lowered(found.plan).items():
                onnx.save(low.model, str(folder / f"{graph}.onnx"))
            lowered = replace(
                bundle,
                precision=_summary(found.plan),
                files={file.name: sha256(file) for file in sorted(folder.iterdir())},
                lowering=lowering,
            )
            save_bundle(folder, lowered)
    return LoweredBundle(output, lowered, report)


def _describe(bench: Workbench, found: _Found, report: PrecisionReport, request: Request) -> Lowering:
    return Lowering(
        asked=request.text,
        fp32_sha256=sha256(bench.source / BUNDLE_FILE),
        data_sha256=bench.digest,
        data_items=bench.items,
        range_items=bench.ranges["refine"].items,
        equalised=len(bench.pairs),
        cost=round(cost(found.plan, bench.layers), 4),
        layers=_table(bench.layers, found),
        limits=asdict(request.plan.limits),
        gate=tuple(GateResult(**asdict(finding)) for finding in report.findings),
        steps=report.steps,
    )


def cost(plan: Plan, layers: tuple[Layer, ...]) -> float:
    """The plan's cost beside fp32 = 1: multiplications weighted by `COST`."""
    return sum(layer.work * COST[plan[layer.name]] for layer in layers) / sum(layer.work for layer in layers)


def _asked(request: Request, layers: tuple[Layer, ...]) -> list[Plan]:
    """The plans to begin with: one, or for `auto` one for each 8-bit format allowed (fp16 where none is)."""
    known = modules(layers)
    if request.plan.auto:
        lacking = {"fp8"} if any(layer.is_convolution for layer in layers) else set[str]()
        targets: list[Precision] = [p for p in request.plan.allow if p != "fp16" and p not in lacking] or ["fp16"]
        return [dict.fromkeys((layer.name for layer in layers), target) for target in targets]
    names = {layer.name for layer in layers}
    if unknown := sorted(set(request.plan.modules) - {*known, "*"}):
        raise InputError(
            f"precision {request.text!r}: this model has no module {unknown[0]!r}; it has {', '.join(known)}"
        )
    if unknown := sorted(set(request.plan.layers) - names):
        raise InputError(
            f"precision {request.text!r}: this model has no layer {unknown[0]!r}; it has {', '.join(sorted(names))}"
        )
    plan = {layer.name: request.of(layer.name, layer.module) for layer in layers}
    if unfit := [layer.name for layer in layers if layer.is_convolution and plan[layer.name] == "fp8"]:
        raise InputError(
            f"precision {request.text!r}: {unfit[0]} is a convolution, for which there is no FP8; use int8 or fp16"
        )
    if set(plan.values()) == {"fp32"}:
        raise InputError(f"precision {request.text!r}: lowers nothing; the fp32 bundle is what you have")
    return [plan]


def _settle(bench: Workbench, asked: list[Plan], strict: bool) -> tuple[_Found, PrecisionReport]:
    """The plan to write with its final report; the last one that was tried, with its failures, when none passes."""
    if strict:
        return _Found(asked[0], asked[0], {}, {}), bench.judge(asked[0], attempts=1)
    candidates = [replace(_search(bench, plan), asked=plan) for plan in asked]
    best = min(candidates, key=lambda f: (cost(f.plan, bench.layers), bench.screen(f.plan).error))
    for attempt in range(ATTEMPTS):
        report = bench.judge(best.plan, ATTEMPTS)
        higher = _retreat(bench, best, report, whole=attempt > 0)
        if report.passed or attempt == ATTEMPTS - 1 or set(higher.plan.values()) == {"fp32"}:
            break
        best = higher
    return best, report


def _search(bench: Workbench, plan: Plan) -> _Found:
    """`plan`, or the nearest to it that passes the screening: what breaks it is found by bisection, one level higher."""
    reasons: dict[str, str] = {}
    # Raising one layer gives others a float32 value to cast, so that they may come too close in turn.
    while room := bench.crowded(plan):
        reasons |= {
            name: f"float16 would overflow: its range holds {value:.2g} times the largest value"
            for name, value in room.items()
        }
        plan = {name: "fp32" if name in room else precision for name, precision in plan.items()}
    if bench.screen(plan).passed:
        return _Found(plan, plan, {}, reasons)
    higher = _search(bench, {name: HIGHER[precision] for name, precision in plan.items()})
    wanted = [name for name in plan if plan[name] != higher.plan[name]]
    errors = {name: bench.alone(name, plan[name]) for name in wanted}

    def with_lowered(names: frozenset[str]) -> Plan:
        return {name: plan[name] if name in names else higher.plan[name] for name in plan}

    order = sorted(wanted, key=lambda name: errors[name])
    lowered, kept = lowest(order, lambda names: bench.screen(with_lowered(names)).passed)
    why = {name: "breaks " + ", ".join(bench.screen(with_lowered(failed)).failed) for name, failed in kept.items()}
    return _Found(plan, with_lowered(lowered), {**higher.errors, **errors}, {**higher.reasons, **reasons, **why})


def _retreat(bench: Workbench, found: _Found, report: PrecisionReport, whole: bool) -> _Found:
    """One level higher: the more sensitive half of the lowest layers, or all of them. The plan itself when it passed."""
    if report.passed:
        return found
    floor = min(COST[precision] for precision in found.plan.values())
    low = [name for name, precision in found.plan.items() if COST[precision] == floor]
    errors = {**found.errors}
    for name in low:
        if name not in errors:
            errors[name] = bench.alone(name, found.plan[name])
    low.sort(key=lambda name: errors[name])
    raised = low if whole else low[len(low) // 2 :]
    why = "the final gate failed: " + ", ".join(f.name for f in report.failures)
    plan = {name: HIGHER[p] if name in raised else p for name, p in found.plan.items()}
    return _Found(found.asked, plan, errors, {**found.reasons, **dict.fromkeys(raised, why)})


def _reasons(report: PrecisionReport) -> str:
    return "; ".join(f"{f.name}: {f.detail}" for f in report.failures)


def _table(layers: tuple[Layer, ...], found: _Found) -> tuple[LayerPrecision, ...]:
    whole = sum(layer.work for layer in layers)
    return tuple(
        LayerPrecision(
            layer=layer.name,
            module=layer.module,
            asked=found.asked[layer.name],
            precision=found.plan[layer.name],
            share=round(layer.work / whole, 4),
            error=round(found.errors[layer.name], 6) if layer.name in found.errors else None,
            reason=found.reasons.get(layer.name, "") if found.plan[layer.name] != found.asked[layer.name] else "",
            graph=layer.graph,
        )
        for layer in layers
    )


def _summary(plan: Plan) -> Precision | Literal["mixed"]:
    chosen = set(plan.values())
    return chosen.pop() if len(chosen) == 1 else "mixed"
