"""`sage-edge inspect`: measures that a hand can check, and files that are there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sage_edge.cli.main import main
from tests.conftest import TINY, tiny_hrm

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from sage_edge.export.inspect import evolution, inspect

OBSERVATION = {"inputs": np.arange(12, dtype=np.int32).reshape(2, 6) % 7, "puzzle_identifiers": np.zeros(2, np.int32)}


def test_measures_of_a_path_known_by_hand() -> None:
    states = np.array([[[2.0, 0, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]]])
    found = evolution(states)
    np.testing.assert_allclose(found.norm, [[1, 1, 2]])
    np.testing.assert_allclose(found.velocity, [[0, np.sqrt(2), 1]])
    np.testing.assert_allclose(found.cosine, [[1, 0, 1]], atol=1e-12)
    assert sum(found.explained) == pytest.approx(1)  # the states lie in a plane, so the path keeps every distance
    np.testing.assert_allclose(
        np.linalg.norm(np.diff(found.path, axis=1), axis=-1), np.linalg.norm(np.diff(states, axis=1), axis=-1)
    )


def test_inspection_sees_every_cycle_and_changes_no_prediction() -> None:
    import torch

    model = tiny_hrm()
    found = inspect(model, OBSERVATION, 3)
    assert found.evolution["z_L"].norm.shape == (2, 3 * TINY.H_cycles + 1)
    with torch.inference_mode():
        context, z_H, z_L = model.encode(*(torch.from_numpy(a) for a in OBSERVATION.values()))
        for _ in range(3):
            z_H, z_L, _ = model.step(context, z_H, z_L)
    np.testing.assert_array_equal(found.prediction[:, -1], model.logits(z_H).argmax(-1).numpy())
    for weights in found.attention.values():
        assert weights.shape == (2, TINY.positions, TINY.positions)
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules()), "the hooks are gone"


def test_the_command_writes_numbers_and_pictures(tiny_model_folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", inputs=OBSERVATION["inputs"])
    out = tmp_path / "out"
    assert main(["inspect", str(tiny_model_folder), "--inputs", str(tmp_path / "in.npz"), "-o", str(out)]) == 0
    report = json.loads((out / "inspection.json").read_text())
    assert np.array(report["levels"]["z_H"]["path"]).shape == (2, TINY.halt_max_steps * TINY.H_cycles + 1, 2)
    assert np.array(report["tokens_changed"]).shape == (2, TINY.halt_max_steps - 1)
    assert sorted(p.name for p in out.iterdir()) == [
        "attention.npz", "attention.png", "evolution.png", "inspection.json", "path.png",
    ]  # fmt: skip


def test_bad_inputs_are_refused(tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "in.npz", inputs=np.full((1, 6), 99))
    arguments = ["inspect", str(tiny_model_folder), "--inputs", str(tmp_path / "in.npz"), "-o", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "outside 0..6" in capsys.readouterr().err
