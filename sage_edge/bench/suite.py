"""The `sage-edge bench` run: one case, one report."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from sage_edge import __version__
from sage_edge.bench import peers as peer_module
from sage_edge.bench.ceiling import gemm_ceiling, matmul_gflop
from sage_edge.bench.cold import cold_start
from sage_edge.bench.slots import run_slots
from sage_edge.bench.timing import Latency, interleave
from sage_edge.bundle import BUNDLE_FILE
from sage_edge.dataset import Dataset, load_dataset
from sage_edge.device import machine, version
from sage_edge.engines.build import open_engine
from sage_edge.engines.runner import Runner
from sage_edge.errors import InputError, MissingDependencyError
from sage_edge.evaluate import collect, oracle, score
from sage_edge.models import bundle_of, engine_of, locate, shipped
from sage_edge.runtime import Session
from sage_edge.specs import Array, HRMConfig

POLICIES = ("full", "learned", "patience:1", "entropy:0.05", "slope:0.01,3")
Report = dict[str, Any]
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Case:
    """What to measure: benchmarks/cases/*.yaml.

    engine: anything that names a model, or empty with `random`, a configuration whose weights are drawn (speed does not
    depend on them). data: a dataset folder, or empty for the model's own test split, if it has one. examples: how many
    of it. batches: slots in flight for the step latency. seconds: time for each latency measurement.
    """

    name: str
    engine: str = ""
    random: HRMConfig | None = None
    data: str = ""
    examples: int = 512
    batches: tuple[int, ...] = (1, 8)
    seconds: float = 3.0
    cold_runs: int = 5

    def __post_init__(self) -> None:
        if bool(self.engine) == (self.random is not None):
            raise ValueError("exactly one of `engine` and `random` must be given")
        if not self.batches or min(self.batches) < 1 or self.examples < 1 or self.cold_runs < 1 or self.seconds <= 0:
            raise ValueError("batches, examples, cold_runs and seconds must be positive")


def run_case(case: Case, threads: int, with_peers: bool, progress: Progress) -> Report:
    """Measure one case. Raises what building and loading raise, MissingDependencyError when peers lack their packages."""
    began = time.perf_counter()
    with TemporaryDirectory(prefix="sage-edge-bench-") as temporary:
        progress("build the engine", 0)
        target, bundle = _target(case, Path(temporary))
        folder = engine_of(target)
        data = _data(case)
        runner = open_engine(folder, threads)
        contestants = _peers(target, bundle, threads, progress) if with_peers else {}
        report = _header(case, threads)
        with Session(runner) as session:
            observation = _observation(runner, data, max(*case.batches, 64))
            progress("GEMM ceiling", 0)
            ceiling = gemm_ceiling(threads)
            report["gemm_ceiling_gflops"] = ceiling
            report["steps"] = [
                _steps(runner, contestants, observation, batch, case.seconds, bundle, ceiling, progress)
                for batch in case.batches
            ]
            report["answers"] = [
                _answers(session, observation, batch, policy, case.seconds, progress)
                for batch in case.batches
                for policy in ("full", "learned")
            ]
            if data is not None:
                report["accuracy"] = _accuracy(session, data, progress)
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
    report = _header(case, threads)
    with open_engine(engine_of(case.engine), threads) as runner:
        report["slots"] = run_slots(runner, data, halt, 5 * case.seconds, 3, threads, progress)
    report["seconds"] = time.perf_counter() - began
    return report


def _header(case: Case, threads: int) -> Report:
    """What every report begins with: case, command, machine, versions."""
    return {
        "case": case.name, "command": "sage-edge " + " ".join(sys.argv[1:]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": _commit(),
        "machine": asdict(machine()), "threads": threads, "python": platform.python_version(),
        "versions": {"sage-edge": __version__, "onnxruntime": version("onnxruntime"), **peer_module.available()},
    }  # fmt: skip


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
    return case.engine, folder if (folder / "manifest.yaml").is_file() else bundle_of(folder)


def _data(case: Case) -> Dataset | None:
    if case.data:
        return load_dataset(Path(case.data)).first(case.examples)
    own = shipped(case.engine) if case.engine else None
    return load_dataset(own / "data").first(case.examples) if own and (own / "data").is_dir() else None


def _observation(runner: Runner, data: Dataset | None, count: int) -> dict[str, Array]:
    if data is not None:
        return {name: array[:count] for name, array in data.observation.items()}
    rng = np.random.default_rng(0)
    return {
        s.name: rng.integers(s.minimum or 0, (s.maximum or 0) + 1, (count, *s.item_shape)).astype(s.dtype)
        for s in runner.model.observation
    }


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
    runner: Runner, contestants: dict[str, peer_module.Peer], observation: dict[str, Array], batch: int,
    seconds: float, bundle: Path, ceiling: float, progress: Progress,
) -> Report:  # fmt: skip
    """Latency of one refinement step, ours and the peers', in turn."""
    title = f"step latency, batch {batch}"
    progress(title, 0)
    state = runner.encode({name: array[:batch] for name, array in observation.items()})
    calls: dict[str, Callable[[], object]] = {"sage-edge": lambda: runner.refine(state)}
    for name, peer in contestants.items():
        calls[name] = peer(runner.read(state))
    budget = seconds * len(calls)
    measured = interleave(calls, budget, progress=lambda done: progress(title, done))
    graph = bundle / "refine.onnx"
    gflop = matmul_gflop(graph, batch) if (bundle / BUNDLE_FILE).is_file() else None
    ours = measured["sage-edge"]
    rate = gflop / ours.p50_ms * 1e3 if gflop else None
    return {
        "batch": batch,
        "gflop": gflop,
        "gflops": rate,
        "fraction_of_ceiling": rate / ceiling if rate else None,
        "latency": {name: asdict(latency) for name, latency in measured.items()},
        "times_ours": {name: latency.p50_ms / ours.p50_ms for name, latency in measured.items()},
    }


def _answers(
    session: Session, observation: dict[str, Array], batch: int, policy: str, seconds: float, progress: Progress
) -> Report:
    """Latency from request to answer with `batch` requests at a time, and answers per second."""
    title = f"answers, batch {batch}, {policy}"
    total = len(next(iter(observation.values())))
    latencies: list[float] = []
    steps: list[int] = []
    began = time.perf_counter()
    at = 0
    while (spent := time.perf_counter() - began) < seconds or len(latencies) < 2 * batch:
        progress(title, min(1.0, spent / seconds))
        rows = np.arange(at, at + batch) % total
        answers = session.infer({name: array[rows] for name, array in observation.items()}, policy)
        latencies += [answer.milliseconds / 1e3 for answer in answers]
        steps += [answer.steps for answer in answers]
        at += batch
    elapsed = time.perf_counter() - began
    return {"batch": batch, "policy": policy, "answers_per_s": len(latencies) / elapsed,
            "mean_steps": float(np.mean(steps)), "latency": asdict(Latency.of(latencies))}  # fmt: skip


def _accuracy(session: Session, data: Dataset, progress: Progress) -> Report:
    title = f"accuracy on {len(data)} held-out examples"
    progress(title, 0)
    steps = session.runner.model.max_steps
    traces = collect(session, data, steps, lambda done: progress(title, done / len(data)))
    full = score(traces, "full")
    rows = []
    for item in (*(score(traces, policy) for policy in POLICIES), oracle(traces)):
        lost = 100 * (full.exact_accuracy - item.exact_accuracy)
        rows.append({**asdict(item), "points_lost": lost, "steps_saved": 1 - item.mean_steps / full.mean_steps})
    return {"data": str(data.path), "examples": len(data), "policies": rows}


def _commit() -> str | None:
    """Commit of the sage-edge source tree this runs from, with `+` when it has changes; None outside of one."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # An installation inside somebody else's repository must not report that repository's commit.
        if not (Path(git("rev-parse", "--show-toplevel")) / "sage_edge" / "bench" / Path(__file__).name).is_file():
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
