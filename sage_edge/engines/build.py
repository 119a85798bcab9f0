"""From a bundle to an engine for this machine: fuse, optimize, gate, store under a key in the engine cache."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from sage_edge import check as gate
from sage_edge.bundle import BUNDLE_FILE, GRAPH_NAMES, REFERENCE_FILE, Bundle, GateResult, load_bundle
from sage_edge.config import dump_yaml
from sage_edge.device import machine, usable_cores, version
from sage_edge.engines.manifest import FORMAT, MANIFEST_FILE, Manifest, load_manifest
from sage_edge.engines.ort import OrtRunner
from sage_edge.engines.runner import Runner
from sage_edge.errors import GateError, InputError
from sage_edge.files import replacing_directory, sha256

# Part of the cache key: raise it whenever the same bundle would become a different engine.
BUILDER_VERSION = "3"


@dataclass(frozen=True)
class BuildRecipe:
    """How to build: engines/*.yaml. threads 0 means all usable cores at the time the engine is opened.

    precision: that of the bundle when absent; `int8` needs a bundle lowered to it (`precision.lower`). spin: whether
    the threads of a step wait busily for each other: faster, but they hold their cores while they wait.
    """

    target: Literal["cpu"] = "cpu"
    precision: Literal["fp32", "int8"] | None = None
    slots: int = 8
    threads: int = 0
    spin: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.slots <= 1024:
            raise ValueError(f"slots: expected 1..1024, found {self.slots}")
        if not 0 <= self.threads <= 1024:
            raise ValueError(f"threads: expected 0..1024, found {self.threads}")


@dataclass(frozen=True)
class Built:
    """A built engine: where it lies, and whether it was found in the cache."""

    path: Path
    manifest: Manifest
    cached: bool


def cache_directory() -> Path:
    """Where engines are kept: $SAGE_EDGE_CACHE, else $XDG_CACHE_HOME/sage-edge, else ~/.cache/sage-edge."""
    if own := os.environ.get("SAGE_EDGE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sage-edge"


def versions() -> dict[str, str]:
    """Versions that an engine for the CPU depends on."""
    return {"sage-edge-builder": BUILDER_VERSION, "onnxruntime": version("onnxruntime") or "unknown"}


def engine_key(bundle_sha256: str, recipe: BuildRecipe) -> str:
    """Name of the engine in the cache: content, recipe, device and versions."""
    parts = [FORMAT, bundle_sha256, repr(recipe), machine().key, repr(sorted(versions().items()))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


def build(
    bundle_path: Path,
    recipe: BuildRecipe,
    output: Path | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Built:
    """Build the engine of a bundle, or find it in the cache.

    output: a folder of the user's instead of the cache; replaced only when it is empty or an engine.
    progress: called with the name of each stage. Raises InputError / IntegrityError for a bad bundle and GateError,
    naming the failed checks, when the engine is not the model; nothing is left behind then.
    """
    bundle = load_bundle(bundle_path)
    precision = _precision(bundle, recipe, bundle_path)
    digest = sha256(bundle_path / BUNDLE_FILE)
    path = output or cache_directory() / "engines" / f"{bundle.name}-{engine_key(digest, recipe)}"
    if (path / MANIFEST_FILE).is_file():
        try:
            manifest, _ = load_manifest(path)
        except InputError:
            pass  # damaged or of an older format: made anew below
        else:
            current = (digest, machine().key, versions(), recipe.slots, recipe.threads, recipe.spin)
            stored = (manifest.bundle_sha256, manifest.device, manifest.versions, manifest.slots, manifest.threads,
                      manifest.spin)  # fmt: skip
            if current == stored:
                return Built(path, manifest, cached=True)
    with replacing_directory(path, MANIFEST_FILE) as folder:
        fused = _optimize(bundle_path, bundle, folder, progress)
        for name in (BUNDLE_FILE, REFERENCE_FILE):
            shutil.copyfile(bundle_path / name, folder / name)
        progress("gate")
        findings = _gate(folder, bundle, recipe, digest)
        manifest = Manifest(
            format="sage-edge-engine/1",
            name=bundle.name,
            target=recipe.target,
            precision=precision,
            slots=recipe.slots,
            threads=recipe.threads,
            spin=recipe.spin,
            bundle_sha256=digest,
            device=machine().key,
            versions=versions(),
            files={file.name: sha256(file) for file in sorted(folder.iterdir())},
            fused=fused,
            gate=findings,
        )
        (folder / MANIFEST_FILE).write_text(dump_yaml(manifest), encoding="utf-8")
    return Built(path, manifest, cached=False)


def _precision(bundle: Bundle, recipe: BuildRecipe, path: Path) -> Literal["fp32", "int8"]:
    """What the CPU engine of a bundle computes in. Raises InputError when that is not what the recipe asks for."""
    layers = bundle.lowering.layers if bundle.lowering else ()
    found = {layer.precision for layer in layers} - {"fp32"}
    if found and found != {"int8"} and found != {"int8", "fp16"}:
        raise InputError(
            f"{path}: is lowered to {'+'.join(sorted(found))}, which a CPU cannot compute in; `sage-edge check` judges it here, "
            "engines for the CPU are fp32 or int8: build them from the fp32 bundle or an int8 one"
        )
    precision: Literal["fp32", "int8"] = "int8" if found else "fp32"
    if recipe.precision not in (None, precision):
        raise InputError(
            f"{path}: the recipe asks for {recipe.precision}, but this bundle gives {precision}; int8 needs a bundle that was "
            "calibrated and judged: `sage-edge build BUNDLE --precision int8 --data DIR` makes both"
        )
    return precision


def _optimize(bundle_path: Path, bundle: Bundle, folder: Path, progress: Callable[[str], None]) -> dict[str, int]:
    """Fuse each graph, let ONNX Runtime optimize it for this CPU and keep what it made."""
    import onnx
    import onnxruntime as ort

    from sage_edge.engines.fuse import fuse
    from sage_edge.engines.int8 import int8_form

    counts: dict[str, int] = {}
    for name in GRAPH_NAMES:
        progress(f"fuse {name}")
        model = onnx.load(str(bundle_path / f"{name}.onnx"), load_external_data=False)
        if name != "decode" and bundle.lowering is not None:
            model, patterns = int8_form(model)
        else:
            patterns = fuse(model).patterns()
        for pattern, count in patterns.items():
            counts[pattern] = counts.get(pattern, 0) + count
        fused = folder / f"{name}.fused.onnx"
        onnx.save(model, str(fused))
        progress(f"optimize {name}")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(folder / f"{name}.onnx")
        ort.InferenceSession(str(fused), options, providers=["CPUExecutionProvider"])
        fused.unlink()
    return counts


def _gate(folder: Path, bundle: Bundle, recipe: BuildRecipe, digest: str) -> tuple[GateResult, ...]:
    reference = gate.load_reference(folder / REFERENCE_FILE)
    threads = recipe.threads or usable_cores()
    with OrtRunner(folder, bundle.model, recipe.slots, threads, optimized=True, digest=digest) as runner:
        if bundle.lowering is None:
            findings = gate.check(runner, reference).findings
        else:
            from sage_edge.precision.gate import check_lowered

            findings = check_lowered(runner, reference, bundle.lowering).findings
    if failures := [finding for finding in findings if not finding.passed]:
        reasons = "; ".join(f"{f.name}: {f.detail}" for f in failures)
        raise GateError(f"{bundle.name}: the gate refused the engine: {reasons}")
    return tuple(GateResult(**asdict(finding)) for finding in findings)


def open_engine(folder: Path, threads: int | None = None) -> Runner:
    """A runner (not yet active) for an engine folder, after checking every digest.

    threads: overrides the recipe's. Raises InputError / IntegrityError, also for an engine of another machine.
    """
    manifest, bundle = load_manifest(folder)
    if manifest.gpu is not None:
        from sage_edge.engines.accelerated import open_accelerated

        return open_accelerated(folder, manifest, bundle)
    if manifest.device != machine().key:
        raise InputError(
            f"{folder}: built for {manifest.device!r}, this machine is {machine().key!r}; build it here from its bundle"
        )
    if manifest.versions != versions():
        raise InputError(
            f"{folder}: built with {manifest.versions}, installed are {versions()}; build it again from its bundle"
        )
    chosen = threads if threads is not None else manifest.threads
    threads = chosen or usable_cores()
    digest = manifest.bundle_sha256
    return OrtRunner(folder, bundle.model, manifest.slots, threads, optimized=True, digest=digest, spin=manifest.spin)


def open_bundle(folder: Path, slots: int = 8) -> OrtRunner:
    """A runner for the bundle's own graphs, neither fused nor optimized: for judging an fp32 bundle itself.

    A lowered bundle is judged through `precision.judge.open_judging`.
    """
    bundle = load_bundle(folder)
    digest = sha256(folder / BUNDLE_FILE)
    return OrtRunner(folder, bundle.model, slots, usable_cores(), optimized=True, digest=digest)
