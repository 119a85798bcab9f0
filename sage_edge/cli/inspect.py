"""`sage-edge inspect`: what goes on inside the torch model, as JSON and pictures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from sage_edge.arrays import read_npz, write_npz
from sage_edge.cli.output import Subparsers, command, positive, print_json, stages
from sage_edge.errors import MissingDependencyError
from sage_edge.files import write_atomic


def add(subparsers: Subparsers) -> None:
    parser = command(
        subparsers, "inspect", run, "how the states move cycle by cycle, and attention maps (PyTorch)",
        "Run the requests of an .npz file through the torch model of CHECKPOINT (a model folder, or a checkpoint folder as\n"
        "the original HRM code writes it) and write to DIR:\n\n"
        "  inspection.json  per cycle and request the norm, velocity and cosine of z_H and z_L, and their path in the\n"
        "                   plane of the first two principal components\n"
        "  attention.npz    z_H, z_L float32 [n, positions, positions]: last layer, last cycle, mean over heads\n"
        "  evolution.png, path.png, attention.png",
    )  # fmt: skip
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    parser.add_argument("--inputs", metavar="NPZ", type=Path, required=True, help="observations, as for `run`")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True)
    parser.add_argument("--steps", metavar="N", type=positive, help="how many steps (default: the model's)")
    parser.add_argument(
        "--limit", metavar="N", type=positive, default=32, help="only the first N requests (default 32)"
    )


def run(arguments: argparse.Namespace) -> int:
    try:
        import matplotlib  # noqa: F401 - asked for here, before anything is computed

        from sage_edge.export.bundle import hrm_spec
        from sage_edge.export.checkpoint import open_model
        from sage_edge.export.inspect import as_json, inspect, plot
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"inspect needs {error.name}: pip install 'sage-edge[train]'") from error

    arrays = read_npz(arguments.inputs)
    with stages("inspect") as progress:
        progress("load model")
        recipe, model = open_model(arguments.checkpoint)
        checked = hrm_spec(recipe.config).validate_observation(arrays, str(arguments.inputs))
        observation = {name: array[: arguments.limit] for name, array in checked.items()}
        progress("run")
        found = inspect(model, observation, arguments.steps or recipe.config.halt_max_steps)
        progress("draw")
        arguments.output.mkdir(parents=True, exist_ok=True)
        report = {"model": recipe.name, **as_json(found)}
        write_atomic(arguments.output / "inspection.json", json.dumps(report, allow_nan=False) + "\n")
        write_npz(arguments.output / "attention.npz", dict(found.attention))
        paths = plot(found, arguments.output)
    last = {name: float(np.median(e.velocity[:, -1])) for name, e in found.evolution.items()}
    if arguments.json:
        print_json({"output": str(arguments.output), "requests": len(found.prediction), "last_velocity": last,
                    "files": ["inspection.json", "attention.npz", *(p.name for p in paths)]})  # fmt: skip
    else:
        moving = ", ".join(f"{name} {value:.1e}" for name, value in last.items())
        print(
            f"{arguments.output}: {len(found.prediction)} requests; median relative change in the last cycle: {moving}"
        )
    return 0
