"""The gate of a lowered graph: is it still the model, step by step, in its halting and in what it gets right?

Every step is compared from the fp32 model's own carry; the free run is shown beside what a change of 1e-6 grows to in the
fp32 model itself, and does not decide. What decides in the end is the task: accuracy within `points` of fp32 on the same
items, shown by the upper end of a confidence interval for paired proportions (see `sage_edge.irp.paired`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from sage_edge import check
from sage_edge.bundle import Lowering, StepError
from sage_edge.check import Finding, Reference
from sage_edge.dataset import Dataset
from sage_edge.engines.runner import Runner
from sage_edge.evaluate import collect
from sage_edge.irp.paired import Paired
from sage_edge.irp.traces import Traces, steps_taken
from sage_edge.precision.formats import FP16_MAX
from sage_edge.precision.ranges import Ranges
from sage_edge.runtime import Session
from sage_edge.specs import Array

BROKEN = 1e9  # stands for NaN and Inf in errors, which YAML and JSON files of ours do not hold


@dataclass(frozen=True)
class Limits:
    """What a lowered graph may differ by.

    points, confidence: accuracy may fall by at most `points` (hundredths) against fp32, shown with this two-sided
    confidence. step_error: relative RMS error of the carry after one step from the same carry; a wrong graph has about 1,
    FP8 on the reference model 0.08. halting: share of items that halt within one step of where fp32 does. more_steps: by how
    much the mean number of steps may grow, relative. headroom: how often the largest float16 value fits into float16's range.
    """

    points: float = 1.0
    confidence: float = 0.95
    step_error: float = 0.2
    halting: float = 0.95
    more_steps: float = 0.05
    headroom: float = 2.0

    def __post_init__(self) -> None:
        if not (0 < self.points < 100 and 0 < self.confidence < 1 and 0 < self.halting <= 1):
            raise ValueError("points, confidence, halting: expected numbers in 0..100, 0..1 and 0..1")
        if not (self.step_error > 0 and self.more_steps >= 0 and self.headroom >= 1):
            raise ValueError("step_error must be positive, more_steps at least 0 and headroom at least 1")


@dataclass(frozen=True)
class PrecisionReport(check.Verdict):
    """All findings, the table of steps and, where data was given, the paired comparison."""

    steps: tuple[StepError, ...]
    limits: Limits


def step_errors(low: Runner, reference: Reference, fp32: Runner | None = None) -> tuple[StepError, ...]:
    """Errors of the active runner `low` at every step of `reference`; amplification is None without the fp32 runner."""
    model, names = low.model, check.output_names(low)
    carry = [spec.name for spec in model.carry]
    wanted = [{**reference.carries[k], **reference.outputs[k]} for k in range(model.max_steps)]
    same, free, shaken = (_Distance(wanted, carry) for _ in range(3))
    for rows in check.row_chunks(low, len(reference.signals[0])):
        begin = check.take(reference.start, rows)
        running = low.write(begin)
        drifting = fp32.write(begin) if fp32 is not None else None
        moved = fp32.write(begin) if fp32 is not None else None
        for step in range(model.max_steps):
            start = {**begin, **check.take(reference.carries[step - 1], rows)} if step else begin
            same.add(step, rows, check.advance(low, low.write(start), names))
            # A broken graph's NaN cannot be written back, but running on does no harm.
            free.add(step, rows, check.advance(low, running, names))
            if fp32 is not None and drifting is not None and moved is not None:
                plain = check.advance(fp32, drifting, names)
                shaken.add(step, rows, check.advance(fp32, moved, names), plain)
                if step == 0:
                    moved = check.shake(fp32, moved)
    return tuple(
        StepError(
            step + 1,
            same.relative(step),
            same.largest[step],
            same.agreement(step),
            free.relative(step),
            free.agreement(step),
            shaken.relative(step) if fp32 is not None else None,
        )
        for step in range(model.max_steps)
    )


class _Distance:
    """Squared errors of the carry, largest error and equal predictions (if any), summed up over chunks of a reference."""

    def __init__(self, wanted: list[dict[str, Array]], carry: list[str]) -> None:
        steps = len(wanted)
        self.wanted, self.carry = wanted, carry
        self.error, self.size = np.zeros((steps, len(carry))), np.zeros((steps, len(carry)))
        self.largest = [0.0] * steps
        self.equal, self.count = np.zeros(steps), np.zeros(steps)

    def add(self, step: int, rows: slice, got: dict[str, Array], against: dict[str, Array] | None = None) -> None:
        expected = against if against is not None else check.take(self.wanted[step], rows)
        for i, name in enumerate(self.carry):
            with np.errstate(invalid="ignore", over="ignore"):
                gap = got[name].astype(np.float64) - expected[name]
            gap = np.where(np.isfinite(gap), gap, BROKEN)
            self.error[step, i] += float((gap**2).sum())
            self.size[step, i] += float((expected[name].astype(np.float64) ** 2).sum())
            self.largest[step] = min(BROKEN, max(self.largest[step], float(np.abs(gap).max())))
        if "prediction" in got:
            self.equal[step] += int((got["prediction"] == expected["prediction"]).sum())
            self.count[step] += got["prediction"].size

    def relative(self, step: int) -> float:
        """Root of the mean squared error beside that of the values, for the worse tensor of the carry."""
        return min(BROKEN, float(np.sqrt(self.error[step] / np.maximum(self.size[step], 1e-30)).max()))

    def agreement(self, step: int) -> float:
        return float(self.equal[step] / max(self.count[step], 1))


def step_findings(steps: tuple[StepError, ...], limits: Limits) -> list[Finding]:
    """Whether every step is finite and close to the fp32 model's."""
    finite = all(s.largest < BROKEN and s.free_error < BROKEN / 1e6 for s in steps)  # one element among a million tells
    worst = max(steps, key=lambda s: s.error)
    detail = f"relative RMS error {worst.error:.4f} at step {worst.step}, allowed {limits.step_error:g}"
    return [
        Finding("finite", finite, "no NaN or Inf" if finite else "NaN or Inf came out"),
        Finding("step_error", worst.error <= limits.step_error, detail),
    ]


