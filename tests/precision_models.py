"""A tiny HRM that lowering does not throw off its course, faults to seed into it, and data that it answers rightly itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from sage_edge.check import record
from sage_edge.dataset import save_dataset
from sage_edge.engines.build import open_bundle
from tests.conftest import TINY, tiny_hrm

if TYPE_CHECKING:
    from sage_edge.export.hrm import HRM

ITEMS = 960
MARGIN = 0.6
SPIKE = 300.0  # one channel this much larger than the others: INT8 has 127 codes for all of them
HUGE = 1e6  # beyond float16


def calm_hrm(change: Callable[[HRM], None] = lambda model: None) -> HRM:
    """The tiny HRM with blocks that add little to their input: its answers are decided, its steps do not diverge."""
    from sage_edge.export.layers import Block

    model = tiny_hrm()
    for level in (model.H_level, model.L_level):
        for layer in level.layers:
            assert isinstance(layer, Block)
            layer.self_attn.o_proj.weight.mul_(0.2)
            layer.mlp.down_proj.weight.mul_(0.2)
    model.lm_head.weight.mul_(4.0)
    change(model)
    return model


def scale_channel(factor: float) -> Callable[[HRM], None]:
    """Blow up one hidden channel of a SwiGLU and leave it out again behind it: nearly the same function in fp32.

    The weight behind the channel is zero, so that what it holds means nothing; only its size is in the way of the others,
    which share one scale with it. Balancing channels cannot help: a channel that means nothing has no size of its own.
    """

    from sage_edge.export.layers import Block

    def change(model: HRM) -> None:
        block = model.L_level.layers[1]
        assert isinstance(block, Block)
        mlp = block.mlp
        width = mlp.down_proj.in_features
        mlp.gate_up_proj.weight[width].mul_(factor)
        mlp.down_proj.weight[:, 0] = 0

    return change


def spiked_layer() -> str:
    """The layer whose input `scale_channel` spoils."""
    return "L_level.layers.1.mlp.down_proj"


def make_bundle(model: HRM, folder: Path, name: str) -> Path:
    """The fp32 bundle of a tiny HRM."""
    from sage_edge.export.bundle import export_bundle
    from sage_edge.export.recipe import Recipe

    export_bundle(model, Recipe(name, TINY, "0" * 64, "seeded, untrained"), folder)
    return folder


def own_answers(bundle: Path, folder: Path, items: int = ITEMS) -> Path:
    """A dataset whose labels are what the fp32 bundle answers after its last step: fp32 gets everything right.

    Tokens whose best logit leads by little do not count (label 0 is ignored): an untrained model is sure of few.
    """
    rng = np.random.default_rng(7)
    inputs = rng.integers(1, TINY.vocab_size, (items, TINY.seq_len)).astype(np.int32)
    with open_bundle(bundle, slots=16) as runner:
        reference = record(runner, {"inputs": inputs})
    best = np.sort(reference.outputs[-1]["logits"], axis=-1)
    sure = best[..., -1] - best[..., -2] > MARGIN * best.std()
    labels = np.where(sure, reference.outputs[-1]["prediction"], 0).astype(np.int32)
    save_dataset(folder, {"inputs": inputs, "labels": labels}, TINY.seq_len, TINY.vocab_size)
    return folder


@pytest.fixture(scope="session")
def calm_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(calm_hrm(), tmp_path_factory.mktemp("calm") / "bundle", "calm")


@pytest.fixture(scope="session")
def calm_data(calm_bundle: Path) -> Path:
    return own_answers(calm_bundle, calm_bundle.parent / "data")
