# SPDX-License-Identifier: Apache-2.0
"""Original checkpoints in, models out; the faults are in test_checkpoint_faults.py, the child in test_unpickle.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from sage_edge.errors import InputError  # noqa: E402
from sage_edge.export import checkpoint  # noqa: E402
from sage_edge.export.checkpoint import import_checkpoint, load_model_folder, open_model, save_model_folder  # noqa: E402
from tests.unit.original_format import (  # noqa: E402
    arch_of,
    random_weights,
    tiny,
    unpickle_in_process,
    write_checkpoint,
    write_config,
    write_step,
)


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "unpickle", unpickle_in_process)


CONFIGS: dict[str, dict[str, Any]] = {
    "rope": {},
    "learned": {"pos_encodings": "learned"},
    "no puzzle embedding": {"puzzle_emb_ndim": 0, "num_puzzle_identifiers": 1},
    "part of a token": {"puzzle_emb_ndim": 41, "pos_encodings": "learned"},
    "two-way": {"family": "hrm-bidirectional"},
    "constants": {"rms_norm_eps": 1e-6, "rope_theta": 5000.0, "expansion": 30.0},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_import_save_and_open_keep_every_tensor(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny(**changes)
    weights = random_weights(config)
    found, imported, info = import_checkpoint(write_checkpoint(tmp_path / "original", config, weights))
    assert found == config
    assert (info.step, info.file, info.dtype, info.forward_dtype) == (7, "step_7", "float32", "bfloat16")
    saved = save_model_folder(tmp_path / "model", imported, name="m", config=found, source=info.source)
    recipe, model = open_model(tmp_path / "model")
    assert (recipe, recipe.config) == (saved, config)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    state = model.state_dict()
    assert state.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(state[name].numpy(), array, err_msg=name)
    assert open_model(tmp_path / "original")[0].config == config
    assert sorted(p.name for p in (tmp_path / "original").iterdir()) == ["all_config.yaml", "dataset.json", "step_7"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_half_precision_is_widened_without_loss(tmp_path: Path, dtype: str) -> None:
    config = tiny()
    weights = random_weights(config)
    narrow = {name: torch.from_numpy(array).to(getattr(torch, dtype)) for name, array in weights.items()}
    _, imported, info = import_checkpoint(write_checkpoint(tmp_path, config, narrow))
    assert info.dtype == dtype
    for name, tensor in narrow.items():
        assert imported[name].dtype == np.float32
        np.testing.assert_array_equal(imported[name], tensor.float().numpy())


def test_mixed_precision_is_recorded(tmp_path: Path) -> None:
    config = tiny()
    weights: dict[str, Any] = dict(random_weights(config))
    weights |= {n: torch.from_numpy(weights[n]).bfloat16() for n in ("H_init", "L_init")}  # as the original does
    recipe, _ = open_model(write_checkpoint(tmp_path, config, weights))
    assert recipe.weights_dtype == "bfloat16+float32"
    assert recipe.source.startswith("imported from step_7 (sha256 ")


def test_both_prefixes_are_known_and_leftovers_are_dropped(tmp_path: Path) -> None:
    config = tiny()
    weights: dict[str, Any] = dict(random_weights(config))
    weights["rotary_emb.cos_cached"] = torch.zeros(5, 8)
    weights["puzzle_emb.local_weights"] = torch.zeros(3, 16)
    weights["puzzle_emb.local_ids"] = torch.zeros(3, dtype=torch.int32)
    _, imported, info = import_checkpoint(write_checkpoint(tmp_path, config, weights, prefix="model.inner."))
    assert info.dropped == ("puzzle_emb.local_ids", "puzzle_emb.local_weights", "rotary_emb.cos_cached")
    assert imported.keys() == random_weights(config).keys()


def test_the_largest_of_several_steps_is_taken(tmp_path: Path) -> None:
    config = tiny()
    write_checkpoint(tmp_path, config, random_weights(config, seed=1), step=9)
    write_step(tmp_path, random_weights(config, seed=2), step=10)
    (tmp_path / "step_11_all_preds.0").write_bytes(b"predictions, not weights")
    (tmp_path / "step_12").mkdir()
    _, imported, info = import_checkpoint(tmp_path)
    assert info.step == 10
    np.testing.assert_array_equal(imported["H_init"], random_weights(config, seed=2)["H_init"])


def test_dataset_json_is_needed_only_for_what_nothing_else_gives(tmp_path: Path) -> None:
    learned = tiny(pos_encodings="learned")
    write_checkpoint(tmp_path / "learned", learned)
    (tmp_path / "learned" / "dataset.json").unlink()
    assert import_checkpoint(tmp_path / "learned")[0] == learned
    write_checkpoint(tmp_path / "rope", tiny())
    (tmp_path / "rope" / "dataset.json").unlink()
    with pytest.raises(InputError, match=r"dataset.json: seq_len is needed and nothing .* \(positions are rope\)"):
        import_checkpoint(tmp_path / "rope")
    write_config(tmp_path / "rope", arch_of(tiny()) | {"seq_len": 4})
    assert import_checkpoint(tmp_path / "rope")[0] == tiny()


def test_the_random_state_is_left_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny())
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    open_model(tmp_path)
    assert torch.equal(torch.rand(4), expected)


def test_a_model_folder_is_preferred_and_nothing_is_an_error(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "both", tiny())
    config, weights, _ = import_checkpoint(folder)
    save_model_folder(folder, weights, name="kept", config=config, source="s")
    assert open_model(folder)[0].name == "kept"
    for path in (tmp_path, tmp_path / "absent", folder / "recipe.yaml"):
        with pytest.raises(InputError, match=r"looked for a model folder .* and for an original checkpoint"):
            open_model(path)


def test_the_name_comes_from_the_folder(tmp_path: Path) -> None:
    assert open_model(write_checkpoint(tmp_path / "my best (final)!", tiny()))[0].name == "my-best-final-"
    assert load_model_folder is checkpoint.load_model_folder
