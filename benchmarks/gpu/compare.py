"""Steps and answers of our engines beside PyTorch on one device, in turn within one run, with the device's roofline.

    python -m benchmarks.gpu.compare                            the paper's size (27 M parameters) on the CUDA device here
    python -m benchmarks.gpu.compare --check                    only say whether there is a GPU to measure (exit code 2: no)
    python -m benchmarks.gpu.compare --case sudoku9 --device cpu    the same code on a CPU, to see that it runs

Engines that are not installed here are left out, with the reason in the report.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.gpu.ceilings import device_ceilings
from benchmarks.gpu.peers import peers
from sage_edge.bench.header import commit
from sage_edge.bench.roofline import predict
from sage_edge.bench.suite import RANDOM_ITEMS, Case
from sage_edge.bench.timing import interleave
from sage_edge.bundle import load_bundle
from sage_edge.config import load_yaml
from sage_edge.device import machine, version
from sage_edge.engines.accelerated import build_accelerated, bundle_precision
from sage_edge.engines.accelerator_cuda import CudaDevice
from sage_edge.engines.build import BuildRecipe, build, open_bundle, open_engine
from sage_edge.engines.gpu_recipe import choose_recipe
from sage_edge.engines.graph_cost import graph_cost
from sage_edge.engines.runner import Runner
from sage_edge.errors import MissingDependencyError, SageError
from sage_edge.export.checkpoint import open_model
from sage_edge.export.random_model import random_model_folder
from sage_edge.files import write_atomic
from sage_edge.models import bundle_of, locate, lowered_of, shipped

CASES = Path(__file__).resolve().parents[1] / "cases"
TARGETS = ("desktop", "torch", "ort-cuda", "torch-tensorrt")


def no_device() -> str:
    """Why nothing can be measured on a GPU here; empty when it can."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device (torch.cuda.is_available() is False)"
    try:
        with CudaDevice():
            return ""
    except MissingDependencyError as error:
        return str(error)


def driver() -> str | None:
    """The kernel driver as it names itself; None where that cannot be read."""
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return None


def engines(bundle: Path, slots: int, device: str, left_out: dict[str, str]) -> dict[str, Runner]:
    """Runners of every engine that can be built here; `left_out` gets the reason for each that cannot.

    On a GPU in fp32 and in fp16, lowered on random observations: only its speed is looked at, so nothing is said of its answers.
    """
    if device == "cpu":
        return {"sage-edge cpu fp32": open_engine(build(bundle, BuildRecipe(slots=slots)).path)}
    bundles = {"fp32": bundle}
    try:
        bundles["fp16"] = lowered_of(bundle, "fp16", load_bundle(bundle).model.random_observation(RANDOM_ITEMS))
    except SageError as error:
        left_out["sage-edge fp16"] = str(error)
    found: dict[str, Runner] = {}
    for precision, source in bundles.items():
        for target in TARGETS:
            name = f"sage-edge {target} {precision}"
            try:
                recipe = choose_recipe(target, bundle_precision(source)).with_slots(slots)
                found[name] = open_engine(build_accelerated(source, recipe).path)
            except (MissingDependencyError, SageError) as error:
                left_out[name] = str(error)
    return found


