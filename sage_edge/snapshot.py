"""A request in flight as a file: what it needs to go on elsewhere, and nothing that runs code when loaded.

A safetensors file. Tensors: `history` float32 [steps, k], and `state.NAME` [1, ...] for every tensor of context and carry.
Metadata: `snapshot`, a JSON object with `format`, `model` (digest), `signals`, `halt`, `max_steps`, `elapsed_ms`; and
`sha256` over that text and all tensors, so that a changed byte is found. The digest protects against accidents, not
against somebody who computes it anew.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sage_edge.errors import InputError, IntegrityError
from sage_edge.files import write_atomic
from sage_edge.specs import Array

FORMAT = "sage-edge-snapshot/1"
STATE = "state."


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One request between two steps.

    model: the runner's digest. signals: names of the k signals. halt, max_steps: its halting policy. history: float32
    [steps, k]. arrays: context and carry [1, ...] by name. elapsed_ms: time since admission, pauses not counted.
    """

    model: str
    signals: tuple[str, ...]
    halt: str
    max_steps: int
    elapsed_ms: float
    history: npt.NDArray[np.float32]
    arrays: dict[str, Array]

    @property
    def steps(self) -> int:
        return len(self.history)


def save_snapshot(path: Path | str, snapshot: Snapshot) -> None:
    """Write a snapshot, whole or not at all."""
    from safetensors.numpy import save

    facts = {
        "format": FORMAT,
        "model": snapshot.model,
        "signals": snapshot.signals,
        "halt": snapshot.halt,
        "max_steps": snapshot.max_steps,
        "elapsed_ms": snapshot.elapsed_ms,
    }
    text = json.dumps(facts, sort_keys=True)
    arrays = {"history": snapshot.history} | {STATE + name: array for name, array in snapshot.arrays.items()}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_atomic(Path(path), save(arrays, {"snapshot": text, "sha256": _digest(text, arrays)}))


def load_snapshot(path: Path | str) -> Snapshot:
    """Read a snapshot. Raises InputError when there is no file, IntegrityError when it is none, truncated or changed."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a snapshot (Pool.snapshot)")
    try:
        with safe_open(str(path), "numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise IntegrityError(f"{path}: not a whole safetensors file: {error}") from error
    text = metadata.get("snapshot", "")
    if not text or "sha256" not in metadata:
        raise IntegrityError(f"{path}: a safetensors file, but no snapshot")
    if metadata["sha256"] != _digest(text, arrays):
        raise IntegrityError(f"{path}: changed since it was written (SHA-256 differs); not resumed")
    try:
        facts = json.loads(text)
        if facts["format"] != FORMAT:
            raise IntegrityError(f"{path}: format {facts['format']!r}; this version reads {FORMAT}")
        return Snapshot(
            model=str(facts["model"]),
            signals=tuple(map(str, facts["signals"])),
            halt=str(facts["halt"]),
            max_steps=int(facts["max_steps"]),
            elapsed_ms=float(facts["elapsed_ms"]),
            history=arrays.pop("history").astype(np.float32).reshape(-1, len(facts["signals"])),
            arrays={name.removeprefix(STATE): array for name, array in arrays.items()},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{path}: a snapshot with missing or strange fields: {error}") from error


def _digest(text: str, arrays: dict[str, Array]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
