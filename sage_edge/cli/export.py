"""`sage-edge export`: a checkpoint or model folder to a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path

from sage_edge.arrays import read_npz
from sage_edge.cli.output import Subparsers, command, print_json, stages
from sage_edge.errors import MissingDependencyError


def add(subparsers: Subparsers) -> None:
    parser = command(
        subparsers, "export", run, "checkpoint or model folder -> bundle of ONNX graphs (needs torch)",
        "Write encode, refine and decode as ONNX with bundle.yaml and the reference that `check` compares with.\n"
        "FOLDER is a checkpoint folder of the original HRM code (all_config.yaml, step_N, dataset.json) or a model\n"
        "folder (recipe.yaml, checkpoint.safetensors).\n\n"
        "  sage-edge export checkpoints/my-hrm -o my-hrm.bundle --samples puzzles.npz",
    )  # fmt: skip
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("-o", "--output", metavar="BUNDLE", type=Path, required=True, help="folder to write")
    parser.add_argument("--samples", metavar="NPZ", type=Path,
                        help="observations for the reference (default: random; give real ones for a trained model)")  # fmt: skip
    parser.add_argument("--name", help="name of the model (default: the recipe's, or the folder's)")
    parser.add_argument("--model-folder", metavar="DIR", type=Path,
                        help="also keep the imported checkpoint as recipe.yaml + checkpoint.safetensors")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
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
        recipe, model = open_model(arguments.folder)
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
