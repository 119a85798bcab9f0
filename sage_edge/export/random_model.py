"""A model folder with drawn weights: for measuring speed, which does not depend on what the weights say."""

from __future__ import annotations

from pathlib import Path

import torch

from sage_edge.export.hrm import HRM
from sage_edge.export.model_folder import save_model_folder
from sage_edge.export.recipe import Recipe
from sage_edge.specs import HRMConfig


def random_model_folder(folder: Path, name: str, config: HRMConfig, seed: int = 0) -> Recipe:
    """Write a seeded, untrained HRM to `folder`. Its halting head is drawn too: a constant one fails the gate."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HRM(config)
        torch.nn.init.normal_(model.q_head.weight, std=0.02)
    return save_model_folder(
        folder, model.state_dict(), name=name, config=config, source=f"random weights, seed {seed}; not trained"
    )
