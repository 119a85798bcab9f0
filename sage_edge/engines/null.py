"""A runner without a model or a device: every rule of the contract, in NumPy, predictable by hand.

It stands in where the logic around engines is tested. A request's `inputs` [slots, 4] holds in its first column how many
steps it needs; the prediction counts towards that number and stays there.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sage_edge.engines.runner import Runner
from sage_edge.specs import SLOTS, Array, ModelSpec, TensorSpec

WIDTH = 4

NULL_MODEL = ModelSpec(
    observation=(TensorSpec("inputs", "int32", (SLOTS, WIDTH), 0, 1000),),
    context=(TensorSpec("context", "float32", (SLOTS, WIDTH)),),
    carry=(TensorSpec("z_H", "float32", (SLOTS, WIDTH)),),
    prediction=(TensorSpec("prediction", "int32", (SLOTS, WIDTH)),),
    signals=("q_halt", "q_continue", "entropy_mean", "changed"),
    max_steps=16,
)


class NullRunner(Runner):
    """q_halt exceeds q_continue from the step on that the request needs; the entropy is what is left to do."""

    def __init__(self, slots: int = 8) -> None:
        super().__init__(NULL_MODEL, slots, "0" * 64)

    def _activate(self) -> None: ...

    def _deactivate(self) -> None: ...

    def _empty(self, slots: int) -> dict[str, Array]:
        return {name: np.zeros((slots, WIDTH), np.float32) for name in ("context", "z_H")}

    def _admit(self, handle: dict[str, Array], rows: list[int], observation: dict[str, Array]) -> None:
        handle["context"][rows] = observation["inputs"]
        handle["z_H"][rows] = 0

    def _refine(self, handle: dict[str, Array]) -> npt.NDArray[np.float32]:
        need = handle["context"][:, 0]
        changed = handle["z_H"][:, 0] < need
        handle["z_H"] = np.minimum(handle["z_H"] + 1, need[:, None])
        left = need - handle["z_H"][:, 0]
        return np.stack((-left, np.full_like(left, -0.5), left, changed.astype(np.float32)), axis=1)

    def _decode(self, handle: dict[str, Array], names: tuple[str, ...]) -> dict[str, Array]:
        with np.errstate(invalid="ignore"):  # a free slot may hold anything
            return {"prediction": handle["z_H"].astype(np.int32)}

    def _select(self, handle: dict[str, Array], rows: list[int], slots: int) -> dict[str, Array]:
        chosen = self._empty(slots)
        for name, array in handle.items():
            chosen[name][: len(rows)] = array[rows]
        return chosen

    def _read(self, handle: dict[str, Array], rows: list[int]) -> dict[str, Array]:
        return {name: array[rows] for name, array in handle.items()}

    def _write(self, handle: dict[str, Array], rows: list[int], arrays: dict[str, Array]) -> None:
        for name, array in arrays.items():
            handle[name][rows] = array
