"""From a bundle to an engine for an accelerator, and back to a runner: what TensorRT, torch and ONNX Runtime share.

The order is that of the errors: what can be said without a GPU is said first; nothing long begins before memory, device
and versions were looked at; nothing is left behind by a build that fails or is interrupted.
"""

from __future__ import annotations

import hashlib
import importlib
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from sage_edge import check as gate
from sage_edge.bundle import BUNDLE_FILE, GRAPH_NAMES, REFERENCE_FILE, Bundle, GateResult, load_bundle
from sage_edge.config import dump_yaml
from sage_edge.engines.accelerator import Device, DeviceInfo, OutOfMemoryError
from sage_edge.engines.build import BUILDER_VERSION, Built, cache_directory
from sage_edge.engines.device_memory import item_bytes
from sage_edge.engines.device_runner import DeviceRunner
from sage_edge.engines.engine_target import EngineTarget, Made, Report
from sage_edge.engines.gpu_recipe import Engine, GpuRecipe, refuse_capability
from sage_edge.engines.graph_cost import GraphCost, graph_cost, lowest_precision
from sage_edge.engines.manifest import FORMAT, MANIFEST_FILE, Manifest, load_manifest
from sage_edge.errors import GateError, InputError
from sage_edge.files import replacing_directory, sha256

MODULES: dict[Engine, tuple[str, str]] = {
    "tensorrt": ("sage_edge.engines.target_tensorrt", "TensorRTTarget"),
    "torch": ("sage_edge.engines.target_torch", "TorchTarget"),
    "torch-tensorrt": ("sage_edge.engines.target_torch", "TorchTensorRTTarget"),
    "ort-cuda": ("sage_edge.engines.target_ort", "OrtCudaTarget"),
}


def target_of(engine: Engine) -> EngineTarget:
    """The target that builds and runs this kind of engine."""
    module, name = MODULES[engine]
    made: EngineTarget = getattr(importlib.import_module(module), name)()
    return made


def bundle_costs(folder: Path, slots: int) -> dict[str, GraphCost]:
    return {name: graph_cost(folder / f"{name}.onnx", slots) for name in GRAPH_NAMES}


def bundle_precision(folder: Path) -> str:
    """The lowest precision in which a bundle multiplies: what chooses its recipe."""
    return lowest_precision(list(bundle_costs(folder, 1).values()))


def memory_estimate(bundle: Bundle, costs: dict[str, GraphCost], slots: int) -> int:
    """Device bytes that running `slots` slots takes at least: weights, activations, two states of each size, staging."""
    model = bundle.model
    state = sum(item_bytes(s) for s in (*model.context, *model.carry, *model.carry))
    encode, decode = bundle.graphs.encode, bundle.graphs.decode
    edges = sum(item_bytes(s) for s in (*encode.inputs, *encode.outputs, *decode.outputs))
    weights = sum(cost.weight_bytes for cost in costs.values())
    peak = max(cost.peak for cost in costs.values())
    return weights + peak + slots * (2 * state + edges)


def build_accelerated(bundle_path: Path, recipe: GpuRecipe, output: Path | None = None,
                      report: Report = lambda stage, done: None, target: EngineTarget | None = None) -> Built:  # fmt: skip
    """Build the engine of a bundle for the accelerator at hand, or find it in the cache.

    Raises InputError for a bundle, recipe and device that do not fit together, MissingDependencyError for what is not
    installed or not there, OutOfMemoryError when not even one slot can be built, GateError when the engine is not the model.
    """
    bundle = load_bundle(bundle_path)
    precision = bundle_precision(bundle_path)
    if precision != recipe.precision:
        raise InputError(
            f"{bundle_path}: multiplies in {precision}, the recipe {recipe.target} is for {recipe.precision}; export the "
            f"model with --precision {recipe.precision}, or choose another recipe"
        )
    target = target or target_of(recipe.engine)
    target.require()
    target.refuse_bundle(bundle_path, bundle)
    device = target.device()
    with device:
        info = device.info
        refuse_device(recipe, info)
        notes = refuse_memory(bundle, bundle_costs(bundle_path, recipe.slots), recipe.slots, device)
    digest = sha256(bundle_path / BUNDLE_FILE)
    versions = engine_versions(target)
    key = accelerated_key(digest, recipe, info, versions)
    path = output or cache_directory() / "engines" / f"{bundle.name}-{recipe.target}-{key}"
    if found := _cached(path, key):
        return found
    with replacing_directory(path, MANIFEST_FILE) as folder:
        for file in (BUNDLE_FILE, REFERENCE_FILE):
            shutil.copyfile(bundle_path / file, folder / file)
        made = make_smaller(lambda smaller: target.make(bundle_path, bundle, smaller, folder, report), recipe)
        report("gate", 1.0)
        runner = DeviceRunner(
            bundle, made.recipe.slots, digest, target.device(), target.programs(folder, bundle, made.recipe),
            made.recipe.options, made.recipe.shapes,
        )  # fmt: skip
        findings, run_notes = run_gate(runner, folder / REFERENCE_FILE, bundle)
        manifest = Manifest(
            format="sage-edge-engine/1", name=bundle.name, target=recipe.target, precision=bundle.precision,
            slots=made.recipe.slots, threads=0, bundle_sha256=digest, device=info.key, versions=versions,
            files={file.name: sha256(file) for file in sorted(folder.iterdir())}, fused={}, gate=findings,
            key=key, gpu=made.recipe, notes=(*notes, *made.notes, *run_notes),
        )  # fmt: skip
        (folder / MANIFEST_FILE).write_text(dump_yaml(manifest), encoding="utf-8")
    return Built(path, manifest, cached=False)


