# SPDX-License-Identifier: Apache-2.0
"""Every way in which an original checkpoint folder can be wrong is one line that names the file and the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from sage_edge.errors import InputError  # noqa: E402
from sage_edge.export import checkpoint  # noqa: E402
from sage_edge.export.checkpoint import import_checkpoint  # noqa: E402
from tests.unit.original_format import (  # noqa: E402
    PREFIX,
    arch_of,
    dataset_of,
    random_weights,
    tiny,
    unpickle_in_process,
    write_checkpoint,
    write_config,
    write_dataset,
)


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "unpickle", unpickle_in_process)


def complaint(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        import_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


Weights = dict[str, Any]
Edit = Callable[[Weights], object]
QKV = "L_level.layers.0.self_attn.qkv_proj.weight"


def poke(name: str, value: float) -> Edit:
    def edit(weights: Weights) -> None:
        weights[name].flat[0] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda w: w.pop(QKV), [f"missing: {QKV}"]),
        (lambda w: w.update(extra=w["H_init"]), ["unexpected: extra"]),
        (lambda w: w.update({QKV: w[QKV][:-1]}), [f"of the wrong shape: {QKV} [47, 16] instead of [48, 16]"]),
        (lambda w: w.update({QKV: w[QKV].T.copy()}), [f"{QKV} [16, 48] instead of [48, 16]"]),
        (lambda w: w.update({"H_init": w["H_init"][None]}), ["H_init [1, 16] instead of [16]"]),
        (
            lambda w: w.update({"embed_tokens.embedding_weight": w["H_init"]}),
            ["embed_tokens.embedding_weight [16] instead"],
        ),
        (poke(QKV, np.nan), [f"with NaN or Inf: {QKV}"]),
        (poke("q_head.bias", np.inf), ["with NaN or Inf: q_head.bias"]),
        (
            lambda w: w.update({"H_init": w["H_init"].astype(np.float64)}),
            ["H_init' is float64; expected float32, bfloat16"],
        ),
        (lambda w: w.update({"H_init": np.zeros(16, np.int32)}), ["H_init' is int32"]),
        (
            lambda w: [w.pop(n) for n in list(w)[4:]],
            ["the files disagree on H_layers: 2 in all_config.yaml (arch.H_layers)"],
        ),
        (
            lambda w: [w.pop(n) for n in list(w) if ".mlp." in n or "head" in n or "init" in n],
            ["missing: ", " and 6 more"],
        ),
        (lambda w: w.clear(), ["not an HRM: no tensor's name begins with 'model.inner.' (it is empty)"]),
    ],
)
def test_tensors_that_do_not_fit_are_listed(tmp_path: Path, edit: Edit, expected: list[str]) -> None:
    config = tiny()
    weights: Weights = dict(random_weights(config))
    edit(weights)
    message = complaint(write_checkpoint(tmp_path, config, weights))
    for part in expected:
        assert part in message


def test_other_prefixes_and_double_names_are_refused(tmp_path: Path) -> None:
    config = tiny()
    weights = random_weights(config)
    other = complaint(write_checkpoint(tmp_path / "a", config, weights, prefix="net."))
    assert "not an HRM: no tensor's name begins with 'model.inner.' (the first is 'net." in other
    extra = weights | {"H_init.scale": np.ones(1, np.float32)}
    assert "unexpected: H_init.scale" in complaint(write_checkpoint(tmp_path / "c", config, extra))
    both = {p + n: array for n, array in weights.items() for p in (PREFIX, "model.inner.")}
    assert "twice, under different prefixes" in complaint(write_checkpoint(tmp_path / "b", config, both, prefix=""))


@pytest.mark.parametrize(
    ("arch", "dataset", "expected"),
    [
        (
            {"hidden_size": 32},
            {},
            ["hidden_size", "32 in all_config.yaml (arch.hidden_size)", "16 in step_7 (columns of"],
        ),
        ({"puzzle_emb_ndim": 0}, {}, ["puzzle_emb_ndim", "0 in all_config.yaml", "16 in step_7"]),
        ({"H_layers": 10**9}, {}, ["H_layers", "1000000000 in all_config.yaml", "2 in step_7 (H_level.layers.*)"]),
        ({"L_layers": 2}, {}, ["L_layers", "2 in all_config.yaml", "1 in step_7"]),
        ({}, {"vocab_size": 6}, ["vocab_size", "6 in dataset.json", "5 in step_7 (rows of embed_tokens"]),
        ({}, {"num_puzzle_identifiers": 4}, ["num_puzzle_identifiers", "4 in dataset.json", "3 in step_7"]),
        ({"vocab_size": 6}, {}, ["vocab_size", "6 in all_config.yaml (arch.vocab_size), 5 in dataset.json"]),
        ({"seq_len": 5}, {}, ["seq_len", "5 in all_config.yaml (arch.seq_len), 4 in dataset.json"]),
        (
            {"family": "hrm-bidirectional"},
            {},
            ["family", "hrm-bidirectional in all_config", "hrm-act-v1 in step_7", "lacks"],
        ),
    ],
)
def test_files_that_disagree_name_both_sides(
    tmp_path: Path, arch: dict[str, Any], dataset: dict[str, Any], expected: list[str]
) -> None:
    config = tiny()
    write_checkpoint(tmp_path, config)
    write_config(tmp_path, arch_of(config) | arch)
    write_dataset(tmp_path, dataset_of(config) | dataset)
    message = complaint(tmp_path)
    assert message.startswith(f"{tmp_path}: the files disagree on {expected[0]}: ")
    for part in expected:
        assert part in message


def test_learned_positions_speak_for_the_sequence_length(tmp_path: Path) -> None:
    config = tiny(pos_encodings="learned", puzzle_emb_ndim=20)
    write_checkpoint(tmp_path, config)
    write_dataset(tmp_path, dataset_of(config) | {"seq_len": 5})
    assert "5 in dataset.json, 4 in step_7 (rows of embed_pos.embedding_weight less 2 for the puzzle)" in complaint(
        tmp_path
    )


def test_the_head_and_the_embedding_must_share_a_vocabulary(tmp_path: Path) -> None:
    config = tiny()
    weights = random_weights(config)
    weights["lm_head.weight"] = weights["lm_head.weight"][:-1]
    assert "disagree on vocab_size" in complaint(write_checkpoint(tmp_path, config, weights))


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ({"hidden_size": None}, ", line 9: 'arch.hidden_size': expected a whole number, found None"),
        ({"hidden_size": "16"}, "'arch.hidden_size': expected a whole number, found '16'"),
        ({"H_cycles": 2.0}, ", line 2: 'arch.H_cycles': expected a whole number, found 2.0"),
        ({"puzzle_emb_ndim": "${.hidden_size}"}, "'arch.puzzle_emb_ndim': expected a whole number"),
        ({"pos_encodings": "alibi"}, "'arch.pos_encodings': expected one of 'rope', 'learned', found 'alibi'"),
        ({"num_heads": 3}, "'arch': hidden_size: 16 is not a multiple of num_heads 3"),
        ({"H_cycles": 0}, "'arch': H_cycles: expected at least 1, found 0"),
        ({"family": "trm"}, "'arch.family': expected"),
        ({"expansion": 1e30}, "no model of this configuration can be built"),
    ],
)
def test_an_arch_that_does_not_fit_is_named(tmp_path: Path, arch: dict[str, Any], expected: str) -> None:
    write_checkpoint(tmp_path, tiny())
    write_config(tmp_path, arch_of(tiny()) | arch)
    assert expected in complaint(tmp_path)


@pytest.mark.parametrize("key", ["hidden_size", "num_heads", "H_layers", "L_cycles", "halt_max_steps", "pos_encodings"])
def test_a_missing_arch_key_is_named(tmp_path: Path, key: str) -> None:
    write_checkpoint(tmp_path, tiny())
    arch = arch_of(tiny())
    del arch[key]
    write_config(tmp_path, arch)
    assert f"all_config.yaml, line 2: missing key 'arch.{key}'" in complaint(tmp_path)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    assert "no such folder" in complaint(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoint (expected a file called step_N" in complaint(tmp_path / "empty")
    folder = write_checkpoint(tmp_path / "c", tiny())
    (folder / "dataset.json").write_text(json.dumps({"seq_len": "4"}))
    assert "dataset.json, line 1: 'seq_len': expected a whole number, found '4'" in complaint(folder)
    (folder / "dataset.json").write_text('{"seq_len": 4,')
    assert "dataset.json, line 1: not valid YAML" in complaint(folder)
    (folder / "all_config.yaml").write_text("lr: 1\n")
    assert "all_config.yaml, line 1: missing key 'arch'" in complaint(folder)
    (folder / "all_config.yaml").unlink()
    assert "all_config.yaml: cannot be read: No such file" in complaint(folder)
