"""Specifications that every floor shares: the model's configuration and its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sage_edge.errors import InputError

SLOTS = "slots"  # the symbolic first axis of every tensor

Array = npt.NDArray[Any]
Precision = Literal["fp32", "fp16", "int8", "fp8"]
Family = Literal["hrm-act-v1", "hrm-bidirectional"]
DType = Literal["float32", "float16", "int32", "int64", "uint8"]


@dataclass(frozen=True)
class HRMConfig:
    """Architecture of one HRM; field names are those of the original code where it has them (arXiv 2506.21734).

    `family` is "hrm-act-v1" (the original) or "hrm-bidirectional" (projections between the levels in every cycle and a
    halting head on both states). Raises ValueError, naming the field, for values that describe no model.
    """

    vocab_size: int
    seq_len: int
    hidden_size: int
    num_heads: int
    H_layers: int
    L_layers: int
    H_cycles: int
    L_cycles: int
    halt_max_steps: int
    num_puzzle_identifiers: int = 1
    puzzle_emb_ndim: int = 0
    expansion: float = 4.0
    pos_encodings: Literal["rope", "learned"] = "rope"
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    family: Family = "hrm-act-v1"

    def __post_init__(self) -> None:
        counts = ("vocab_size", "seq_len", "hidden_size", "num_heads", "H_layers", "L_layers", "H_cycles", "L_cycles",
                  "halt_max_steps", "num_puzzle_identifiers")  # fmt: skip
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.puzzle_emb_ndim < 0:
            raise ValueError(f"puzzle_emb_ndim: expected 0 or more, found {self.puzzle_emb_ndim}")
        for name in ("expansion", "rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a positive number, found {value}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size: {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.pos_encodings == "rope" and (self.hidden_size // self.num_heads) % 2:
            raise ValueError("num_heads: rope needs an even head size (hidden_size / num_heads)")

    @property
    def bidirectional(self) -> bool:
        return self.family == "hrm-bidirectional"

    @property
    def prefix(self) -> int:
        """Number of puzzle tokens in front of the sequence: puzzle_emb_ndim / hidden_size, rounded up."""
        return -(self.puzzle_emb_ndim // -self.hidden_size)

    @property
    def positions(self) -> int:
        return self.prefix + self.seq_len


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one tensor; the first axis is always the slots. `minimum`/`maximum` bound integers."""

    name: str
    dtype: DType
    shape: tuple[str | int, ...]
    minimum: int | None = None
    maximum: int | None = None

    def __post_init__(self) -> None:
        if not self.shape or self.shape[0] != SLOTS or any(not isinstance(n, int) or n < 1 for n in self.shape[1:]):
            raise ValueError(
                f"shape of {self.name!r}: expected [{SLOTS}, n, ...] with n >= 1, found {list(self.shape)}"
            )

    @cached_property
    def item_shape(self) -> tuple[int, ...]:
        """The shape of one slot."""
        return tuple(int(n) for n in self.shape[1:])

    @cached_property
    def bounds(self) -> tuple[int | None, int | None]:
        """Least and greatest integer allowed: the spec's own, else the dtype's; None where a float has none."""
        dtype = np.iinfo(self.dtype) if self.dtype.startswith(("int", "uint")) else None
        low = self.minimum if self.minimum is not None else (dtype.min if dtype else None)
        high = self.maximum if self.maximum is not None else (dtype.max if dtype else None)
        return low, high

    def describe(self) -> str:
        text = f"{self.dtype} [{', '.join(map(str, self.shape))}]"
        if self.minimum is None and self.maximum is None:
            return text
        low, high = ("" if bound is None else bound for bound in (self.minimum, self.maximum))
        return f"{text} with values {low}..{high}"

    def validate(self, value: object, source: str = "input") -> Array:
        """`value` as a C-contiguous array of this spec's dtype; integers of another width are converted without loss.

        Raises InputError naming the tensor and what was expected: not an array, wrong dtype, shape or range, NaN, Inf.
        """
        where = f"{source}: {self.name!r}"
        try:
            array: Array = np.asarray(value)
        except ValueError as error:  # a ragged list
            raise InputError(f"{where}: expected {self.describe()}, found a list of unequal lengths") from error
        if array.dtype.kind not in "iufb" or (self.dtype.startswith(("int", "uint")) and array.dtype.kind not in "iu"):
            raise InputError(f"{where}: expected {self.describe()}, found dtype {array.dtype}")
        if array.shape[1:] != self.item_shape or array.ndim != len(self.shape):
            raise InputError(f"{where}: expected {self.describe()}, found shape {list(array.shape)}")
        if len(array) == 0:
            raise InputError(f"{where}: holds no request (first axis is 0)")
        if array.dtype.kind in "iu":
            low, high = self.bounds
            if (low is not None and int(array.min()) < low) or (high is not None and int(array.max()) > high):
                wrong = np.zeros(array.shape, bool)
                if low is not None:
                    wrong |= array < low
                if high is not None:
                    wrong |= array > high
                at = tuple(int(i) for i in np.argwhere(wrong)[0])
                raise InputError(f"{where}: value {array[at]} at {list(at)} is outside {low}..{high}")
        if not self.dtype.startswith("float"):
            return np.ascontiguousarray(array, self.dtype)
        with np.errstate(over="ignore"):
            converted = np.ascontiguousarray(array, self.dtype)
        if not np.isfinite(converted).all():
            raise InputError(f"{where}: holds NaN or Inf, or values beyond {self.dtype}")
        return converted


@dataclass(frozen=True)
class ModelSpec:
    """What a runner must know of a model: DESIGN.md, encode / refine / decode."""

    observation: tuple[TensorSpec, ...]
    context: tuple[TensorSpec, ...]
    carry: tuple[TensorSpec, ...]
    prediction: tuple[TensorSpec, ...]
    signals: tuple[str, ...]
    max_steps: int

    def signal(self, name: str) -> int:
        """Column of a signal. Raises InputError when the model does not give it."""
        if name not in self.signals:
            raise InputError(f"signal {name!r} is not given by this model; it gives {', '.join(self.signals)}")
        return self.signals.index(name)

    def random_observation(self, count: int) -> dict[str, Array]:
        """Seeded integer observations within the specs' ranges, for models without data at hand; first axis `count`."""
        rng = np.random.default_rng(0)
        return {
            s.name: rng.integers(s.minimum or 0, (s.maximum or 0) + 1, (count, *s.item_shape)).astype(s.dtype)
            for s in self.observation
        }

    def validate_observation(self, arrays: dict[str, Array], source: str = "input") -> dict[str, Array]:
        """The checked observation: every array by its spec, all with the same number of requests.

        An absent per-request identifier (such as `puzzle_identifiers`) becomes zero where zero is allowed.
        Raises InputError naming the array and what was expected.
        """
        known = {spec.name: spec for spec in self.observation}
        if extra := sorted(set(arrays) - set(known)):
            raise InputError(f"{source}: unknown array {extra[0]!r}; expected {', '.join(known)}")
        checked = {name: spec.validate(arrays[name], source) for name, spec in known.items() if name in arrays}
        counts = {name: len(array) for name, array in checked.items()}
        if len(set(counts.values())) > 1:
            raise InputError(f"{source}: the arrays disagree on the number of requests: {counts}")
        for name, spec in known.items():
            if name not in checked:
                if not counts or spec.item_shape or spec.minimum != 0:
                    raise InputError(f"{source}: missing array {name!r}; expected {spec.describe()}")
                checked[name] = np.zeros(next(iter(counts.values())), spec.dtype)
        return {name: checked[name] for name in known}
