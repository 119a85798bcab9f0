"""`sage-edge export`: a checkpoint or model folder to a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path

from sage_edge.arrays import read_npz
from sage_edge.cli.lowering import (
    add_arguments,
    refuse_unused,
    require_data,
    show_lowering,
)  # fmt: skip
from sage_edge.cli.output import Subparsers, command, positive, print_json, stages
from sage_edge.errors import InputError, MissingDependencyError


def add(subparsers: Subparsers) -> None:
    parser = command(
        subparsers, "export", run, "checkpoint or model folder -> bundle of ONNX graphs (needs torch)",
        "Write encode, refine and decode as ONNX with bundle.yaml and the reference that `check` compares with.\n"
        "FOLDER is a checkpoint folder of the original HRM code (all_config.yaml, step_N, dataset.json) or a model\n"
        "folder (recipe.yaml, checkpoint.safetensors). With --precision other than fp32, also an fp32 bundle or the name\n"
        "of a shipped model: its refine graph is rewritten with float16 casts and INT8 / FP8 Q/DQ, calibrated on --data\n"
        "over all steps, and judged against fp32; layers that break the gate are found and kept higher.\n\n"
        "  sage-edge export checkpoints/my-hrm -o my-hrm.bundle --samples puzzles.npz\n"
        "  sage-edge export my-hrm.bundle -o my-hrm-int8.bundle --precision int8 --data DIR\n"
        "  sage-edge export my-hrm.bundle -o out.bundle --precision 'H: fp16, L: fp8' --data DIR\n"
        "  sage-edge export my-hrm.bundle -o out.bundle --precision auto --allow fp16 --allow int8 --data DIR",
    )  # fmt: skip
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("-o", "--output", metavar="BUNDLE", type=Path, required=True, help="folder to write")
    parser.add_argument("--samples", metavar="NPZ", type=Path,
                        help="observations for the reference (default: random; give real ones for a trained model)")  # fmt: skip
    parser.add_argument("--name", help="name of the model (default: the recipe's, or the folder's)")
    parser.add_argument("--model-folder", metavar="DIR", type=Path,
                        help="also keep the imported checkpoint as recipe.yaml + checkpoint.safetensors")  # fmt: skip
    parser.add_argument("--precision", metavar="P", default="fp32",
                        help="fp32 (default), fp16, int8, fp8, mixed (H: fp16, L: fp8), auto (the cheapest that passes), "
                             "'H: fp16, L: int8', or a YAML file (docs/precision.md)")  # fmt: skip
    parser.add_argument("--allow", choices=("fp16", "int8", "fp8"), action="append",
                        help="with --precision auto: try this one; may be repeated (default: all three)")  # fmt: skip
    parser.add_argument("--threads", type=positive, help="CPU threads for calibrating and judging")
    add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.precision != "fp32":
        return _lower(arguments)
    refuse_unused(arguments)
    try:
        from sage_edge.export.bundle import export_bundle
        from sage_edge.export.checkpoint import open_model
        from sage_edge.export.model_folder import save_model_folder
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"export needs {error.name}: pip install 'sage-edge[export]'") from error
    from dataclasses import replace

    samples = read_npz(arguments.samples) if arguments.samples else None
    with stages("export") as progress:
        progress("load model")
        recipe, model = open_model(Path(arguments.folder))
        if arguments.name:
            recipe = replace(recipe, name=arguments.name)
        if arguments.model_folder:
            recipe = save_model_folder(
                arguments.model_folder, model.state_dict(), name=recipe.name, config=recipe.config, source=recipe.source,
                weights_dtype=recipe.weights_dtype,
            )  # fmt: skip
        bundle = export_bundle(model, recipe, arguments.output, samples, progress)
    if arguments.json:
        print_json({"bundle": str(arguments.output), "name": bundle.name, "parameters": bundle.parameters,
                    "files": bundle.files})  # fmt: skip
    else:
        print(f"{arguments.output}: {bundle.name}, {bundle.parameters:,} parameters, gate passed")
    return 0


def _lower(arguments: argparse.Namespace) -> int:
    """fp32 bundle (exported first, where it must be) -> lowered bundle; needs no torch when a bundle is given."""
    from dataclasses import replace

    from sage_edge.device import usable_cores
    from sage_edge.models import bundle_of, locate
    from sage_edge.precision.lower import LoweringError, lower_bundle
    from sage_edge.precision.plan import parse_request

    if given := [name for name in ("samples", "name", "model_folder") if getattr(arguments, name)]:
        raise InputError(
            f"--{given[0].replace('_', '-')}: belongs to the fp32 export; make that bundle first, then lower it"
        )
    request = parse_request(arguments.precision)
    if arguments.allow:
        if not request.plan.auto:
            raise InputError("--allow: belongs to --precision auto")
        request = replace(request, plan=replace(request.plan, allow=tuple(dict.fromkeys(arguments.allow))))
    data = require_data(arguments)
    with stages("export") as progress:
        source = bundle_of(locate(arguments.folder), progress)
        try:
            made = lower_bundle(source, arguments.output, request, data, strict=arguments.strict,
                                threads=arguments.threads or usable_cores(), progress=progress)  # fmt: skip
        except LoweringError as refused:
            show_lowering(refused.lowering, {"bundle": None}, arguments.json)
            raise
    lowering = made.bundle.lowering
    assert lowering is not None
    facts = {"bundle": str(made.path), "name": made.bundle.name, "precision": made.bundle.precision}
    show_lowering(lowering, facts, arguments.json)
    if not arguments.json:
        chosen = ", ".join(f"{module}: {precision}" for module, precision in lowering.modules.items())
        print(f"{made.path}: {made.bundle.name}, {chosen}; gate passed")
    return 0
