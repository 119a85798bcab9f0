"""Runners that judge lowered bundles on the CPU: the bundle's graphs, with the refine graph in its judging form."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx

from sage_edge.bundle import BUNDLE_FILE, load_bundle
from sage_edge.device import usable_cores
from sage_edge.engines.build import BUILDER_VERSION, cache_directory
from sage_edge.engines.fuse import fuse
from sage_edge.engines.ort import OrtRunner
from sage_edge.files import replacing_directory, sha256
from sage_edge.precision.qdq import judging
from sage_edge.specs import ModelSpec

MARKER = "judging"  # says that the folder is ours to replace


def write_judging(bundle: Path, refine: onnx.ModelProto, folder: Path) -> None:
    """Put encode and decode of `bundle`, and the judging form of a lowered `refine`, into an existing folder."""
    for name in ("encode", "decode"):
        shutil.copyfile(bundle / f"{name}.onnx", folder / f"{name}.onnx")
    model = judging(refine)
    fuse(model)  # what lies between roundings, such as norms, is the same float32 arithmetic fused, and faster
    onnx.save(model, str(folder / "refine.onnx"))


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
        model = onnx.load(str(folder / "refine.onnx"), load_external_data=False)
        with replacing_directory(path, MARKER) as temporary:
            write_judging(folder, model, temporary)
            (temporary / MARKER).write_text(digest, encoding="utf-8")
    return judging_runner(path, bundle.model, slots, usable_cores(), digest)
