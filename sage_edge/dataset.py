"""Datasets as the original HRM code writes them: one folder a split.

    DIR/dataset.json                    seq_len, vocab_size, pad_id, ignore_label_id, blank_identifier_id, sets, ...
    DIR/SET__inputs.npy                 integers [n, seq_len]
    DIR/SET__labels.npy                 integers [n, seq_len]; ignore_label_id marks tokens that do not count
    DIR/SET__puzzle_identifiers.npy     integers [puzzles]
    DIR/SET__puzzle_indices.npy         integers [puzzles + 1]: examples of puzzle p are indices[p] .. indices[p + 1]
    DIR/SET__group_indices.npy          integers [groups + 1]: puzzles of a group
    DIR/SET__NAME.npy (ours, optional)  integers [n]: an attribute to break results down by, e.g. `holes`

The prefix `SET__` may be absent for a single set. A folder that holds `test/dataset.json` stands for its `test`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sage_edge.errors import InputError
from sage_edge.specs import Array

FIELDS = ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices")


@dataclass(frozen=True)
class Dataset:
    """inputs int32 [n, seq_len], labels int32 [n, seq_len] with -1 where a token does not count,
    puzzle_identifiers int32 [n], attributes: integer arrays [n] by name."""

    path: Path
    inputs: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    puzzle_identifiers: npt.NDArray[np.int32]
    attributes: dict[str, npt.NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def observation(self) -> dict[str, Array]:
        return {"inputs": self.inputs, "puzzle_identifiers": self.puzzle_identifiers}

    @property
    def sha256(self) -> str:
        """Digest of what a result can depend on: inputs, labels and identifiers, whatever folder they lie in."""
        digest = hashlib.sha256(repr(self.inputs.shape).encode())
        for array in (self.inputs, self.labels, self.puzzle_identifiers):
            digest.update(np.ascontiguousarray(array, dtype="<i4").tobytes())
        return digest.hexdigest()

    def first(self, count: int | None) -> Dataset:
        """The first `count` examples (all when None)."""
        if count is None:
            return self
        cut = {name: array[:count] for name, array in self.attributes.items()}
        return Dataset(
            self.path, self.inputs[:count], self.labels[:count], self.puzzle_identifiers[:count], cut
        )  # fmt: skip

    def take(self, rows: npt.NDArray[np.int64]) -> Dataset:
        """The examples `rows`, in that order."""
        cut = {name: array[rows] for name, array in self.attributes.items()}
        return Dataset(self.path, self.inputs[rows], self.labels[rows], self.puzzle_identifiers[rows], cut)

    def token_accuracy(self, prediction: Array, rows: slice = slice(None)) -> npt.NDArray[np.float64]:
        """Share of counted tokens that are right, per example; prediction integers [n, seq_len]."""
        counted = self.labels[rows] >= 0
        right = (prediction == self.labels[rows]) & counted
        return np.asarray(right.sum(-1) / np.maximum(counted.sum(-1), 1), np.float64)

    def exact(self, prediction: Array, rows: slice = slice(None)) -> npt.NDArray[np.bool_]:
        """Whether all counted tokens are right, per example."""
        labels = self.labels[rows]
        return np.asarray(((prediction == labels) | (labels < 0)).all(-1))


def load_dataset(path: Path) -> Dataset:
    """Read a dataset folder. Raises InputError naming file and field for whatever does not fit."""
    folder = path
    if not (folder / "dataset.json").is_file() and (folder / "test" / "dataset.json").is_file():
        folder = path / "test"
    facts = _facts(folder / "dataset.json")
    sets = facts.get("sets") or [""]
    parts = [_load_set(folder, name, facts) for name in sets]
    names = set.intersection(*(set(part.attributes) for part in parts))
    return Dataset(
        folder,
        np.concatenate([part.inputs for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.puzzle_identifiers for part in parts]),
        {name: np.concatenate([part.attributes[name] for part in parts]) for name in sorted(names)},
    )


def _facts(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path.parent}: not a dataset (no dataset.json there or in its `test` folder)")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(facts, dict):
        raise InputError(f"{path}: expected a JSON object")
    for key in ("seq_len", "vocab_size"):
        if type(facts.get(key)) is not int or facts[key] < 1:
            raise InputError(f"{path}: {key!r}: expected a whole number of at least 1, found {facts.get(key)!r}")
    sets = facts.get("sets", [])
    if not isinstance(sets, list) or not all(isinstance(name, str) and Path(name).name == name for name in sets):
        raise InputError(f"{path}: 'sets': expected a list of plain names, found {sets!r}")
    ignored = facts.get("ignore_label_id")
    if ignored is not None and type(ignored) is not int:
        raise InputError(f"{path}: 'ignore_label_id': expected a whole number or null, found {ignored!r}")
    return facts


def _load_set(folder: Path, name: str, facts: dict[str, Any]) -> Dataset:
    prefix = f"{name}__" if name and (folder / f"{name}__inputs.npy").exists() else ""
    if not (folder / f"{prefix}inputs.npy").exists():
        raise InputError(f"{folder}: set {name!r}: {name}__inputs.npy is missing")
    inputs, labels = _array(folder, prefix, "inputs"), _array(folder, prefix, "labels")
    length, vocabulary = facts["seq_len"], facts["vocab_size"]
    for field, array in (("inputs", inputs), ("labels", labels)):
        path = folder / f"{prefix}{field}.npy"
        if array.ndim != 2 or array.shape[1] != length or len(array) == 0:
            raise InputError(f"{path}: expected shape [n, {length}] (dataset.json), found {list(array.shape)}")
    if len(inputs) != len(labels):
        raise InputError(f"{folder}: {prefix}inputs.npy holds {len(inputs)} examples, {prefix}labels.npy {len(labels)}")
    if inputs.min() < 0 or inputs.max() >= vocabulary:
        raise InputError(f"{folder / f'{prefix}inputs.npy'}: tokens must be 0..{vocabulary - 1} (dataset.json)")
    ignored = facts.get("ignore_label_id")
    masked = np.where(labels == ignored, -1, labels) if ignored is not None else labels
    if (masked[labels != ignored] < 0).any() or masked.max() >= vocabulary:
        raise InputError(f"{folder / f'{prefix}labels.npy'}: labels must be 0..{vocabulary - 1} (dataset.json)")
    attributes = {}
    for file in sorted(folder.glob(f"{prefix}*.npy")):
        field = file.stem.removeprefix(prefix)
        if field not in FIELDS and (prefix or "__" not in field):
            array = _array(folder, prefix, field)
            if array.shape != (len(inputs),):
                raise InputError(f"{file}: expected shape [{len(inputs)}], found {list(array.shape)}")
            attributes[field] = array
    identifiers = _identifiers(folder, prefix, len(inputs))
    return Dataset(folder, inputs.astype(np.int32), masked.astype(np.int32), identifiers, attributes)


def _identifiers(folder: Path, prefix: str, count: int) -> npt.NDArray[np.int32]:
    """The identifier of each example, spread over it by puzzle_indices."""
    if not (folder / f"{prefix}puzzle_identifiers.npy").exists():
        return np.zeros(count, np.int32)
    identifiers = _array(folder, prefix, "puzzle_identifiers")
    edges = _array(folder, prefix, "puzzle_indices")
    where = folder / f"{prefix}puzzle_indices.npy"
    if edges.shape != (len(identifiers) + 1,) or edges[0] != 0 or edges[-1] != count or (np.diff(edges) < 0).any():
        raise InputError(f"{where}: expected {len(identifiers) + 1} rising indices from 0 to {count}")
    return np.repeat(identifiers, np.diff(edges)).astype(np.int32)


def _array(folder: Path, prefix: str, field: str) -> npt.NDArray[np.int64]:
    path = folder / f"{prefix}{field}.npy"
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing") from error
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not a NumPy array file: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        raise InputError(
            f"{path}: expected an array of integers, found {getattr(array, 'dtype', type(array).__name__)}"
        )
    return array.astype(np.int64)


def save_dataset(folder: Path, arrays: dict[str, Array], seq_len: int, vocab_size: int) -> None:
    """Write one split in this format: `inputs`, `labels` and any attributes; one puzzle and one group an example."""
    folder.mkdir(parents=True, exist_ok=True)
    count = len(arrays["inputs"])
    steps = np.arange(count + 1, dtype=np.int32)
    whole = {"puzzle_identifiers": np.zeros(count, np.int32), "puzzle_indices": steps, "group_indices": steps, **arrays}
    for name, array in whole.items():
        np.save(folder / f"all__{name}.npy", array)
    facts = {
        "seq_len": seq_len, "vocab_size": vocab_size, "pad_id": 0, "ignore_label_id": 0, "blank_identifier_id": 0,
        "num_puzzle_identifiers": 1, "total_groups": count, "mean_puzzle_examples": 1.0, "sets": ["all"],
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(facts), encoding="utf-8")