def steps(
    bundle: Path,
    runners: dict[str, Runner],
    contestants: dict[str, Any],
    batch: int,
    seconds: float,
    left_out: dict[str, str],
) -> dict[str, Any]:
    """Latency of one step at one batch size, everybody in turn; `left_out` gets those that fail, with the reason."""
    # All compiled contestants share one code object; past eight variants of it torch would quietly run eager.
    torch.compiler.reset()
    calls: dict[str, Callable[[], object]] = {}
    with open_bundle(bundle, batch) as plain:
        observation = plain.model.random_observation(batch)
        start = plain.read(plain.encode(observation))
    for name, runner in runners.items():
        state = runner.encode(observation)
        calls[name] = lambda runner=runner, state=state: runner.refine(state)  # type: ignore[misc]
    for name, peer in contestants.items():
        calls[name] = peer(start)
    for name in list(calls):
        try:
            calls[name]()
        except Exception as error:  # a compiler's errors share no base class; the others' figures are worth having
            left_out[f"{name}, batch {batch}"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            del calls[name]
    return {name: asdict(latency) for name, latency in interleave(calls, seconds * len(calls)).items()}


def measure(
    case: str, device: str, batches: list[int], seconds: float, progress: Callable[[str], None]
) -> dict[str, Any]:
    """The whole report. Raises what building raises for an engine that is there but fails."""
    chosen = load_yaml(CASES / f"{case}.yaml", Case)
    left_out: dict[str, str] = {}
    with TemporaryDirectory(prefix="sage-edge-gpu-") as temporary:
        if chosen.random:
            folder = Path(temporary) / case
            random_model_folder(folder, case, chosen.random)
        else:
            folder = shipped(chosen.engine) or Path(chosen.engine)
        progress("export")
        bundle = bundle_of(locate(chosen.engine) if chosen.engine else folder)
        most = load_bundle(bundle).model.max_steps
        model = open_model(folder)[1]
        progress("ceilings")
        ceilings = device_ceilings(device)
        progress("build")
        runners = engines(bundle, max(batches), device, left_out)
        rows = []
        for name in list(runners):
            try:
                runners[name].activate()
            except SageError as error:
                left_out[name] = str(error)
                del runners[name]
        for batch in batches:
            progress(f"batch {batch}")
            latency = steps(bundle, runners, peers(model, device), batch, seconds, left_out)
            best = asdict(predict("refine", graph_cost(bundle / "refine.onnx", batch), ceilings))
            answers = {name: 1e3 * batch / (most * entry["mean_ms"]) for name, entry in latency.items()}
            rows.append({"batch": batch, "latency": latency, "answers_per_s": answers, "roofline": best})
        described = {name: runner.describe() for name, runner in runners.items() if hasattr(runner, "describe")}
        for runner in runners.values():
            runner.deactivate()
    gpu = torch.cuda.get_device_name(0) if device == "cuda" else None
    return {
        "case": case, "command": "python -m benchmarks.gpu.compare " + " ".join(sys.argv[1:]), "device": device,
        "gpu": gpu, "driver": driver() if gpu else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": commit(), "machine": asdict(machine()),
        "python": platform.python_version(), "ceilings": asdict(ceilings), "rows": rows, "left_out": left_out,
        "engines": described,
        "versions": {n: version(n) for n in ("torch", "tensorrt", "onnxruntime", "onnxruntime-gpu", "cuda-bindings")},
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--check", action="store_true", help="measure nothing; exit code 2 without a GPU")
    parser.add_argument("--case", default="hrm-27m", help="a case of benchmarks/cases")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each contestant at each batch size")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu-CASE-NAME-COMMIT.json")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and (reason := no_device()):
        print(f"no GPU, nothing was run: {reason}", file=sys.stderr)
        return 2
    if chosen.check:
        return 0
    report = measure(
        chosen.case, chosen.device, chosen.batches, chosen.seconds, lambda stage: print(stage, file=sys.stderr)
    )
    name = (report["gpu"] or report["machine"]["architecture"]).replace(" ", "-")
    path = (
        chosen.output
        or Path("benchmarks/results") / f"gpu-{chosen.case}-{name}-{(report['commit'] or 'release')[:10]}.json"
    )
    write_atomic(path, json.dumps(report, indent=2, allow_nan=False) + "\n")
    for row in report["rows"]:
        print(f"batch {row['batch']}: at best {row['roofline']['milliseconds']:.3f} ms ({row['roofline']['bound']})")
        for contestant, entry in sorted(row["latency"].items(), key=lambda item: item[1]["p50_ms"]):
            print(f"  {contestant:36} {entry['p50_ms']:8.3f} ms  {row['answers_per_s'][contestant]:10.1f} answers/s")
    for contestant, reason in report["left_out"].items():
        print(f"left out: {contestant}: {reason}")
    print(f"report: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
