"""Datasets in the original format, and what evaluation makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sage_edge.dataset import Dataset, load_dataset, save_dataset
from sage_edge.engines.null import NullRunner
from sage_edge.errors import InputError
from sage_edge.evaluate import Traces, collect, oracle, per_step, score
from sage_edge.runtime import Session
from sage_edge.specs import Array


def write(folder: Path, **changes: object) -> Path:
    """A dataset of 4 examples in 2 puzzles as the original code writes it; `changes` replace files or facts."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        "inputs": np.arange(12).reshape(4, 3) % 5,
        "labels": np.array([[1, 0, 2], [3, 3, 3], [4, 4, 0], [1, 2, 3]]),
        "puzzle_identifiers": np.array([7, 9]),
        "puzzle_indices": np.array([0, 1, 4]),
        "group_indices": np.array([0, 1, 2]),
    }
    facts = {"seq_len": 3, "vocab_size": 5, "pad_id": 0, "ignore_label_id": 0, "sets": ["all"]}
    for name, value in changes.items():
        if name in arrays or isinstance(value, np.ndarray):
            arrays[name] = value  # type: ignore[assignment]
        else:
            facts[name] = value
    for name, array in arrays.items():
        if array is not None:
            np.save(folder / f"all__{name}.npy", array)
    (folder / "dataset.json").write_text(json.dumps(facts))
    return folder


def test_a_dataset_of_the_original_code_is_read(tmp_path: Path) -> None:
    data = load_dataset(write(tmp_path))
    assert len(data) == 4
    assert data.puzzle_identifiers.tolist() == [7, 9, 9, 9]
    assert data.labels.tolist()[0] == [1, -1, 2]  # ignore_label_id does not count
    assert data.attributes == {}


def test_the_folder_above_a_test_split_stands_for_it(tmp_path: Path) -> None:
    write(tmp_path / "test")
    assert load_dataset(tmp_path).path == tmp_path / "test"


def test_ignored_tokens_do_not_count(tmp_path: Path) -> None:
    data = load_dataset(write(tmp_path))
    prediction = np.array([[1, 4, 2], [3, 3, 1], [4, 4, 4], [0, 0, 0]])
    assert data.exact(prediction).tolist() == [True, False, True, False]
    np.testing.assert_allclose(data.token_accuracy(prediction), [1, 2 / 3, 1, 0])
    assert data.exact(prediction[2:], slice(2, 4)).tolist() == [True, False]


def test_what_save_writes_load_reads(tmp_path: Path) -> None:
    inputs = np.array([[1, 2], [3, 1]], np.uint8)
    save_dataset(tmp_path, {"inputs": inputs, "labels": inputs, "holes": np.array([3, 4])}, 2, 5)
    data = load_dataset(tmp_path)
    np.testing.assert_array_equal(data.inputs, inputs)
    assert data.attributes["holes"].tolist() == [3, 4]
    assert len(data.first(1)) == 1
    assert data.first(1).attributes["holes"].tolist() == [3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 4}, "all__inputs.npy: expected shape [n, 4]"),
        ({"seq_len": "3"}, "'seq_len': expected a whole number"),
        ({"vocab_size": 4}, "tokens must be 0..3"),
        ({"sets": ["../x"]}, "'sets': expected a list of plain names"),
        ({"sets": ["other"]}, "other__inputs.npy is missing"),
        ({"inputs": np.zeros((4, 3))}, "expected an array of integers"),
        ({"inputs": np.zeros((3, 3), int)}, "holds 3 examples"),
        ({"inputs": np.zeros((0, 3), int)}, "expected shape [n, 3]"),
        ({"labels": np.full((4, 3), -3)}, "labels must be 0..4"),
        ({"labels": np.full((4, 3), 5)}, "labels must be 0..4"),
        ({"puzzle_indices": np.array([0, 1, 3])}, "rising indices from 0 to 4"),
        ({"puzzle_indices": np.array([0, 5, 4])}, "rising indices"),
        ({"ignore_label_id": "x"}, "'ignore_label_id'"),
        ({"holes": np.zeros(3, int)}, "all__holes.npy: expected shape [4]"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        load_dataset(write(tmp_path, **change))
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a dataset"):
        load_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        load_dataset(tmp_path)
    write(tmp_path)
    (tmp_path / "all__labels.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(InputError, match="all__labels.npy: not a NumPy array file"):
        load_dataset(tmp_path)
    (tmp_path / "all__labels.npy").unlink()
    with pytest.raises(InputError, match="all__labels.npy: missing"):
        load_dataset(tmp_path)


def hand_made() -> Traces:
    """Three examples over four steps: right from step 2, right at step 1 only, never right."""
    exact = np.array([[0, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    signals = np.zeros((3, 4, 3), np.float32)
    signals[0, 1:, 0] = 1  # wants to halt from step 2
    signals[1, 2:, 0] = 1  # from step 3, when the answer is already lost
    return Traces(signals, exact, exact * 1.0, ("q_halt", "q_continue", "entropy_mean"))


def test_scores_are_those_at_the_step_where_the_policy_stops() -> None:
    learned = score(hand_made(), "learned")
    assert learned.exact_accuracy == pytest.approx(1 / 3)
    assert learned.mean_steps == 3
    assert learned.steps_histogram == (0, 1, 1, 1)
    assert score(hand_made(), "full").exact_accuracy == pytest.approx(1 / 3)
    assert score(hand_made(), "max_steps:1").mean_steps == 1


def test_the_oracle_stops_at_the_first_right_answer() -> None:
    best = oracle(hand_made())
    assert best.exact_accuracy == pytest.approx(2 / 3)
    assert best.mean_steps == pytest.approx((2 + 1 + 4) / 3)


def test_the_halting_table_counts_who_has_stopped() -> None:
    assert [row["stopped_by_learned"] for row in per_step(hand_made())] == pytest.approx([0, 1 / 3, 2 / 3, 1])


class InputsOnly(Dataset):
    """The null model takes no puzzle identifiers."""

    @property
    def observation(self) -> dict[str, Array]:
        return {"inputs": self.inputs}


def test_replayed_policies_agree_with_the_loop() -> None:
    """What `eval` replays over recorded signals is what `run` does live."""
    inputs = np.random.default_rng(0).integers(0, 20, (40, 4)).astype(np.int32)
    labels = np.minimum(inputs[:, :1], 10).repeat(4, axis=1)
    data = InputsOnly(Path(), inputs, labels, np.zeros(40, np.int32), {})
    with Session(NullRunner()) as session:
        live = session.infer(data.observation, "learned or entropy:2.5")
        traces = collect(session, data, session.runner.model.max_steps)
    replayed = score(traces, "learned or entropy:2.5")
    assert replayed.mean_steps == np.mean([a.steps for a in live])
    assert replayed.exact_accuracy == data.exact(np.stack([a.prediction for a in live])).mean()