def check_lowered(
    runner: Runner, reference: Reference, lowering: Lowering, fp32: Runner | None = None, data: Dataset | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> PrecisionReport:  # fmt: skip
    """The gate again, for an active runner of a lowered bundle or of an engine made from it.

    fp32: an active runner of the fp32 model, for the amplification and, with `data`, for accuracy and halting; without
    them, only steps and signs of life are judged.
    """
    limits = Limits(**lowering.limits)
    steps = step_errors(runner, reference, fp32)
    encoded = any(layer.graph == "encode" and layer.precision != "fp32" for layer in lowering.layers)
    findings = [*step_findings(steps, limits), *life_findings(runner, reference, limits, encoded)]
    if fp32 is not None and data is not None:
        traces = []
        for name, each in (("fp32", fp32), ("lowered", runner)):
            done = partial(_counted, progress, name, len(data))
            traces.append(collect(Session(each), data, runner.model.max_steps, done))
        findings += task_findings(traces[0], traces[1], limits)
    return PrecisionReport(tuple(findings), steps, limits)


def _counted(progress: Callable[[str], None], name: str, total: int, done: int) -> None:
    progress(f"{name}: {done} of {total} examples")


def encode_error(low: Runner, reference: Reference) -> float:
    """Relative RMS error of what encode gives: that of the worst tensor of context and carry."""
    names = list(reference.start)
    distance = _Distance([reference.start], names)
    for rows in check.row_chunks(low, len(reference.signals[0])):
        distance.add(0, rows, low.read(low.encode(check.take(reference.observation, rows))))
    return distance.relative(0)


def encode_finding(low: Runner, reference: Reference, limits: Limits) -> Finding:
    """Whether a lowered encode graph is close to the fp32 model's."""
    error = encode_error(low, reference)
    return Finding(
        "encode_error", error <= limits.step_error, f"relative RMS error {error:.4f}, allowed {limits.step_error:g}"
    )


def life_findings(low: Runner, reference: Reference, limits: Limits, encoded: bool) -> list[Finding]:
    """Encode (close, where it is `encoded` lower, else equal), truthful signals, signs of life, and slots that do not see
    each other."""
    findings = [
        encode_finding(low, reference, limits) if encoded else check.encode_parity(low, reference, check.TOLERANCE)
    ]
    findings += check.truthful_signals(low, reference, check.TOLERANCE)
    findings += check.liveness(low, reference)
    findings.append(_slot_independence(low, reference, limits))
    return findings


def _slot_independence(low: Runner, reference: Reference, limits: Limits) -> Finding:
    """As in `check`, but rounding may tip a value into the next code, so that the size of the error counts, not its peak."""
    rows = check.row_chunks(low, len(reference.signals[0]))[0]
    names, carry = check.output_names(low), [spec.name for spec in low.model.carry]
    together = check.advance(low, low.encode(check.take(reference.observation, rows)), names)
    distance = _Distance([together], carry)
    for row in range(rows.stop):
        one = slice(row, row + 1)
        distance.add(0, one, check.advance(low, low.encode(check.take(reference.observation, one)), names))
    error = distance.relative(0)
    return Finding(
        "slot_independence",
        error <= limits.step_error / 4,
        f"alone and in company differ by {error:.1e} (relative RMS)",
    )


def task_findings(fp32: Traces, low: Traces, limits: Limits) -> list[Finding]:
    """Paired comparison on the same items: accuracy at full steps and under the learned rule, and where each halts."""
    findings = [_accuracy("accuracy_full", fp32.exact[:, -1], low.exact[:, -1], limits)]
    if not {"q_halt", "q_continue"} <= set(fp32.names):
        return findings
    ours, theirs = steps_taken(low, "learned"), steps_taken(fp32, "learned")
    rows = np.arange(len(fp32))
    findings.append(_accuracy("accuracy_learned", fp32.exact[rows, theirs - 1], low.exact[rows, ours - 1], limits))
    near, equal = float((np.abs(ours - theirs) <= 1).mean()), float((ours == theirs).mean())
    detail = (
        f"{near:.4f} of the items halt within one step of fp32 ({equal:.4f} at the same step), at least "
        f"{limits.halting:g} must"
    )
    findings.append(Finding("halting_agreement", near >= limits.halting, detail))
    growth = float(ours.mean() / theirs.mean() - 1)
    detail = (
        f"{ours.mean():.3f} steps on average, fp32 {theirs.mean():.3f}: {growth:+.2%}, allowed {limits.more_steps:+.0%}"
    )
    findings.append(Finding("mean_steps", growth <= limits.more_steps, detail))
    return findings


def _accuracy(name: str, fp32: Array, low: Array, limits: Limits) -> Finding:
    pairs = Paired.of(fp32, low)
    down, up = pairs.interval(limits.confidence)
    detail = (
        f"fp32 {fp32.mean():.4f}, lowered {low.mean():.4f} on {pairs.items} items: {pairs.lost} lost, {pairs.won} won; fall "
        f"{100 * pairs.loss:+.2f} points, {limits.confidence:.0%} interval {100 * down:+.2f}..{100 * up:+.2f}, allowed "
        f"{limits.points:+g}; McNemar p = {pairs.p_value:.3g}"
    )
    if up > limits.points / 100 >= pairs.loss:
        detail += "; the fall itself is within the limit, but more items are needed to show it"
    return Finding(name, up <= limits.points / 100, detail)


def headroom(ranges: Ranges, halves: Mapping[str, str]) -> dict[str, float]:
    """For each layer, how often the largest float16 value that follows from it fits into float16's range.

    halves: the values that are float16, with their layers (`rewrite.Lowered.halves`).
    """
    largest = ranges.largest
    room: dict[str, float] = {}
    for value, layer in halves.items():
        size = max(largest.get(value, 0.0), 1e-30)
        room[layer] = min(room.get(layer, math.inf), FP16_MAX / size)
    return room


def headroom_finding(room: Mapping[str, float], limits: Limits) -> Finding:
    """Whether every float16 value stays clear of overflow."""
    if not room:
        return Finding("fp16_headroom", True, "no value is float16")
    layer, least = min(room.items(), key=lambda item: item[1])
    detail = (
        f"largest float16 value {FP16_MAX / least:.4g} (after {layer}): 65504 is {least:.3g} times that, at least "
        f"{limits.headroom:g} wanted"
    )
    return Finding("fp16_headroom", least >= limits.headroom, detail)
