"""A plugin's trained weights beside the file that describes them, and the command that makes its bundle from both."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sage_edge.bundle import Bundle
from sage_edge.errors import InputError, IntegrityError, one_line_errors
from sage_edge.files import replacing, sha256


def save_weights(path: Path, weights: dict[str, Tensor]) -> str:
    """Write a safetensors file and the folders above it; returns its hex SHA-256, by which `load_weights` knows it again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, temporary)
        return sha256(temporary)


def first_misfit(error: Exception) -> str:
    """What PyTorch says of weights that do not fit, in one line: of a list of tensors, the first says enough. Empty where the
    error says nothing."""
    return "; ".join(line.strip().rstrip(":") for line in str(error).splitlines()[:2])


def load_weights(path: Path, digest: str, model: nn.Module, described_in: str) -> None:
    """Fill `model` with the weights of a file, in eval mode and without gradients from then on.

    digest: the file's hex SHA-256. described_in: the name of the file beside it that says so, for messages. Raises
    IntegrityError for another file, InputError for weights of another model.
    """
    if not path.is_file() or sha256(path) != digest:
        raise IntegrityError(
            f"{path}: missing, or not the file that {described_in} speaks of; restore it or train again"
        )
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    except (SafetensorError, RuntimeError) as error:
        raise InputError(f"{path}: does not fit {described_in}: {first_misfit(error)}") from error
    model.eval().requires_grad_(False)


@one_line_errors()
def bundle_command(doc: str | None, export: Callable[[Path, Path], Bundle], holds: str) -> None:
    """The command line of a module whose `export` writes the bundle of a model folder. doc: the module's; holds: what such
    a folder holds."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help=holds)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the bundle to write")
    arguments = parser.parse_args()
    bundle = export(arguments.folder, arguments.output)
    Console().print(f"wrote {arguments.output}: {bundle.parameters} parameters, {bundle.step_gflop} GFLOP a step")
