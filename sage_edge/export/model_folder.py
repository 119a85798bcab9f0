"""Model folders: `recipe.yaml` and `checkpoint.safetensors`, the form in which we keep trained weights.

The digest in the recipe ties the two together. The recipe is written last: a crash between the two leaves a recipe
whose digest does not fit, which every reader refuses. Other files of the folder are left alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from sage_edge.config import dump_yaml
from sage_edge.errors import InputError, IntegrityError
from sage_edge.export.hrm import HRM
from sage_edge.export.recipe import CHECKPOINT, RECIPE, Recipe, read_recipe
from sage_edge.files import replacing, sha256, write_atomic
from sage_edge.specs import Array, HRMConfig

Weights = dict[str, npt.NDArray[np.float32]]


def save_model_folder(
    folder: Path,
    tensors: Mapping[str, Array | Tensor],
    *,
    name: str,
    config: HRMConfig,
    source: str,
    weights_dtype: str = "float32",
) -> Recipe:
    """Write a model folder, or replace the two files of one; returns the recipe with its digest.

    tensors: the state dict of `HRM(config)`, NumPy or torch, of any float dtype (stored as float32). `name`, `source`
    and `weights_dtype` are the fields of `Recipe`. Raises InputError for tensors that do not fit `config`, and for a
    bad name or a `folder` that is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a folder was expected here, but it is a file; choose another output")
    arrays = {key: _float32(value) for key, value in tensors.items()}
    weights = check_weights(arrays, config, f"model {name!r}")
    try:
        recipe = Recipe(name, config, "0" * 64, source, weights_dtype)  # a bad name must not cost the old checkpoint
    except ValueError as error:
        raise InputError(f"{folder}: {error}") from error
    with replacing(folder / CHECKPOINT) as temporary:
        save_file(weights, temporary)
        recipe = dataclasses.replace(recipe, checkpoint_sha256=sha256(temporary))
    write_atomic(folder / RECIPE, dump_yaml(recipe))
    return recipe


def load_model_folder(folder: Path) -> tuple[Recipe, dict[str, Tensor]]:
    """Recipe and weights (float32, on the CPU, under the names of `HRM`) of a model folder.

    Raises InputError for a missing file, a bad recipe, and tensors that are not exactly those of the recipe's model;
    IntegrityError when the weights are not the file that the recipe speaks of, or no safetensors file.
    """
    recipe = read_recipe(folder)
    path = folder / CHECKPOINT
    try:
        digest = sha256(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if digest != recipe.checkpoint_sha256:
        raise IntegrityError(
            f"{path}: sha256 is {digest}, but {RECIPE} promises {recipe.checkpoint_sha256}; the file was changed or "
            "its writing was interrupted: restore it or import the model again"
        )
    try:
        arrays = load_file(path)
    except (SafetensorError, KeyError, TypeError) as error:  # KeyError, TypeError: a dtype that NumPy does not have
        raise IntegrityError(f"{path}: truncated or not a safetensors file: {error}") from error
    weights = check_weights(arrays, recipe.config, str(path))
    return recipe, {name: torch.from_numpy(array) for name, array in weights.items()}


def _float32(value: Array | Tensor) -> npt.NDArray[np.float32]:
    array = value.detach().to("cpu", torch.float32).numpy() if isinstance(value, Tensor) else value
    return np.ascontiguousarray(array, np.float32)


def count_layers(tensors: Iterable[str], level: str) -> int:
    """Number of layers of the level "H" or "L" that the tensors' names speak of."""
    matches = (re.match(rf"{level}_level\.layers\.([0-9]+)\.", name) for name in tensors)
    return len({match.group(1) for match in matches if match})


def build(config: HRMConfig, source: str, device: str = "cpu") -> HRM:
    """An HRM with initial weights; on the device "meta" it costs no memory. The global random state is left as it was.

    Raises InputError, with `source` in front, for sizes that cannot be built.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            return HRM(config)
    except (RuntimeError, OverflowError, TypeError, MemoryError) as error:  # what torch says to absurd sizes
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{source}: no model of this configuration can be built: {first[:200]}") from error


def check_weights(tensors: Mapping[str, Array], config: HRMConfig, source: str) -> Weights:
    """`tensors` once they are exactly the state of `HRM(config)`: names, shapes, float32, finite.

    Raises InputError, with `source` in front, listing the first few of each kind that is wrong.
    """
    for level, layers in (("H", config.H_layers), ("L", config.L_layers)):
        if layers != (found := count_layers(tensors, level)):  # first, so that nobody builds a billion layers
            raise InputError(f"{source}: holds {found} layers of {level}_level, but {level}_layers is {layers}")
    expected = {name: tuple(t.shape) for name, t in build(config, source, "meta").state_dict().items()}
    shared = sorted(expected.keys() & tensors.keys())
    wrong = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - expected.keys()),
        "of the wrong shape": [
            f"{n} {list(tensors[n].shape)} instead of {list(expected[n])}"
            for n in shared
            if tensors[n].shape != expected[n]
        ],
        "not float32": [f"{n} ({tensors[n].dtype})" for n in shared if tensors[n].dtype != np.float32],
        "with NaN or Inf": [n for n in shared if tensors[n].dtype == np.float32 and not np.isfinite(tensors[n]).all()],
    }
    complaints = [
        f"{kind}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        for kind, names in wrong.items() if names
    ]  # fmt: skip
    if complaints:
        raise InputError(f"{source}: its tensors do not fit the model; {'; '.join(complaints)}")
    return {name: np.asarray(tensors[name], np.float32) for name in expected}
