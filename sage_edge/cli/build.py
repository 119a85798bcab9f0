"""`sage-edge build`: a bundle to an engine for this machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from sage_edge.cli.lowering import add_arguments, refuse_unused, require_data
from sage_edge.cli.output import Subparsers, command, positive, print_json, progress_bar, stages
from sage_edge.config import load_yaml
from sage_edge.engines.build import BuildRecipe, Built, build
from sage_edge.engines.gpu_recipe import GpuRecipe, choose_recipe, is_gpu_recipe
from sage_edge.engines.manifest import MANIFEST_FILE
from sage_edge.errors import InputError
from sage_edge.models import bundle_of, locate, lowered_of, lowering_of, shipped
from sage_edge.specs import Precision


def add(subparsers: Subparsers) -> None:
    parser = command(
        subparsers, "build", run, "bundle -> engine for this machine",
        "Build the engine of a bundle for the device at hand, pass the gate, and keep the engine in the cache.\n"
        "A second build of the same bundle on the same machine is instant.\n\n"
        "  sage-edge build my-hrm.bundle --target cpu\n"
        "  sage-edge build my-hrm.bundle --precision int8 --data DIR    INT8 products; DIR sets ranges and judges accuracy\n"
        "  sage-edge build my-hrm-fp16.bundle --target orin-nano        TensorRT, on the Jetson itself\n\n"
        "targets: cpu; orin-nano, thor, desktop (TensorRT: the recipe follows the bundle's precision, engines/*.yaml);\n"
        "torch (AOTInductor, CPU or CUDA), torch-tensorrt, ort-cuda. Ctrl-C ends a build and leaves nothing behind.",
    )  # fmt: skip
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle, a model folder or the name of a shipped model")
    parser.add_argument("--target", metavar="TARGET", help="what to build for (default: cpu)")
    parser.add_argument("--precision", choices=get_args(Precision),
                        help="default: that of the bundle; another lowers an fp32 bundle first, into the cache")  # fmt: skip
    parser.add_argument("--no-spin", action="store_true",
                        help="waiting threads sleep: slower, but leaves shared cores to others")  # fmt: skip
    parser.add_argument("--recipe", metavar="YAML", type=Path, help="build recipe (see engines/*.yaml)")
    parser.add_argument("--slots", type=positive, help="requests that one call may carry (default: the recipe's)")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: all usable cores when opened)")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, help="write the engine there, not to the cache")
    add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    folder = locate(arguments.bundle)
    if (folder / MANIFEST_FILE).is_file():
        raise InputError(f"{folder}: already an engine; `build` takes a bundle or a model folder")
    accelerated = is_gpu_recipe(arguments.recipe) if arguments.recipe else arguments.target not in (None, "cpu")
    built = _for_accelerator(arguments, folder) if accelerated else _for_cpu(arguments, folder)
    if arguments.json:
        print_json({"engine": str(built.path), "cached": built.cached, **asdict(built.manifest)})
    else:
        found = "found in the cache" if built.cached else "built, gate passed"
        print(f"{built.path}: {built.manifest.name}, {built.manifest.target} {built.manifest.precision}, {found}")
        for note in built.manifest.notes:
            print(f"note: {note}")
    return 0


def _for_cpu(arguments: argparse.Namespace, folder: Path) -> Built:
    if arguments.precision not in (None, "fp32", "int8"):
        raise InputError(f"--precision {arguments.precision}: engines for the CPU are fp32 or int8")
    recipe = load_yaml(arguments.recipe, BuildRecipe) if arguments.recipe else BuildRecipe()
    names = ("target", "slots", "threads", "precision")
    chosen = asdict(recipe) | {name: value for name in names if (value := getattr(arguments, name)) is not None}
    chosen |= {"spin": False} if arguments.no_spin else {}
    try:
        recipe = BuildRecipe(**chosen)
    except ValueError as error:
        raise InputError(str(error)) from error
    with stages("build") as progress:
        bundle = bundle_of(folder, progress)
        if recipe.precision == "int8" and lowering_of(bundle) is None:
            bundle = _lowered(arguments, bundle, "int8", recipe.threads, progress)
        else:
            refuse_unused(arguments)
        return build(bundle, recipe, arguments.output, progress)


def _for_accelerator(arguments: argparse.Namespace, folder: Path) -> Built:
    # Imported here: the other commands must not wait for onnx.
    from sage_edge.engines.accelerated import build_accelerated, bundle_precision

    if arguments.threads or arguments.no_spin:
        raise InputError("--threads, --no-spin: only engines for the CPU have threads")
    with progress_bar("build") as progress:

        def stage(name: str) -> None:
            progress(name, 0.0)

        bundle = bundle_of(folder, stage)
        if arguments.precision not in (None, "fp32") and lowering_of(bundle) is None:
            bundle = _lowered(arguments, bundle, arguments.precision, 0, stage)
        else:
            refuse_unused(arguments)
        if arguments.recipe:
            recipe = load_yaml(arguments.recipe, GpuRecipe)
            if arguments.target not in (None, recipe.target):
                raise InputError(
                    f"{arguments.recipe}: a recipe for {recipe.target}, but --target is {arguments.target}"
                )
        else:
            recipe = choose_recipe(arguments.target, bundle_precision(bundle))
        if arguments.slots:
            recipe = recipe.with_slots(arguments.slots)
        return build_accelerated(bundle, recipe, arguments.output, progress)


def _lowered(
    arguments: argparse.Namespace, bundle: Path, precision: str, threads: int, progress: Callable[[str], None]
) -> Path:
    """The lowered bundle of an fp32 one, calibrated on --data or on a shipped model's own calibration split."""
    own = shipped(arguments.bundle)
    if arguments.data is None and own is not None and (own / "data" / "calibration").is_dir():
        arguments.data = own / "data" / "calibration"
    data = require_data(arguments)
    return lowered_of(bundle, precision, data, strict=arguments.strict, threads=threads, progress=progress)
