# SPDX-License-Identifier: Apache-2.0
"""The torch HRM against outputs of the original code, and against the formulas written out in NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from sage_edge.export.checkpoint import open_model  # noqa: E402
from sage_edge.export.hrm import HRM  # noqa: E402
from sage_edge.specs import HRMConfig  # noqa: E402
from tests.unit.hrm_reference import Reference  # noqa: E402
from tests.unit.original_format import random_weights, tiny  # noqa: E402

FIXTURE = Path(__file__).parents[3] / "shared" / "fixtures" / "hrm_sapient_rope"
needs_fixture = pytest.mark.skipif(
    not FIXTURE.is_dir(), reason=f"no reference outputs of the original code at {FIXTURE}"
)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def original() -> tuple[HRM, dict[str, npt.NDArray[Any]]]:
    with np.load(FIXTURE / "reference_outputs.npz") as file:
        return open_model(FIXTURE)[1], dict(file)


def close(ours: Any, theirs: npt.NDArray[Any], what: str) -> None:
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=TOLERANCE, err_msg=what)


@needs_fixture
@pytest.mark.parametrize("free_running", [True, False], ids=["free running", "from the reference's carry"])
def test_six_steps_equal_the_original_code(
    original: tuple[HRM, dict[str, npt.NDArray[Any]]], free_running: bool
) -> None:
    model, expected = original
    context, z_H, z_L = model.encode(*(torch.from_numpy(expected[n]) for n in ("inputs", "puzzle_identifiers")))
    for k in range(1, 7):
        if k > 1 and not free_running:
            z_H, z_L = torch.from_numpy(expected[f"z_H_{k - 1}"]), torch.from_numpy(expected[f"z_L_{k - 1}"])
        z_H, z_L, q = model.step(context, z_H, z_L)
        for name, value in (("z_H", z_H), ("z_L", z_L), ("logits", model.logits(z_H)), ("q_halt", q[:, 0]),
                            ("q_continue", q[:, 1])):  # fmt: skip
            close(value, expected[f"{name}_{k}"], f"{name}, step {k}")


@needs_fixture
def test_the_numpy_formulas_equal_the_original_code(original: tuple[HRM, dict[str, npt.NDArray[Any]]]) -> None:
    """So that their verdict on the configurations below, which the fixture does not cover, is worth something."""
    model, expected = original
    reference = Reference(model.config, {name: t.numpy() for name, t in model.state_dict().items()})
    x = reference.embed(expected["inputs"][1], int(expected["puzzle_identifiers"][1]))
    z_H, z_L = reference.start()
    for k in (1, 2):
        z_H, z_L, logits, q = reference.step(x, z_H, z_L)
        for name, value in (("z_H", z_H), ("z_L", z_L), ("logits", logits), ("q_halt", q[0]), ("q_continue", q[1])):
            close(value, expected[f"{name}_{k}"][1], f"{name}, step {k}")


CONFIGS = {
    "rope": {},
    "learned": {"pos_encodings": "learned"},
    "learned, no puzzle embedding": {"pos_encodings": "learned", "puzzle_emb_ndim": 0},
    "rope, no puzzle embedding": {"puzzle_emb_ndim": 0},
    "puzzle embedding shorter than a token": {"puzzle_emb_ndim": 5},
    "puzzle embedding over three tokens, the last in part": {"puzzle_emb_ndim": 41, "pos_encodings": "learned"},
    "other constants": {"rms_norm_eps": 0.1, "rope_theta": 50.0, "expansion": 30.0, "num_heads": 4},
    "other depths": {"H_layers": 1, "L_layers": 3, "H_cycles": 1, "L_cycles": 3},
    "two-way": {"family": "hrm-bidirectional"},
    "two-way, learned": {"family": "hrm-bidirectional", "pos_encodings": "learned", "puzzle_emb_ndim": 20},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_every_configuration_equals_the_formulas(changes: dict[str, Any]) -> None:
    config: HRMConfig = tiny(**changes)
    weights = random_weights(config)
    model = HRM(config).eval().requires_grad_(False)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    reference = Reference(config, weights)
    tokens, identifiers = np.array([[0, 4, 2, 1], [3, 3, 0, 2]], np.int32), np.array([2, 0], np.int32)
    context, z_H, z_L = model.encode(torch.from_numpy(tokens), torch.from_numpy(identifiers))
    states = [reference.start() for _ in tokens]
    for slot in range(len(tokens)):
        close(context[slot], reference.embed(tokens[slot], int(identifiers[slot])), "context")
    for step in range(2):
        z_H, z_L, q = model.step(context, z_H, z_L)
        assert z_H.shape == (2, config.positions, config.hidden_size)
        for slot in range(len(tokens)):
            x = reference.embed(tokens[slot], int(identifiers[slot]))
            high, low, logits, q_expected = reference.step(x, *states[slot])
            states[slot] = (high, low)
            for name, ours, theirs in (("z_H", z_H, high), ("z_L", z_L, low), ("q", q, q_expected),
                                       ("logits", model.logits(z_H), logits)):  # fmt: skip
                close(ours[slot], theirs, f"{name}, slot {slot}, step {step}")
