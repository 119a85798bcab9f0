"""The engine folder: optimized graphs, their bundle's reference, and manifest.yaml that binds them together.

manifest.yaml   this module's `Manifest`: digests of every file, device, versions, precision, gate results
bundle.yaml     the bundle the engine was built from
*.onnx          the graphs in the target's own form
reference.npz   so that `sage-edge check ENGINE` needs nothing else
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sage_edge.bundle import BUNDLE_FILE, Bundle, GateResult, verify_files
from sage_edge.config import load_yaml
from sage_edge.engines.gpu_recipe import GpuRecipe
from sage_edge.errors import InputError
from sage_edge.specs import Precision

FORMAT = "sage-edge-engine/1"
MANIFEST_FILE = "manifest.yaml"


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.yaml. For engines of accelerators: gpu: the recipe as used; key: of the
    recipe as asked for (`accelerated_key`); notes: what did not go as asked for."""

    format: Literal["sage-edge-engine/1"]
    name: str
    target: str
    precision: Precision | Literal["mixed"]
    slots: int
    threads: int
    bundle_sha256: str
    device: str
    versions: dict[str, str]
    files: dict[str, str]
    fused: dict[str, int]
    gate: tuple[GateResult, ...]
    spin: bool = True
    key: str = ""
    gpu: GpuRecipe | None = None
    notes: tuple[str, ...] = ()


def load_manifest(folder: Path) -> tuple[Manifest, Bundle]:
    """Read and verify an engine folder. Nothing in it is opened by a runtime before its digest is known to be right.

    Raises InputError for a folder that is no engine, IntegrityError for a missing or changed file.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise InputError(f"{folder}: not an engine (no {MANIFEST_FILE}); `sage-edge build BUNDLE` makes one")
    manifest = load_yaml(path, Manifest)
    if BUNDLE_FILE not in manifest.files:
        raise InputError(f"{path}: files: {BUNDLE_FILE} is missing; build the engine again")
    verify_files(folder, manifest.files, path)
    return manifest, load_yaml(folder / BUNDLE_FILE, Bundle)
