# SPDX-License-Identifier: Apache-2.0
"""Model folders: what is written is read back, and no damage goes unnoticed."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from safetensors.numpy import save_file  # noqa: E402

from sage_edge.config import dump_yaml  # noqa: E402
from sage_edge.errors import InputError, IntegrityError  # noqa: E402
from sage_edge.export import model_folder  # noqa: E402
from sage_edge.export.model_folder import load_model_folder, save_model_folder  # noqa: E402
from sage_edge.export.recipe import CHECKPOINT, RECIPE, Recipe, model_name, read_recipe  # noqa: E402
from sage_edge.files import sha256  # noqa: E402
from tests.unit.original_format import random_weights, tiny  # noqa: E402

CONFIG = tiny()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model_folder(tmp_path / "m", random_weights(CONFIG), name="m", config=CONFIG, source="made\nhere: été")
    return tmp_path / "m"


def complaint(folder: Path, kind: type[InputError] = InputError) -> str:
    with pytest.raises(InputError) as caught:
        load_model_folder(folder)
    assert type(caught.value) is kind
    return str(caught.value)


def promise(folder: Path) -> None:
    """Make the recipe's digest fit again."""
    recipe = dataclasses.replace(read_recipe(folder), checkpoint_sha256=sha256(folder / CHECKPOINT))
    (folder / RECIPE).write_text(dump_yaml(recipe))


def replace_tensors(folder: Path, tensors: dict[str, Any]) -> None:
    save_file(tensors, folder / CHECKPOINT)
    promise(folder)


def test_what_is_saved_is_loaded(folder: Path) -> None:
    recipe, weights = load_model_folder(folder)
    assert recipe == Recipe("m", CONFIG, sha256(folder / CHECKPOINT), "made\nhere: été", "float32")
    assert weights.keys() == random_weights(CONFIG).keys()
    for name, array in random_weights(CONFIG).items():
        assert weights[name].dtype == torch.float32
        np.testing.assert_array_equal(weights[name].numpy(), array)


def test_equal_weights_make_equal_files(folder: Path, tmp_path: Path) -> None:
    backwards = dict(reversed(random_weights(CONFIG).items()))
    recipe = save_model_folder(tmp_path / "again", backwards, name="m", config=CONFIG, source="s")
    assert recipe.checkpoint_sha256 == read_recipe(folder).checkpoint_sha256


def test_torch_tensors_of_any_float_dtype_are_taken(folder: Path, tmp_path: Path) -> None:
    tensors = {n: torch.from_numpy(a).bfloat16().requires_grad_() for n, a in random_weights(CONFIG).items()}
    recipe = save_model_folder(
        tmp_path / "t", tensors, name="m", config=CONFIG, source="s", weights_dtype="bfloat16"
    )  # fmt: skip
    assert recipe.checkpoint_sha256 == read_recipe(folder).checkpoint_sha256  # these weights fit into bfloat16
    assert read_recipe(tmp_path / "t").weights_dtype == "bfloat16"


def test_other_files_of_the_folder_are_left_alone(folder: Path) -> None:
    (folder / "train.py").write_text("kept")
    save_model_folder(folder, random_weights(CONFIG, seed=1), name="m2", config=CONFIG, source="s")
    assert read_recipe(folder).name == "m2"
    assert sorted(p.name for p in folder.iterdir()) == [CHECKPOINT, RECIPE, "train.py"]


def test_an_interrupted_save_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(path: Path, content: bytes | str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model_folder, "write_atomic", crash)
    with pytest.raises(KeyboardInterrupt):
        save_model_folder(folder, random_weights(CONFIG, seed=1), name="m", config=CONFIG, source="s")
    assert "its writing was interrupted" in complaint(folder, IntegrityError)


def test_a_save_that_is_refused_changes_nothing(folder: Path, tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    short = {n: a for n, a in weights.items() if n != "H_init"}
    nan = weights | {"H_init": np.full(16, np.nan, np.float32)}
    for tensors, name, expected in ((short, "m", "missing: H_init"), (nan, "m", "NaN"), (weights, "../m", "name: ")):
        with pytest.raises(InputError, match=expected):
            save_model_folder(folder, tensors, name=name, config=CONFIG, source="s")
    load_model_folder(folder)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="a folder was expected here"):
        save_model_folder(tmp_path / "file", weights, name="m", config=CONFIG, source="s")


