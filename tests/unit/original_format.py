# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the original code's format, self-made for the tests (needs torch)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml

from sage_edge.export._unpickle import HOOK, Conversion, check_archive, convert
from sage_edge.export.hrm import HRM
from sage_edge.specs import HRMConfig

PREFIX = "_orig_mod.model.inner."
TINY: dict[str, Any] = {
    "vocab_size": 5, "seq_len": 4, "hidden_size": 16, "num_heads": 2, "H_layers": 2, "L_layers": 1, "H_cycles": 2,
    "L_cycles": 2, "halt_max_steps": 3, "num_puzzle_identifiers": 3, "puzzle_emb_ndim": 16,
}  # fmt: skip


def tiny(**changes: Any) -> HRMConfig:
    return HRMConfig(**(TINY | changes))


def random_weights(config: HRMConfig, seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    """Weights that bfloat16 holds exactly; none is zero, so that no part of the model can hide.

    Matrices have the scale of the initialisation: with larger ones the loop is chaotic, and float32 drifts away.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: torch.Size) -> npt.NDArray[np.float32]:
        scale = shape[1] ** -0.5 if len(shape) == 2 else 1.0
        array: npt.NDArray[np.float32] = (torch.randn(shape, generator=generator) * scale).bfloat16().float().numpy()
        return array

    return {name: draw(t.shape) for name, t in HRM(config).state_dict().items()}


def arch_of(config: HRMConfig) -> dict[str, Any]:
    names = ("H_cycles", "H_layers", "L_cycles", "L_layers", "expansion", "halt_max_steps", "hidden_size", "num_heads",
             "pos_encodings", "puzzle_emb_ndim", "rms_norm_eps", "rope_theta")  # fmt: skip
    return {name: getattr(config, name) for name in names} | {
        "forward_dtype": "bfloat16", "name": "hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1", "loss": {"name": "x"},
    }  # fmt: skip


def dataset_of(config: HRMConfig) -> dict[str, Any]:
    names = ("seq_len", "vocab_size", "num_puzzle_identifiers")
    return {name: getattr(config, name) for name in names} | {"pad_id": 0, "sets": ["all"]}


def write_config(folder: Path, arch: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "all_config.yaml").write_text(yaml.safe_dump({"arch": arch, "lr": 0.001, "data_path": "d"}))


def write_dataset(folder: Path, dataset: dict[str, Any]) -> None:
    (folder / "dataset.json").write_text(json.dumps(dataset))


def write_step(folder: Path, weights: dict[str, Any], *, prefix: str = PREFIX, step: int = 7) -> Path:
    path = folder / f"step_{step}"
    torch.save({prefix + name: torch.as_tensor(array) for name, array in weights.items()}, path)
    return path


def write_checkpoint(folder: Path, config: HRMConfig, weights: dict[str, Any] | None = None, **options: Any) -> Path:
    """The whole folder; returns it. `options` go to `write_step`."""
    write_config(folder, arch_of(config))
    write_dataset(folder, dataset_of(config))
    write_step(folder, random_weights(config) if weights is None else weights, **options)
    return folder


def unpickle_in_process(source: Path, destination: Path, max_bytes: int, timeout: float) -> Conversion:
    """In place of `_unpickle.unpickle`: the same code without the two seconds that a child needs to import torch."""
    check_archive(source, max_bytes)
    with source.open("rb") as handle:
        return Conversion(convert(handle, destination), HOOK)