def engine_versions(target: EngineTarget) -> dict[str, str]:
    return {"sage-edge-builder": BUILDER_VERSION, **target.versions()}


def accelerated_key(digest: str, recipe: GpuRecipe, info: DeviceInfo, versions: dict[str, str]) -> str:
    """Name of the engine in the cache: content, recipe as asked for, device and versions."""
    parts = [FORMAT, digest, repr(recipe), info.key, repr(sorted(versions.items()))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


def _cached(path: Path, key: str) -> Built | None:
    if not (path / MANIFEST_FILE).is_file():
        return None
    try:
        manifest, _ = load_manifest(path)
    except InputError:  # damaged or of an older format: made anew
        return None
    return Built(path, manifest, cached=True) if manifest.key == key else None


def refuse_device(recipe: GpuRecipe, info: DeviceInfo) -> None:
    """Raise InputError when this device is not what the recipe is for."""
    if info.capability is None:
        return
    found = f"{info.capability[0]}.{info.capability[1]}"
    if recipe.capabilities and found not in recipe.capabilities:
        raise InputError(
            f"target {recipe.target} is for compute capability {' or '.join(recipe.capabilities)}; this machine has {info.name} "
            f"({found}). Engines are built on the device that runs them: build there, or use --target desktop here"
        )
    refuse_capability(recipe.precision, info.capability, info.name)


def refuse_memory(bundle: Bundle, costs: dict[str, GraphCost], slots: int, device: Device) -> list[str]:
    """Notes on the memory that running takes; InputError when the device could not hold it even if it were empty."""
    needed, free, total = memory_estimate(bundle, costs, slots), device.free_bytes(), device.info.memory_bytes
    if needed > total:
        raise InputError(
            f"{bundle.name}: {slots} slots take at least {needed >> 20} MiB of device memory, {device.info.name} has "
            f"{total >> 20}; build with fewer --slots or a smaller precision"
        )
    if needed > free:
        return [f"{slots} slots take at least {needed >> 20} MiB of device memory; {free >> 20} MiB were free"]
    return []


def make_smaller(make: Callable[[GpuRecipe], Made], recipe: GpuRecipe) -> Made:
    """Build; on lack of memory again with the next smaller profile, down to one slot. Raises OutOfMemoryError."""
    notes: list[str] = []
    while True:
        try:
            made = make(recipe)
            return replace(made, notes=(*notes, *made.notes))
        except OutOfMemoryError as error:
            smaller = [shape for shape in recipe.shapes if shape < recipe.slots]
            if not smaller:
                raise OutOfMemoryError(
                    f"out of memory even for one slot: {error}; close other programs, lower tensorrt.workspace_mib and "
                    "tactic_dram_mib in the recipe, or export with a smaller precision"
                ) from error
            notes.append(
                f"{recipe.slots} slots did not fit into memory while building ({error}); built for {smaller[-1]}"
            )
            recipe = recipe.with_slots(smaller[-1])


def run_gate(runner: DeviceRunner, reference_file: Path, bundle: Bundle) -> tuple[tuple[GateResult, ...], list[str]]:
    """The gate on the built engine: parity for an fp32 bundle, the limits of its lowering for any other.

    Raises GateError naming what failed. Gives the findings, and the runner's notes.
    """
    reference = gate.load_reference(reference_file)
    with runner:
        if bundle.lowering is None:
            findings = gate.check(runner, reference).findings
        else:
            from sage_edge.precision.gate import check_lowered

            findings = check_lowered(runner, reference, bundle.lowering).findings
        notes = list(runner.notes)
    if failed := [finding for finding in findings if not finding.passed]:
        reasons = "; ".join(f"{f.name}: {f.detail}" for f in failed)
        raise GateError(f"{bundle.name}: the gate refused the engine: {reasons}")
    return tuple(GateResult(**asdict(finding)) for finding in findings), notes


def open_accelerated(
    folder: Path, manifest: Manifest, bundle: Bundle, target: EngineTarget | None = None
) -> DeviceRunner:
    """A runner, not yet active, for an engine folder whose digests were verified. Raises MissingDependencyError.

    A device or version that it was not built for is refused when it is activated (InputError).
    """
    recipe = manifest.gpu
    if recipe is None:
        raise InputError(f"{folder}: the manifest names target {manifest.target!r} but holds no recipe; build it again")
    target = target or target_of(recipe.engine)
    target.require()
    used = target

    def admits(info: DeviceInfo) -> None:
        try:
            used.refuse_foreign(recipe, manifest.device, manifest.versions, info)
        except InputError as error:
            raise InputError(f"{folder}: {error}") from error

    return DeviceRunner(bundle, recipe.slots, manifest.bundle_sha256, target.device(manifest.device),
                        target.programs(folder, bundle, recipe), recipe.options, recipe.shapes, admits)  # fmt: skip
