"""Everything that lowering measures on one model: ranges, screenings of plans, and the final judgement of one.

The data is divided once, by a fixed seed: a first share sets the ranges and screens plans, the rest, which had no part in
any choice, decides.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx

from sage_edge.bundle import Bundle, LowerableName
from sage_edge.check import Finding, Reference, record
from sage_edge.dataset import Dataset
from sage_edge.engines.build import BuildRecipe, build, open_engine
from sage_edge.engines.runner import Runner
from sage_edge.errors import InputError
from sage_edge.evaluate import collect
from sage_edge.irp.paired import items_to_show
from sage_edge.irp.traces import Traces
from sage_edge.precision.equalise import equalise, find_pairs
from sage_edge.precision.gate import (
    Limits,
    PrecisionReport,
    encode_error,
    encode_finding,
    headroom,
    headroom_finding,
    life_findings,
    step_errors,
    step_findings,
    task_findings,
)  # fmt: skip
from sage_edge.precision.judge import judging_runner, write_judging
from sage_edge.precision.layers import LOWERABLE, Layer, find_layers
from sage_edge.precision.ranges import Ranges, collect_encode_ranges, collect_ranges
from sage_edge.precision.rewrite import Lowered, lower
from sage_edge.runtime import Session
from sage_edge.specs import Array, Precision

Plan = dict[str, Precision]

SLOTS = 16
DESIGN_SHARE = 0.25
DESIGN_ITEMS = 320  # of the design share, this many are enough to screen plans
RANGE_ITEMS = 128  # ... and this many, at every step, to set ranges
CHANNEL_ITEMS = 32  # ... or to balance channels, which only need to be of one size roughly
REFERENCE_ITEMS = 32  # for the errors of steps: each is compared at every step
ALONE_ITEMS = 8  # for the order of layers
# Screening is meant to find what is plainly broken: the final judgement has its own items and the full confidence.
SCREEN_CONFIDENCE = 0.5
SEED = 0


@dataclass(frozen=True)
class Screened:
    """A plan on the design items: whether it passed, the names of findings that failed, mean error of its steps."""

    passed: bool
    failed: tuple[str, ...]
    error: float


def data_digest(data: Dataset | dict[str, Array]) -> str:
    """Hex SHA-256 of what a lowering depends on: a dataset, or observations alone."""
    if isinstance(data, Dataset):
        return data.sha256
    digest = hashlib.sha256()
    for name, array in sorted(data.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class Workbench:
    """One fp32 model and its data; a context manager. `layers`, `pairs`, `ranges` (by graph), `items` are facts about them.

    data: a dataset, or observations alone: then accuracy is not judged. threads: CPU threads of every runner. attempts: how
    many plans may be put to `judge`. Raises InputError for data that does not fit the model or cannot show what is asked.
    """

    def __init__(
        self, source: Path, bundle: Bundle, data: Dataset | dict[str, Array], limits: Limits, threads: int,
        progress: Callable[[str], None], attempts: int = 1,
    ) -> None:  # fmt: skip
        self.source, self.bundle, self.limits, self.threads, self.progress = source, bundle, limits, threads, progress
        self.data = data if isinstance(data, Dataset) else None
        self.digest = data_digest(data)
        whole = data.observation if isinstance(data, Dataset) else data
        self.observation = bundle.model.validate_observation(whole, "calibration data")
        self.items = len(next(iter(self.observation.values())))
        order = np.random.default_rng(SEED).permutation(self.items)
        design = math.ceil(DESIGN_SHARE * self.items) if self.data is not None else self.items
        self.design, self.certify = order[:design][:DESIGN_ITEMS], order[design:]
        self._require_items(attempts)
        self._screened: dict[tuple[tuple[str, str], ...], Screened] = {}

    def _require_items(self, attempts: int) -> None:
        """Raise InputError when the final judgement could not pass even if nothing differed."""
        needed = items_to_show(self.limits.points / 100, self._confidence(attempts))
        if self.data is not None and len(self.certify) < needed:
            raise InputError(
                f"{self.data.path}: too little data: of {self.items} examples {len(self.certify)} are left to judge; they cannot "
                f"show a fall of at most {self.limits.points:g} points; about {math.ceil(needed / (1 - DESIGN_SHARE)) + 2} would "
                "do if few answers differ"
            )

    def _confidence(self, attempts: int) -> float:
        """The confidence of each of `attempts` judgements, so that all of them together keep the promised one."""
        return 1 - (1 - self.limits.confidence) / attempts

    def __enter__(self) -> Workbench:
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="sage-edge-precision-")))
        self.progress("build the fp32 engine")
        engine = build(self.source, BuildRecipe(slots=SLOTS)).path
        self.fp32: Runner = self._stack.enter_context(open_engine(engine, self.threads))
        self._calibrate()
        self.progress("fp32 reference")
        self._reference = record(self.fp32, self._rows(self.design[:REFERENCE_ITEMS]))
        self._design_traces: Traces | None = None
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _calibrate(self) -> None:
        """Balance channels, then measure the ranges of everything that may be lowered, over all steps."""
        self.models: dict[LowerableName, onnx.ModelProto] = {
            name: onnx.load(str(self.source / f"{name}.onnx"), load_external_data=False) for name in LOWERABLE
        }
        self.layers = tuple(layer for name, model in self.models.items() for layer in find_layers(model, name))
        refine = self.models["refine"]
        self.pairs = find_pairs(refine, self._layers_of("refine"))
        graph = self.source / "refine.onnx"
        if self.pairs:
            consumed = [name for pair in self.pairs for name in pair.consumer.inputs]
            equalise(refine, self.pairs, self._measure("channels", graph, consumed, CHANNEL_ITEMS).channels)
            graph = self._folder / "equalised.onnx"
            onnx.save(refine, str(graph))
        self.ranges = {"refine": self._measure("ranges", graph, self._watched("refine"), RANGE_ITEMS)}
        if watched := self._watched("encode"):
            rows = self._rows(self.design[:RANGE_ITEMS])
            self.ranges["encode"] = collect_encode_ranges(self.source, self.bundle, watched, rows, self.threads)

    def _layers_of(self, name: LowerableName) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.graph == name)

    def _encode_lowered(self, plan: Mapping[str, Precision]) -> bool:
        return any(plan.get(layer.name, "fp32") != "fp32" for layer in self._layers_of("encode"))

    def _watched(self, name: LowerableName) -> list[str]:
        """The values of a graph whose ranges lowering wants."""
        layers = self._layers_of(name)
        halves = lower(self.models[name], {layer.name: "fp16" for layer in layers}, {}, name).halves
        return [*(value for layer in layers for value in (*layer.inputs, *layer.results)), *halves]

    def _measure(self, what: str, graph: Path, values: Sequence[str], items: int) -> Ranges:
        rows = self.design[:items]

        def progress(done: int) -> None:
            self.progress(f"{what} over all steps: {done} of {len(rows)} items")

        return collect_ranges(self.source, graph, self.bundle, values, self._rows(rows), self.threads, progress)

    def lowered(self, plan: Mapping[str, Precision]) -> dict[LowerableName, Lowered]:
        """The graphs in which `plan` lowers anything, rewritten with the measured ranges."""
        made: dict[LowerableName, Lowered] = {}
        for name, model in self.models.items():
            own = {layer.name: plan[layer.name] for layer in self._layers_of(name) if layer.name in plan}
            if set(own.values()) - {"fp32"}:
                made[name] = lower(model, own, self.ranges[name].largest, name)
        return made

    def headroom(self, lowered: Mapping[LowerableName, Lowered]) -> dict[str, float]:
        """For each lowered layer, how often its largest float16 value fits into float16's range."""
        return {
            layer: room
            for name, one in lowered.items()
            for layer, room in headroom(self.ranges[name], one.halves).items()
        }

    def crowded(self, plan: Plan) -> dict[str, float]:
        """The layers whose float16 values come too close to the end of float16's range, with their headroom."""
        return {
            name: value for name, value in self.headroom(self.lowered(plan)).items() if value < self.limits.headroom
        }

    def alone(self, name: str, precision: Precision) -> float:
        """Relative RMS error with only this layer lowered: of a step, the mean over the steps of a few items, or of what
        encode gives."""
        self.progress(f"sensitivity of {name}")
        few = _first(self._reference, ALONE_ITEMS)
        with self._runner({name: precision}) as runner:
            if self._encode_lowered({name: precision}):
                return encode_error(runner, few)
            return float(np.mean([step.error for step in step_errors(runner, few)]))

    def screen(self, plan: Plan) -> Screened:
        """Judge a plan on the design items, cheapest questions first. Nothing lowered always passes."""
        key = tuple(sorted(plan.items()))
        if key not in self._screened:
            self._screened[key] = self._screen(plan)
        return self._screened[key]

    def _screen(self, plan: Plan) -> Screened:
        if set(plan.values()) <= {"fp32"}:
            return Screened(True, (), 0.0)
        count = sum(precision != "fp32" for precision in plan.values())
        self.progress(f"screen a graph with {count} of {len(plan)} layers lowered")
        with self._runner(plan) as runner:
            steps = step_errors(runner, self._reference)
            findings = step_findings(steps, self.limits)
            if self._encode_lowered(plan):
                findings.append(encode_finding(runner, self._reference, self.limits))
            if self.data is not None and all(f.passed for f in findings):
                loose = replace(self.limits, confidence=SCREEN_CONFIDENCE)
                findings += task_findings(self._fp32_design(), self._traces(runner, self.design), loose)
        failed = tuple(f.name for f in findings if not f.passed)
        return Screened(not failed, failed, float(np.mean([step.error for step in steps])))

    def judge(self, plan: Plan, attempts: int) -> PrecisionReport:
        """The gate on items that had no part in choosing `plan`; attempts: among how many judgements the error is divided."""
        self.progress(f"final gate on {len(self.certify) or len(self.design)} items")
        lowered = self.lowered(plan)
        with self._runner(plan) as runner:
            steps = step_errors(runner, self._reference, self.fp32)
            findings = step_findings(steps, self.limits)
            findings += life_findings(runner, self._reference, self.limits, self._encode_lowered(plan))
            findings.append(headroom_finding(self.headroom(lowered), self.limits))
            if self.data is not None:
                strict = replace(self.limits, confidence=self._confidence(attempts))
                findings += task_findings(self._fp32_certify(), self._traces(runner, self.certify), strict)
            else:
                findings.append(Finding("accuracy", True, "not judged: no dataset with answers was given"))
        return PrecisionReport(tuple(findings), steps, self.limits)

    @contextmanager
    def _runner(self, plan: Mapping[str, Precision]) -> Iterator[Runner]:
        with TemporaryDirectory(dir=self._folder) as temporary:
            lowered = {name: one.model for name, one in self.lowered(plan).items()}
            write_judging(self.source, lowered, Path(temporary))
            with judging_runner(Path(temporary), self.bundle.model, SLOTS, self.threads, self.fp32.digest) as runner:
                yield runner

    def _rows(self, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> dict[str, Array]:
        return {name: array[rows] for name, array in self.observation.items()}

    def _traces(self, runner: Runner, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Traces:
        assert self.data is not None
        return collect(Session(runner), self.data.take(rows), self.bundle.max_steps)

    def _fp32_design(self) -> Traces:
        if self._design_traces is None:
            self._design_traces = self._traces(self.fp32, self.design)
        return self._design_traces

    def _fp32_certify(self) -> Traces:
        if self._certify_traces is None:
            self.progress(f"fp32 answers to {len(self.certify)} items")
            self._certify_traces = self._traces(self.fp32, self.certify)
        return self._certify_traces

    _certify_traces: Traces | None = None


def _first(reference: Reference, count: int) -> Reference:
    """The first `count` observations of a reference."""

    def cut(arrays: dict[str, Array]) -> dict[str, Array]:
        return {name: array[:count] for name, array in arrays.items()}

    return Reference(
        cut(reference.observation),
        cut(reference.start),
        tuple(cut(carry) for carry in reference.carries),
        tuple(signals[:count] for signals in reference.signals),
        tuple(cut(outputs) for outputs in reference.outputs),
    )
