"""Runners that judge lowered bundles on the CPU: the bundle's graphs, those that are lowered in their judging form."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import onnx

from sage_edge.bundle import BUNDLE_FILE, GRAPH_NAMES, LowerableName, load_bundle
from sage_edge.device import usable_cores
from sage_edge.engines.build import BUILDER_VERSION, cache_directory
from sage_edge.engines.fuse import fuse
from sage_edge.engines.ort import OrtRunner
from sage_edge.files import replacing_directory, sha256
from sage_edge.precision.layers import LOWERABLE
from sage_edge.precision.qdq import judging
from sage_edge.specs import ModelSpec

MARKER = "judging"  # says that the folder is ours to replace


def write_judging(bundle: Path, lowered: Mapping[LowerableName, onnx.ModelProto], folder: Path) -> None:
    """Put the judging form of the graphs in `lowered`, and the other graphs of `bundle`, into an existing folder."""
    for name in GRAPH_NAMES:
        if name == "decode" or name not in lowered:
            shutil.copyfile(bundle / f"{name}.onnx", folder / f"{name}.onnx")
            continue
        model = judging(lowered[name])
        fuse(model)  # what lies between roundings, such as norms, is the same float32 arithmetic fused, and faster
        onnx.save(model, str(folder / f"{name}.onnx"))


def judging_runner(folder: Path, model: ModelSpec, slots: int, threads: int, digest: str) -> OrtRunner:
    """A runner for what `write_judging` wrote.

    ONNX Runtime must not optimize it: it would move the Q/DQ pair of an FP8 value behind a Transpose, which it cannot run.
    """
    return OrtRunner(folder, model, slots, threads, optimized=True, digest=digest)


def open_judging(folder: Path, slots: int = 8) -> OrtRunner:
    """A runner (not yet active) that judges the lowered bundle in `folder`; its judging form is kept in the engine cache.

    Raises InputError / IntegrityError for a folder that is no bundle or was changed.
    """
    bundle = load_bundle(folder)
    digest = sha256(folder / BUNDLE_FILE)
    path = cache_directory() / "judging" / f"{bundle.name}-{digest[:20]}-{BUILDER_VERSION}"
    if not (path / MARKER).is_file():
        models = {name: onnx.load(str(folder / f"{name}.onnx"), load_external_data=False) for name in LOWERABLE}
        with replacing_directory(path, MARKER) as temporary:
            write_judging(folder, models, temporary)
            (temporary / MARKER).write_text(digest, encoding="utf-8")
    return judging_runner(path, bundle.model, slots, usable_cores(), digest)
