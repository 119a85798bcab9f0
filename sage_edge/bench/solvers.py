"""Two plugins without a network, with a known optimum: a linear system and a sparse regression. For the mixed load.

Their examples are drawn by a fixed seed, easy ones and hard ones; quality is measured against the optimum, energy never is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sage_edge.errors import InputError
from sage_edge.irp.plugin import Examples, Observation, Plugin, Result
from sage_edge.irp.spec import BenchSpec, Invariants, PluginSpec

Vector = npt.NDArray[np.float64]
SEEDS = {"calibration": 1, "test": 2}
CONDITIONS = (4.0, 30.0, 200.0)  # of the linear systems: easy to hard
SPARSITY = (0.3, 0.1, 0.03)  # weight of the 1-norm over its largest useful value: easy to hard
BENCH = BenchSpec("calibration", "test", "1 - distance to the optimum, relative", max_loss=0.03, calibration_examples=256,
                  test_examples=192)  # fmt: skip


@dataclass
class SolveState:
    """matrix: which one. x: the estimate; r: b - A x; along: where the next step goes; size: |b|."""

    matrix: int
    x: Vector
    r: Vector
    along: Vector
    size: float


class Solve(Plugin[SolveState]):
    """A x = b by conjugate gradients (Hestenes and Stiefel, J. Res. NBS 49, 1952)."""

    state_type = SolveState
    spec = PluginSpec(
        format="sage-edge-plugin/1", name="solve", entry="solvers:Solve", max_steps=32, halt="energy:0.01",
        summary="Solves one of three symmetric positive definite systems for a given right hand side",
        invariants=Invariants("the unknown vector x", "components of x that are not found yet",
                              "|b - A x| / |b|", "share of the residual that is gone"),
        bench=BENCH,
    )  # fmt: skip

    def __init__(self, spec: PluginSpec | None = None, size: int = 1024) -> None:
        super().__init__(spec or self.spec)
        self.matrices = [_matrix(size, condition) for condition in CONDITIONS]

    def init_state(self, observation: Observation) -> SolveState:
        b = _vector(observation, "b", len(self.matrices[0]))
        matrix = int(observation.get("matrix", -1))
        if not 0 <= matrix < len(self.matrices):
            raise InputError(f"solve: matrix: expected 0..{len(self.matrices) - 1}, found {matrix}")
        return SolveState(matrix, np.zeros_like(b), b.copy(), b.copy(), max(float(np.linalg.norm(b)), 1e-30))

    def step(self, state: SolveState, index: int) -> SolveState:
        image = self.matrices[state.matrix] @ state.along
        square, curvature = float(state.r @ state.r), float(state.along @ image)
        if square == 0 or curvature <= 0:  # it is solved
            return state
        rate = square / curvature
        r = state.r - rate * image
        along = r + float(r @ r) / square * state.along
        return SolveState(state.matrix, state.x + rate * state.along, r, along, state.size)

    def energy(self, state: SolveState) -> float:
        return float(np.linalg.norm(state.r)) / state.size

    def result(self, state: SolveState) -> Result:
        return {"x": state.x.copy()}

    def examples(self, source: str, limit: int | None = None) -> Examples:
        rng, size = _seeded(self.spec.name, source), len(self.matrices[0])
        observations, wanted, kinds = [], [], []
        for number in range(limit or 512):
            kind, x = number % len(CONDITIONS), rng.standard_normal(size)
            observations.append({"b": self.matrices[kind] @ x, "matrix": kind})
            wanted.append((kind, x))
            kinds.append(CONDITIONS[kind])
        return Examples(observations, wanted, {"condition": kinds})

    def quality(self, result: Result, reference: Any) -> float:
        kind, x = reference
        error = result["x"] - x
        return 1 - float(np.sqrt((error @ (self.matrices[kind] @ error)) / (x @ (self.matrices[kind] @ x))))


@dataclass
class SparseState:
    """x: the estimate; y: the measurements; weight: of the 1-norm; moved, start: length of the last and the first step."""

    y: Vector
    x: Vector
    weight: float
    moved: float
    start: float


class Sparse(Plugin[SparseState]):
    """min |M x - y|^2 / 2 + weight |x|_1 by proximal gradient steps (ISTA; Beck and Teboulle, SIAM J. Imaging Sci. 2009)."""

    state_type = SparseState
    spec = PluginSpec(
        format="sage-edge-plugin/1", name="sparse", entry="solvers:Sparse", max_steps=48, halt="energy:0.01",
        summary="Recovers a sparse vector from fewer measurements than unknowns",
        invariants=Invariants("the sparse vector x", "components whose support is not decided",
                              "length of the last step over that of the first", "share of the movement that has ceased"),
        bench=BENCH,
    )  # fmt: skip

    def __init__(self, spec: PluginSpec | None = None, size: int = 1024, measured: int = 768) -> None:
        super().__init__(spec or self.spec)
        rng = np.random.default_rng(5)
        self.operator = rng.standard_normal((measured, size)) / np.sqrt(measured)
        self.bound = _largest_curvature(self.operator)

    def init_state(self, observation: Observation) -> SparseState:
        y = _vector(observation, "y", len(self.operator))
        weight = float(observation.get("weight", -1.0))
        if not weight > 0:
            raise InputError(f"sparse: weight: expected a positive number, found {weight}")
        return SparseState(y, np.zeros(self.operator.shape[1]), weight, 1.0, 0.0)

    def step(self, state: SparseState, index: int) -> SparseState:
        moved = state.x - self.operator.T @ (self.operator @ state.x - state.y) / self.bound
        x = np.sign(moved) * np.maximum(np.abs(moved) - state.weight / self.bound, 0.0)
        length = float(np.linalg.norm(x - state.x))
        return SparseState(state.y, x, state.weight, length, state.start or max(length, 1e-30))

    def energy(self, state: SparseState) -> float:
        return state.moved / state.start

    def result(self, state: SparseState) -> Result:
        return {"x": state.x.copy()}

    def examples(self, source: str, limit: int | None = None) -> Examples:
        rng, count = _seeded(self.spec.name, source), limit or 512
        shape = (count, self.operator.shape[1])
        x = np.where(rng.random(shape) < 0.05, rng.standard_normal(shape), 0.0)
        y = x @ self.operator.T + 0.01 * rng.standard_normal((count, len(self.operator)))
        kinds = np.array([SPARSITY[number % len(SPARSITY)] for number in range(count)])
        weights = kinds * np.abs(y @ self.operator).max(axis=1)
        lowest = self._optima(y, weights)
        observations = [{"y": row, "weight": float(weight)} for row, weight in zip(y, weights, strict=True)]
        return Examples(observations, list(zip(y, weights, lowest, strict=True)), {"sparsity": kinds.tolist()})

    def quality(self, result: Result, reference: Any) -> float:
        y, weight, lowest = reference
        start = 0.5 * float(y @ y)
        return float(1 - (self._objective(result["x"], y, weight) - lowest) / (start - lowest))

    def _objective(self, x: Vector, y: Vector, weight: float) -> float:
        return 0.5 * float(((self.operator @ x - y) ** 2).sum()) + weight * float(np.abs(x).sum())

    def _optima(self, y: Vector, weights: Vector) -> list[float]:
        """The lowest objective of each row, by 400 accelerated steps of all at once (FISTA, of the same paper)."""
        x = ahead = np.zeros((len(y), self.operator.shape[1]))
        pace = 1.0
        for _ in range(400):
            moved = ahead - (ahead @ self.operator.T - y) @ self.operator / self.bound
            new = np.sign(moved) * np.maximum(np.abs(moved) - weights[:, None] / self.bound, 0.0)
            faster = (1 + np.sqrt(1 + 4 * pace**2)) / 2
            ahead, x, pace = new + (pace - 1) / faster * (new - x), new, faster
        return [self._objective(*one) for one in zip(x, y, weights, strict=True)]


def _largest_curvature(operator: npt.NDArray[np.float64]) -> float:
    """Just above the largest eigenvalue of M' M, by power iteration."""
    x = np.ones(operator.shape[1])
    for _ in range(60):
        x = operator.T @ (operator @ x)
        x /= np.linalg.norm(x)
    return 1.02 * float(x @ (operator.T @ (operator @ x)))


def _matrix(size: int, condition: float) -> npt.NDArray[np.float64]:
    """Symmetric positive definite, eigenvalues even on a logarithmic scale."""
    rng = np.random.default_rng(int(condition))
    basis, _ = np.linalg.qr(rng.standard_normal((size, size)))
    return np.asarray((basis * np.geomspace(1, condition, size)) @ basis.T)


def _seeded(name: str, source: str) -> np.random.Generator:
    if source not in SEEDS:
        raise InputError(f"{name}: examples {source!r}: expected {' or '.join(SEEDS)}")
    return np.random.default_rng(SEEDS[source])


def _vector(observation: Observation, name: str, size: int) -> Vector:
    if name not in observation:
        raise InputError(f"{name!r} is missing: expected float [{size}]")
    array = np.asarray(observation[name])
    if array.dtype.kind not in "fiu" or array.shape != (size,) or not np.isfinite(array).all():
        raise InputError(f"{name!r}: expected float [{size}], all finite, found {array.dtype} {list(array.shape)}")
    return array.astype(np.float64)
