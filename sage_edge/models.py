"""Finding what a user means by ENGINE: an engine, a bundle, a model folder or checkpoint, or the name of a shipped model.

What is missing on the way to an engine is made and kept in the engine cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from sage_edge.bundle import BUNDLE_FILE, Bundle, Lowering
from sage_edge.config import load_yaml
from sage_edge.dataset import Dataset
from sage_edge.device import usable_cores
from sage_edge.engines.build import BuildRecipe, Built, build, cache_directory, open_bundle, open_engine
from sage_edge.engines.manifest import MANIFEST_FILE
from sage_edge.engines.runner import Runner
from sage_edge.errors import InputError, MissingDependencyError
from sage_edge.files import sha256
from sage_edge.irp.certificate import load_certificate
from sage_edge.runtime import Session
from sage_edge.specs import Array

Progress = Callable[[str], None]
PACKAGE = Path(__file__).resolve().parent
REFERENCE_MODEL = "sudoku9"
# Part of the cache key: raise it whenever the same fp32 bundle would become a different lowered bundle.
LOWERING_VERSION = "1"


def shipped(name: str) -> Path | None:
    """Folder of a shipped model (`bundle/`, `data/`): in the installed package, else in the repository's export/."""
    for root in (PACKAGE / "models", PACKAGE.parent / "export"):
        if (root / name / "bundle" / BUNDLE_FILE).is_file():
            return root / name
    return None


def shipped_names() -> list[str]:
    roots = (PACKAGE / "models", PACKAGE.parent / "export")
    return sorted({p.parent.parent.name for root in roots for p in root.glob(f"*/bundle/{BUNDLE_FILE}")})


def locate(target: str) -> Path:
    """The folder that `target` names; a path wins over the name of a shipped model. Raises InputError."""
    path = Path(target)
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{target}: a file; expected the folder of an engine, a bundle, a model or a checkpoint")
    if found := shipped(target):
        return found / "bundle"
    known = ", ".join(shipped_names()) or "none"
    raise InputError(f"{target}: no such folder, and no shipped model of that name (shipped: {known})")


def bundle_of(folder: Path, progress: Progress = lambda stage: None) -> Path:
    """The bundle for a folder: itself, or the export of a model folder or checkpoint, kept in the cache.

    Raises InputError for a folder that is none of these, MissingDependencyError when exporting needs torch.
    """
    if (folder / BUNDLE_FILE).is_file():
        return folder
    if not ((folder / "recipe.yaml").is_file() or (folder / "all_config.yaml").is_file()):
        raise InputError(
            f"{folder}: holds none of {MANIFEST_FILE} (engine), {BUNDLE_FILE} (bundle), recipe.yaml (model) or "
            "all_config.yaml (checkpoint)"
        )
    try:
        from sage_edge.export.bundle import export_bundle
        from sage_edge.export.checkpoint import open_model
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{folder}: exporting a model needs {error.name}; pip install 'sage-edge[export]', or give a bundle"
        ) from error
    progress("load model")
    recipe, model = open_model(folder)
    key = sha256(folder / "recipe.yaml")[:20] if (folder / "recipe.yaml").is_file() else recipe.checkpoint_sha256[:20]
    path = cache_directory() / "bundles" / f"{recipe.name}-{key}"
    if not (path / BUNDLE_FILE).is_file():
        export_bundle(model, recipe, path, progress=progress)
    return path


def lowered_of(
    bundle: Path, precision: str, data: Dataset | dict[str, Array], *, strict: bool = False, threads: int = 0,
    progress: Progress = lambda stage: None,
) -> Path:  # fmt: skip
    """The lowered bundle of the fp32 bundle in a folder, made once for this data and kept in the engine cache.

    precision: as `sage-edge export --precision` takes it. threads: 0 means all usable cores. Raises what
    `precision.lower.lower_bundle` and `precision.plan.parse_request` raise.
    """
    from sage_edge.precision.lower import lower_bundle
    from sage_edge.precision.plan import parse_request
    from sage_edge.precision.workbench import data_digest

    request = parse_request(precision)
    parts = [sha256(bundle / BUNDLE_FILE), repr(request.plan), data_digest(data), str(strict), LOWERING_VERSION]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]
    path = cache_directory() / "bundles" / f"{load_yaml(bundle / BUNDLE_FILE, Bundle).name}-{key}"
    if not (path / BUNDLE_FILE).is_file():
        lower_bundle(bundle, path, request, data, strict=strict, threads=threads or usable_cores(), progress=progress)
    return path


def engine_of(target: str, recipe: BuildRecipe | None = None, progress: Progress = lambda stage: None) -> Path:
    """The engine folder for `target`, built when it is missing. Raises what `bundle_of` and `build` raise."""
    folder = locate(target)
    if (folder / MANIFEST_FILE).is_file():
        return folder
    built: Built = build(bundle_of(folder, progress), recipe or BuildRecipe(), progress=progress)
    return built.path


def open_runner(target: str, threads: int | None = None, progress: Progress = lambda stage: None) -> Runner:
    """A runner for whatever `target` names, not yet active."""
    return open_engine(engine_of(target, progress=progress), threads)


def open_for_check(target: str, progress: Progress = lambda stage: None) -> tuple[Runner, Path]:
    """A runner and the folder with its reference.npz: an engine as it is, a bundle by its own graphs.

    Those of a lowered bundle run in their judging form: float32 arithmetic that rounds where the target would.
    """
    folder = locate(target)
    if (folder / MANIFEST_FILE).is_file():
        return open_engine(folder), folder
    bundle = bundle_of(folder, progress)
    if lowering_of(bundle) is None:
        return open_bundle(bundle), bundle
    from sage_edge.precision.judge import open_judging

    return open_judging(bundle), bundle


def lowering_of(folder: Path) -> Lowering | None:
    """How the model in an engine's or a bundle's folder was lowered; None when it is fp32."""
    return load_yaml(folder / BUNDLE_FILE, Bundle).lowering


def open_session(target: str, threads: int | None = None, progress: Progress = lambda stage: None) -> Session:
    """A session, not yet entered, for whatever `target` names, with the engine's certificate if it has one.

    Raises what `engine_of`, `open_engine` and `load_certificate` raise.
    """
    folder = engine_of(target, progress=progress)
    return Session(open_engine(folder, threads), load_certificate(folder))


def load(target: str, threads: int | None = None) -> Session:
    """Open an engine, a bundle, a model folder or a shipped model by name; use it as a context manager.

    threads: CPU threads (default: the engine's own, else all usable cores). Raises InputError when `target` names
    nothing usable, IntegrityError for a changed file, GateError when a model that had to be built fails its gate.
    """
    return open_session(target, threads)