@pytest.mark.parametrize("position", [0, 9, 300, -1])
def test_a_changed_byte_is_noticed(folder: Path, position: int) -> None:
    data = bytearray((folder / CHECKPOINT).read_bytes())
    data[position] ^= 1
    (folder / CHECKPOINT).write_bytes(data)
    assert "the file was changed" in complaint(folder, IntegrityError)


def test_a_digest_that_does_not_fit_is_noticed(folder: Path) -> None:
    recipe = dataclasses.replace(read_recipe(folder), checkpoint_sha256="0" * 64)
    (folder / RECIPE).write_text(dump_yaml(recipe))
    assert f"promises {'0' * 64}" in complaint(folder, IntegrityError)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_wrong_file_with_the_right_digest_is_refused(folder: Path, keep: int) -> None:
    (folder / CHECKPOINT).write_bytes((folder / CHECKPOINT).read_bytes()[:keep])
    promise(folder)
    assert "truncated or not a safetensors file" in complaint(folder, IntegrityError)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"H_init": None}, "missing: H_init"),
        ({"more": np.zeros(3, np.float32)}, "unexpected: more"),
        ({"H_init": np.zeros(15, np.float32)}, "H_init [15] instead of [16]"),
        ({"H_init": np.zeros(16, np.float16)}, "not float32: H_init (float16)"),
        ({"H_init": np.full(16, np.inf, np.float32)}, "with NaN or Inf: H_init"),
    ],
)
def test_tensors_that_are_not_the_models_are_listed(folder: Path, changes: dict[str, Any], expected: str) -> None:
    replace_tensors(folder, {n: a for n, a in (random_weights(CONFIG) | changes).items() if a is not None})
    assert expected in complaint(folder)


def test_bfloat16_in_the_file_is_refused(folder: Path) -> None:
    from safetensors.torch import save_file as save_torch

    save_torch({n: torch.from_numpy(a).bfloat16() for n, a in random_weights(CONFIG).items()}, folder / CHECKPOINT)
    promise(folder)
    with pytest.raises(InputError):
        load_model_folder(folder)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("name: m\n", "name: m\nnmae: x\n", "line 2: unknown key 'nmae'; did you mean 'name'?"),
        ("  seq_len: 4\n", "", "missing key 'config.seq_len'"),
        ("  seq_len: 4\n", "  seq_len: four\n", "line 4: 'config.seq_len': expected a whole number, found 'four'"),
        ("name: m\n", "name: a/b\n", "name: expected up to 64"),
        ("checkpoint_sha256: ", "checkpoint_sha256: x", "checkpoint_sha256: expected 64 hexadecimal digits"),
        ("  H_layers: 2\n", "  H_layers: 1000000000\n", "holds 2 layers of H_level, but H_layers is 1000000000"),
        ("  vocab_size: 5\n", "  vocab_size: 1000000000000000000\n", "recipe.yaml"),
    ],
)
def test_a_recipe_that_does_not_fit_is_named(folder: Path, old: str, new: str, expected: str) -> None:
    text = (folder / RECIPE).read_text()
    assert old in text
    (folder / RECIPE).write_text(text.replace(old, new))
    assert expected.replace("recipe.yaml", str(folder)) in complaint(folder)


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    (folder / CHECKPOINT).unlink()
    assert "cannot be read: No such file" in complaint(folder)
    assert "not a model folder (no recipe.yaml in it)" in complaint(tmp_path / "absent")


@pytest.mark.parametrize(
    ("path", "name"),
    [("a/hrm_v1.0", "hrm_v1.0"), ("/", "model"), ("ein Ü", "ein-"), ("..hidden", "hidden"), ("x" * 99, "x" * 64)],
)
def test_any_path_gives_a_valid_name(path: str, name: str) -> None:
    assert model_name(Path(path)) == name
    Recipe(name, CONFIG, "0" * 64, "s")


def test_the_recipe_is_read_without_torch(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sage_edge.export.recipe import read_recipe; "
        "read_recipe(Path(sys.argv[1])); sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code, str(folder)], cwd=root, check=False).returncode == 0
