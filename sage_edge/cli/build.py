"""`sage-edge build`: a bundle to an engine for this machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from sage_edge.cli.lowering import add_arguments, refuse_unused, require_data
from sage_edge.cli.output import Subparsers, command, positive, print_json, stages
from sage_edge.config import load_yaml
from sage_edge.engines.build import BuildRecipe, build
from sage_edge.engines.manifest import MANIFEST_FILE
from sage_edge.errors import InputError
from sage_edge.models import bundle_of, locate, lowered_of, lowering_of, shipped


def add(subparsers: Subparsers) -> None:
    parser = command(
        subparsers, "build", run, "bundle -> engine for this machine",
        "Fuse and optimize the graphs for this machine, pass the gate, and keep the engine in the cache.\n"
        "A second build of the same bundle on the same machine is instant.\n\n"
        "  sage-edge build my-hrm.bundle --target cpu\n"
        "  sage-edge build my-hrm.bundle --precision int8 --data DIR    INT8 products; DIR sets ranges and judges accuracy",
    )  # fmt: skip
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle, a model folder or the name of a shipped model")
    parser.add_argument("--target", choices=("cpu",), default="cpu", help="cpu: ONNX Runtime, fp32 or int8 (default)")
    parser.add_argument("--precision", choices=("fp32", "int8"),
                        help="default: that of the bundle; int8 of an fp32 bundle lowers it first, into the cache")  # fmt: skip
    parser.add_argument("--no-spin", action="store_true",
                        help="waiting threads sleep: slower, but leaves shared cores to others")  # fmt: skip
    parser.add_argument("--recipe", metavar="YAML", type=Path, help="build recipe (see engines/*.yaml)")
    parser.add_argument("--slots", type=positive, help="requests that one call may carry (default 8)")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: all usable cores when opened)")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, help="write the engine there, not to the cache")
    add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    recipe = load_yaml(arguments.recipe, BuildRecipe) if arguments.recipe else BuildRecipe()
    chosen = {**asdict(recipe), "target": arguments.target}
    chosen |= {
        name: value for name in ("slots", "threads", "precision") if (value := getattr(arguments, name)) is not None
    }
    chosen |= {"spin": False} if arguments.no_spin else {}
    folder = locate(arguments.bundle)
    if (folder / MANIFEST_FILE).is_file():
        raise InputError(f"{folder}: already an engine; `build` takes a bundle or a model folder")
    try:
        recipe = BuildRecipe(**chosen)
    except ValueError as error:
        raise InputError(str(error)) from error
    with stages("build") as progress:
        bundle = bundle_of(folder, progress)
        if recipe.precision == "int8" and lowering_of(bundle) is None:
            bundle = _int8(arguments, bundle, recipe, progress)
        else:
            refuse_unused(arguments)
        built = build(bundle, recipe, arguments.output, progress)
    if arguments.json:
        print_json({"engine": str(built.path), "cached": built.cached, **asdict(built.manifest)})
    else:
        found = "found in the cache" if built.cached else "built, gate passed"
        print(f"{built.path}: {built.manifest.name}, {built.manifest.target} {built.manifest.precision}, {found}")
    return 0


def _int8(arguments: argparse.Namespace, bundle: Path, recipe: BuildRecipe, progress: Callable[[str], None]) -> Path:
    """The int8 bundle of an fp32 one, calibrated on --data or on a shipped model's own calibration split."""
    own = shipped(arguments.bundle)
    if arguments.data is None and own is not None and (own / "data" / "calibration").is_dir():
        arguments.data = own / "data" / "calibration"
    data = require_data(arguments)
    return lowered_of(bundle, "int8", data, strict=arguments.strict, threads=recipe.threads, progress=progress)
