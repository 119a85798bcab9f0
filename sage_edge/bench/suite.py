"""The `sage-edge bench` run: one case, one report."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from sage_edge.bench import peers as peer_module
from sage_edge.bench.ceiling import gemm_ceiling
from sage_edge.bench.cold import cold_start
from sage_edge.bench.header import header
from sage_edge.bench.irp import Options as IrpOptions
from sage_edge.bench.irp import run_irp
from sage_edge.bench.slots import run_slots
from sage_edge.bench.timing import Latency, interleave
from sage_edge.bundle import BUNDLE_FILE
from sage_edge.dataset import Dataset, load_dataset
from sage_edge.device import version
from sage_edge.engines.build import BuildRecipe, build, open_engine
from sage_edge.engines.manifest import MANIFEST_FILE, load_manifest
from sage_edge.engines.runner import Runner
from sage_edge.errors import InputError, MissingDependencyError
from sage_edge.evaluate import acceptance_score, certificate_for, certified_scores, collect, oracle, score
from sage_edge.irp.calibrate import Promise
from sage_edge.irp.certificate import load_certificate, save_certificate
from sage_edge.irp.families import FAMILIES
from sage_edge.irp.traces import Traces
from sage_edge.models import bundle_of, engine_of, locate, lowered_of, lowering_of, shipped
from sage_edge.runtime import Answer, Session
from sage_edge.specs import Array, HRMConfig, ModelSpec

POLICIES = ("full", "learned")
OURS, INT8, EAGER = "sage-edge", "sage-edge int8", "PyTorch eager"
RANDOM_ITEMS = 16  # observations that set the ranges of a model with drawn weights
Report = dict[str, Any]
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Case:
    """What to measure: benchmarks/cases/*.yaml.

    engine: anything that names a model, or empty with `random`, a configuration whose weights are drawn (speed does not
    depend on them). data: a dataset folder, or empty for the model's own test split, if it has one. examples: how many
    of it. calibration: how many calibration examples an engine without a certificate gets. precisions: engines to show side
    by side; int8 is lowered first where it is not in the engine cache, which takes minutes for a trained model. batches:
    slots in flight for the step latency. seconds: time for each latency measurement.
    """

    name: str
    engine: str = ""
    random: HRMConfig | None = None
    data: str = ""
    examples: int = 512
    calibration: int = 960
    precisions: tuple[Literal["fp32", "int8"], ...] = ("fp32",)
    batches: tuple[int, ...] = (1, 8)
    seconds: float = 2.0
    cold_runs: int = 5

    def __post_init__(self) -> None:
        if bool(self.engine) == (self.random is not None):
            raise ValueError("exactly one of `engine` and `random` must be given")
        if not self.batches or min(self.batches) < 1 or self.examples < 1 or self.cold_runs < 1 or self.seconds <= 0:
            raise ValueError("batches, examples, cold_runs and seconds must be positive")
        if self.precisions not in (("fp32",), ("fp32", "int8")):
            raise ValueError("precisions: expected [fp32] or [fp32, int8]")


def run_case(
    case: Case, threads: int, with_peers: bool, progress: Progress, plots: Path | None = None, recalibrate: bool = True
) -> Report:
    """Measure one case.

    An engine without a certificate is calibrated first on the shipped model's own calibration split, if it has one, and
    keeps the certificate (`recalibrate` False: it is left as it is). plots: folder for pictures.

    Raises what building and loading raise, MissingDependencyError when peers lack their packages.
    """
    began = time.perf_counter()
    with TemporaryDirectory(prefix="sage-edge-bench-") as temporary:
        progress("build the engine", 0)
        target, bundle = _target(case, Path(temporary))
        folder = engine_of(target)
        step_gflop = load_manifest(folder)[1].step_gflop
        data = _data(case)
        runner = open_engine(folder, threads)
        contestants = _peers(target, bundle, threads, progress) if with_peers else {}
        report = _header(case.name, threads)
        with ExitStack() as stack:
            session = stack.enter_context(Session(runner, load_certificate(folder)))
            sessions = {OURS: session}
            if recalibrate and session.certificate is None:
                report["not_calibrated"] = _calibrate(session, case, folder, progress)
            report["certificate"] = asdict(session.certificate) if session.certificate else None
            if "int8" in case.precisions:
                low = _int8_engine(case, bundle, runner.model, threads, progress)
                sessions[INT8] = stack.enter_context(Session(open_engine(low, threads), load_certificate(low)))
                report["int8"] = {}
                if recalibrate and sessions[INT8].certificate is None:
                    report["int8"]["not_calibrated"] = _calibrate(sessions[INT8], case, low, progress)
                own = sessions[INT8].certificate
                report["int8"]["certificate"] = asdict(own) if own else None
            observation = _observation(runner, data, max(*case.batches, 64))
            progress("GEMM ceiling", 0)
            ceiling = gemm_ceiling(threads)
            report["gemm_ceiling_gflops"] = ceiling
            report["steps"] = [
                _steps(sessions, contestants, observation, batch, case.seconds, step_gflop, ceiling, progress)
                for batch in case.batches
            ]
            report["answers"] = [
                row
                for batch in case.batches
                for row in _answers(sessions, contestants, observation, batch, case.seconds, progress)
            ]
            if data is not None:
                report["accuracy"], traces = _accuracy(session, data, progress)
                if INT8 in sessions:
                    report["int8"]["accuracy"], _ = _accuracy(sessions[INT8], data, progress)
                if plots:
                    from sage_edge.bench.plots import draw

                    title = f"{case.name}, {len(data)} held-out examples"
                    report["plots"] = [str(p) for p in draw(traces, session.certificate, plots, title)]
        progress("cold start", 0)
        one = {name: array[:1] for name, array in observation.items()}
        report["cold_start"] = asdict(cold_start(folder, one, Path(temporary), case.cold_runs))
    report["seconds"] = time.perf_counter() - began
    return report


def run_slots_case(case: Case, threads: int, halt: str, progress: Progress) -> Report:
    """Measure slot refill on one case, which needs data. Raises what building and loading raise, InputError."""
    began = time.perf_counter()
    data = _data(case)
    if data is None:
        raise InputError(f"{case.engine or case.name}: the suite `slots` needs examples with answers; give --data DIR")
    progress("build the engine", 0)
    report = _header(case.name, threads)
    with open_engine(engine_of(case.engine), threads) as runner:
        report["slots"] = run_slots(runner, data, halt, 5 * case.seconds, 3, threads, progress)
    report["seconds"] = time.perf_counter() - began
    return report


def run_irp_suite(options: IrpOptions, threads: int, progress: Progress) -> Report:
    """Measure the plugins and the scheduler that shares a device among them. Raises what opening plugins raises."""
    began = time.perf_counter()
    report = {**_header("irp", threads), **run_irp(options, progress)}
    report["seconds"] = time.perf_counter() - began
    return report


def _header(name: str, threads: int) -> Report:
    return header(name, threads, {"onnxruntime": version("onnxruntime"), **peer_module.available()})


def _target(case: Case, temporary: Path) -> tuple[str, Path]:
    """What to open, and the bundle behind it."""
    if case.random is not None:
        try:
            from sage_edge.export.random_model import random_model_folder
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                f"case {case.name}: random weights need {error.name}: pip install 'sage-edge[peers]'"
            ) from error
        folder = temporary / case.name
        random_model_folder(folder, case.name, case.random)
        return str(folder), bundle_of(folder)
    folder = locate(case.engine)
    # An engine folder keeps its bundle.yaml but not the bundle's own graphs.
    return case.engine, folder if (folder / MANIFEST_FILE).is_file() else bundle_of(folder)


def _data(case: Case) -> Dataset | None:
    if case.data:
        return load_dataset(Path(case.data)).first(case.examples)
    own = shipped(case.engine) if case.engine else None
    return load_dataset(own / "data").first(case.examples) if own and (own / "data").is_dir() else None


def _calibrate(session: Session, case: Case, folder: Path, progress: Progress) -> str | None:
    """Give a shipped model's engine the certificate that `sage-edge calibrate` would, once; or say why there is none."""
    own = shipped(case.engine) if case.engine else None
    if own is None or not (own / "data" / "calibration" / "dataset.json").is_file():
        return "no calibration data comes with this model; `sage-edge calibrate ENGINE --data DIR`"
    data = load_dataset(own / "data" / "calibration").first(case.calibration)
    title = f"calibrate halting on {len(data)} examples (once for this engine)"
    progress(title, 0)
    try:
        made = certificate_for(session, folder, data, Promise(), FAMILIES, lambda n: progress(title, n / len(data)))
    except InputError as error:  # this model or this data cannot carry the default promise
        return str(error)
    save_certificate(folder, made)
    session.certificate = made
    return None


def _int8_engine(case: Case, bundle: Path, model: ModelSpec, threads: int, progress: Progress) -> Path:
    """The int8 engine of the same bundle; made where it is missing.

    Raises InputError when there is nothing to calibrate it on, GateError when it fails its gate.
    """
    lowered = bundle
    if (bundle / MANIFEST_FILE).is_file():
        raise InputError(f"{bundle}: an engine; to see int8 beside it, give the bundle that it was built from")
    if lowering_of(bundle) is None:
        own = shipped(case.engine) if case.engine else None
        data: Dataset | dict[str, Array]
        if case.random is not None:
            data = model.random_observation(RANDOM_ITEMS)  # weights that were never trained answer nothing rightly
        elif own is not None and (own / "data" / "calibration" / "dataset.json").is_file():
            data = load_dataset(own / "data" / "calibration")
        else:
            raise InputError(
                f"{case.engine}: no data to calibrate int8 on comes with it; make the engine with `sage-edge build BUNDLE "
                "--precision int8 --data DIR` and bench that"
            )
        lowered = lowered_of(
            bundle, "int8", data, threads=threads, progress=lambda stage: progress(f"int8: {stage}", 0)
        )
    progress("int8: build the engine", 0)
    return build(lowered, BuildRecipe()).path


def _observation(runner: Runner, data: Dataset | None, count: int) -> dict[str, Array]:
    if data is not None:
        return {name: array[:count] for name, array in data.observation.items()}
    return runner.model.random_observation(count)


def _peers(target: str, bundle: Path, threads: int, progress: Progress) -> dict[str, peer_module.Peer]:
    found = peer_module.available()
    if not found:
        raise MissingDependencyError("no peer is installed: pip install 'sage-edge[peers]'")
    contestants: dict[str, peer_module.Peer] = {}
    if "torch" in found:
        from sage_edge.export.checkpoint import open_model

        own = shipped(target)
        folder = own or Path(target)
        if not (folder / "recipe.yaml").is_file() and not (folder / "all_config.yaml").is_file():
            raise InputError(f"{target}: PyTorch peers need the model folder (recipe.yaml, checkpoint.safetensors)")
        progress("load PyTorch", 0)
        contestants |= peer_module.torch_peers(open_model(folder)[1], threads, compiled=True)
    if "openvino" in found and (bundle / BUNDLE_FILE).is_file():
        contestants |= peer_module.openvino_peer(bundle, threads)
    return contestants


def _steps(
    sessions: dict[str, Session], contestants: dict[str, peer_module.Peer], observation: dict[str, Array], batch: int,
    seconds: float, step_gflop: float, ceiling: float, progress: Progress,
) -> Report:  # fmt: skip
    """Latency of one refinement step, ours and the peers', in turn; step_gflop: of one slot."""
    title = f"step latency, batch {batch}"
    progress(title, 0)
    first = {name: array[:batch] for name, array in observation.items()}
    calls: dict[str, Callable[[], object]] = {}
    for name, session in sessions.items():
        calls[name] = partial(session.runner.refine, session.runner.encode(first))
    runner = sessions[OURS].runner
    start = runner.read(runner.encode(first))
    for name, peer in contestants.items():
        calls[name] = peer({key: array.copy() for key, array in start.items()})
    budget = seconds * len(calls)
    measured = interleave(calls, budget, progress=lambda done: progress(title, done))
    ours = measured[OURS]
    gflop = step_gflop * batch
    rate = gflop / ours.p50_ms * 1e3
    return {
        "batch": batch,
        "gflop": gflop,
        "gflops": rate,
        "fraction_of_ceiling": rate / ceiling,
        "latency": {name: asdict(latency) for name, latency in measured.items()},
        "times_ours": {name: latency.p50_ms / ours.p50_ms for name, latency in measured.items()},
        "times_eager": {name: latency.p50_ms / measured[EAGER].p50_ms for name, latency in measured.items()}
        if EAGER in measured
        else None,
    }


def _answers(
    sessions: dict[str, Session], contestants: dict[str, peer_module.Peer], observation: dict[str, Array], batch: int,
    seconds: float, progress: Progress,
) -> list[Report]:  # fmt: skip
    """From request to answer, `batch` requests at a time: ours under each policy, and the peers to the last step.

    The peers' way is the original one: every sequence of a batch runs to the last step.
    """
    title = f"answer latency, batch {batch}"
    progress(title, 0)
    runner = sessions[OURS].runner
    total = len(next(iter(observation.values())))
    answered: dict[tuple[str, str], list[Answer]] = {}
    for engine, session in sessions.items():
        answered |= {(engine, policy): [] for policy in (*POLICIES, *(["certified"] if session.certificate else []))}

    def ours(engine: str, policy: str) -> Callable[[], object]:
        done = answered[engine, policy]

        def run() -> object:
            rows = np.arange(len(done), len(done) + batch) % total
            done.extend(sessions[engine].infer({name: array[rows] for name, array in observation.items()}, policy))
            return done

        return run

    def theirs(peer: peer_module.Peer) -> Callable[[], object]:
        step = peer(runner.read(runner.encode({name: array[:batch] for name, array in observation.items()})))
        return lambda: [step() for _ in range(runner.model.max_steps)]

    calls = {key: ours(*key) for key in answered}
    calls |= {(name, "full"): theirs(peer) for name, peer in contestants.items()}
    by_title = {f"{engine} {policy}": call for (engine, policy), call in calls.items()}
    measured = interleave(
        by_title, seconds * len(calls), minimum_rounds=3, calls=2, progress=lambda done: progress(title, done)
    )
    rows = []
    for (engine, policy), whole in zip(calls, measured.values(), strict=True):
        own = answered.get((engine, policy), [])
        latency = Latency.of([a.milliseconds / 1e3 for a in own]) if own else whole
        steps = float(np.mean([a.steps for a in own])) if own else float(runner.model.max_steps)
        rows.append({"batch": batch, "engine": engine, "policy": policy, "mean_steps": steps,
                     "answers_per_s": 1e3 * batch / whole.mean_ms, "latency": asdict(latency)})  # fmt: skip
    return rows


def _accuracy(session: Session, data: Dataset, progress: Progress) -> tuple[Report, Traces]:
    title = f"accuracy on {len(data)} held-out examples"
    progress(title, 0)
    steps = session.runner.model.max_steps
    traces = collect(session, data, steps, lambda done: progress(title, done / len(data)))
    full = score(traces, "full")
    rows = []
    own = session.certificate
    certified = certified_scores(traces, own) if own else []
    for item in (*(score(traces, policy) for policy in POLICIES), *certified, oracle(traces)):
        lost = 100 * (full.exact_accuracy - item.exact_accuracy)
        rows.append({**asdict(item), "points_lost": lost, "steps_saved": 1 - item.mean_steps / full.mean_steps})
    settled = acceptance_score(traces, own) if own else None
    return {"data": str(data.path), "examples": len(data), "policies": rows, "settled": settled}, traces
