# SPDX-License-Identifier: Apache-2.0
"""The sudoku generator, checked against a slow solver and grader written here on sets, not bit masks."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="the sudoku generator needs numba (an export dependency)")
pytest.importorskip("rich", reason="the sudoku generator needs rich (an export dependency)")

PATH = Path(__file__).parents[2] / "export" / "sudoku9" / "generate.py"
# Known puzzles and their levels. The first (17 givens) is hard for blind search, though not for techniques.
KNOWN = {
    "4.....8.5.3..........7......2.....6.....8.4......1.......6.3.7.5..2.....1.4......": 2,
    "8..........36......7..9.2...5...7.......457.....1...3...1....68..85...1..9....4..": 4,
    "1....7.9..3..2...8..96..5....53..9...1..8...26....4...3......1..4......7..7...3..": 4,
}

UNITS = [{9 * i + j for j in range(9)} for i in range(9)]
UNITS += [{9 * j + i for j in range(9)} for i in range(9)]
UNITS += [{27 * a + 3 * b + 9 * i + j for i in range(3) for j in range(3)} for a in range(3) for b in range(3)]
SEES = [set().union(*(u for u in UNITS if c in u)) - {c} for c in range(81)]


def load() -> Any:
    spec = importlib.util.spec_from_file_location("sudoku9_generate_under_test", PATH)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


g = load()


@pytest.fixture(scope="module")
def sample() -> Any:
    return g.generate(600, seed=11)


@cache
def hard_sample() -> Any:
    return g.generate(1500, seed=5, holes=(50, 54))


def parse(text: str) -> Any:
    return np.array([[0 if c == "." else int(c) for c in text]], np.uint8)


def count_solutions(puzzle: list[int], limit: int = 2) -> int:
    """Solutions of a puzzle, up to `limit`, by plain backtracking at the cell with the fewest digits left."""
    best: tuple[int, list[int]] | None = None
    for c in range(81):
        if not puzzle[c]:
            fits = sorted(set(range(1, 10)) - {puzzle[p] for p in SEES[c]})
            if best is None or len(fits) < len(best[1]):
                best = (c, fits)
    if best is None:
        return 1
    found = 0
    for digit in best[1]:
        trial = puzzle.copy()
        trial[best[0]] = digit
        found += count_solutions(trial, limit - found)
        if found >= limit:
            break
    return found


def reference_grade(puzzle: list[int]) -> int:
    """The least level whose techniques, with all lower ones, solve the puzzle."""
    cands = [{d} if d else set(range(1, 10)) for d in puzzle]
    solved = {c for c in range(81) if puzzle[c]}
    for c in solved:
        for p in SEES[c] - solved:
            cands[p] -= cands[c]

    def settle(c: int, d: int) -> None:
        cands[c] = {d}
        solved.add(c)
        for p in SEES[c] - solved:
            cands[p] -= {d}

    def remove(cells: set[int], digits: set[int]) -> bool:
        hits = [c for c in cells - solved if cands[c] & digits]
        for c in hits:
            cands[c] -= digits
        return bool(hits)

    def spots(u: set[int], d: int) -> set[int]:
        return {c for c in u - solved if d in cands[c]}

    def step(level: int) -> bool:
        if level == 0:
            for c in set(range(81)) - solved:
                if len(cands[c]) == 1:
                    settle(c, next(iter(cands[c])))
                    return True
        if level == 1:
            for u, d in itertools.product(UNITS, range(1, 10)):
                if len(spots(u, d)) == 1:
                    settle(spots(u, d).pop(), d)
                    return True
        if level == 2:
            for box, line in itertools.product(UNITS[18:], UNITS[:18]):
                for a, b in ((box, line), (line, box)):
                    for d in range(1, 10) if box & line else ():
                        if spots(a, d) and spots(a, d) <= b and remove(b - a, {d}):
                            return True
        if level == 3:
            for u in UNITS:
                for i, j in itertools.combinations(sorted(u - solved), 2):
                    if len(cands[i]) == 2 and cands[i] == cands[j] and remove(u - {i, j}, cands[i]):
                        return True
                for d, e in itertools.combinations(range(1, 10), 2):
                    both = spots(u, d)
                    if len(both) == 2 and both == spots(u, e) and remove(both, set(range(1, 10)) - {d, e}):
                        return True
        return False

    worst = level = 0
    while level < 4 and len(solved) < 81:
        worst, level = (max(worst, level), 0) if step(level) else (worst, level + 1)
    return max(worst, level)


def test_shapes_and_consistency(sample: Any) -> None:
    assert sample.puzzle.shape == sample.solution.shape == (600, 81)
    assert sample.holes.shape == sample.technique.shape == (600,)
    assert {a.dtype for a in vars(sample).values()} == {np.dtype(np.uint8)}
    for unit in UNITS:
        assert (np.sort(sample.solution[:, sorted(unit)], axis=1) == np.arange(1, 10)).all()
    given = sample.puzzle != 0
    assert (sample.puzzle[given] == sample.solution[given]).all()
    assert ((~given).sum(axis=1) == sample.holes).all()


def test_solutions_are_unique(sample: Any) -> None:
    for puzzle in [*sample.puzzle[:60], *hard_sample().puzzle[:40]]:
        assert count_solutions(puzzle.tolist()) == 1


def test_holes_cover_exactly_the_range(sample: Any) -> None:
    assert set(sample.holes.tolist()) == set(range(24, 51))
    assert set(g.generate(20, seed=1, holes=(37, 37)).holes.tolist()) == {37}
    with pytest.raises(ValueError, match="holes"):
        g.generate(1, seed=1, holes=(30, 70))


def test_data_depend_on_the_seed_alone() -> None:
    count = 2 * g.CHUNK + 7
    one = g.generate(count, seed=3, workers=1)
    for other in (g.generate(count, seed=3, workers=1), g.generate(count, seed=3, workers=3)):
        assert all(np.array_equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))
    assert not np.array_equal(one.puzzle, g.generate(count, seed=4).puzzle)
    assert np.array_equal(one.puzzle[9:30], g.generate(21, seed=3, start=9).puzzle)


def test_symmetries_keep_puzzle_and_solution_together(sample: Any) -> None:
    puzzle, solution = g.symmetries(sample.puzzle, sample.solution, np.random.default_rng(0))
    assert puzzle.dtype == solution.dtype == np.uint8
    for unit in UNITS:
        assert (np.sort(solution[:, sorted(unit)], axis=1) == np.arange(1, 10)).all()
    assert (puzzle[puzzle != 0] == solution[puzzle != 0]).all()
    assert ((puzzle == 0).sum(axis=1) == sample.holes).all()
    assert (puzzle != sample.puzzle).any(axis=1).all()
    assert np.array_equal(g.grade(puzzle), sample.technique)


def test_symmetries_reach_the_whole_group() -> None:
    """Each cell lands everywhere about equally often; half the time a row's cells end in a column."""
    n = 20_000
    solution = np.repeat(g.generate(1, seed=0).solution, n, axis=0)
    marked = np.zeros((n, 81), np.uint8)
    marked[:, [0, 1]] = solution[:, [0, 1]]
    moved, _ = g.symmetries(marked, solution, np.random.default_rng(1))
    where = np.nonzero(moved)[1].reshape(n, 2)
    share = np.bincount(where.ravel(), minlength=81) / (2 * n)
    assert np.abs(share - 1 / 81).max() < 0.25 / 81
    same_row = (where[:, 0] // 9 == where[:, 1] // 9).mean()
    assert abs(same_row - 0.5) < 0.03
    assert np.abs(np.bincount(moved[moved != 0], minlength=10)[1:] / (2 * n) - 1 / 9).max() < 0.01


@pytest.mark.parametrize("whole", [False, True])
def test_hash_is_invariant(sample: Any, whole: bool) -> None:
    rng = np.random.default_rng(2)
    puzzle, solution = sample.puzzle, sample.solution
    expected = g.canonical_hash(solution if whole else puzzle, solution)
    assert expected.dtype == np.uint64
    for _ in range(5):
        puzzle, solution = g.symmetries(puzzle, solution, rng)
        assert np.array_equal(g.canonical_hash(solution if whole else puzzle, solution), expected)


def test_hash_discriminates(sample: Any) -> None:
    grids = g.generate(3000, seed=8, holes=(1, 1)).solution
    assert len(np.unique(g.canonical_hash(grids, grids))) >= 2999
    # One grid with different single holes: equal only where a symmetry of the grid itself maps the holes.
    full = np.repeat(sample.solution[:1], 81, axis=0)
    dug = np.where(np.eye(81, dtype=bool), 0, full).astype(np.uint8)
    assert len(np.unique(g.canonical_hash(dug, full))) == 81
    # Swapping two rows of different bands is no symmetry, though it keeps rows and columns Latin.
    order = [3, 1, 2, 0, 4, 5, 6, 7, 8]
    swapped = sample.solution.reshape(-1, 9, 9)[:, order].reshape(-1, 81)
    assert (g.canonical_hash(swapped, swapped) != g.canonical_hash(sample.solution, sample.solution)).all()


def test_splits_are_disjoint_and_exact() -> None:
    splits = g.make_splits(400, 60, 40, seed=9)
    assert {name: len(s.puzzle) for name, s in splits.items()} == {
        "train": 400,
        "calibration": 60,
        "test": 40,
    }
    for name, split in splits.items():
        assert split.holes.min() >= g.SPLITS[name][0]
        assert split.holes.max() <= g.SPLITS[name][1]
    grids = np.concatenate([s.solution for s in splits.values()])
    assert len(np.unique(g.canonical_hash(grids, grids))) == 500


def test_splits_drop_and_replace_collisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stream starts with the same 20 grids in disguise, twice; only one split may keep them, once."""
    base = g.generate(400, seed=1, holes=(30, 40))

    def repeating(count: int, seed: int, holes: Any = None, start: int = 0, **_: Any) -> Any:
        index = np.arange(start, start + count)
        rows = np.where(index < 40, index % 20, 40 + 120 * (seed % 3) + index - 40)
        moved = g.symmetries(base.puzzle[rows], base.solution[rows], np.random.default_rng(seed))
        return g.Puzzles(*moved, base.holes[rows], base.technique[rows])

    monkeypatch.setattr(g, "generate", repeating)
    splits = g.make_splits(50, 50, 50, seed=0)
    grids = np.concatenate([s.solution for s in splits.values()])
    assert len(np.unique(g.canonical_hash(grids, grids))) == len(grids) == 150


def test_known_grades() -> None:
    solution = g.generate(1, seed=0).solution
    assert g.grade(solution).tolist() == [0]
    diagonal = solution.copy()
    diagonal[0, ::10] = 0  # each hole has a unit with no other hole
    assert g.grade(diagonal).tolist() == [0]
    for text, level in KNOWN.items():
        assert g.grade(parse(text)).tolist() == [level] == [reference_grade(parse(text)[0].tolist())]
    assert len(g.TECHNIQUES) == 5


def test_grades_match_the_reference(sample: Any) -> None:
    hard = hard_sample()
    chosen = [(sample.puzzle[i], sample.technique[i]) for i in range(30)]
    for level in range(5):
        rows = np.flatnonzero(hard.technique == level)[:8]
        assert len(rows), f"no puzzle of level {level} to check"
        chosen += [(hard.puzzle[i], hard.technique[i]) for i in rows]
    for puzzle, technique in chosen:
        assert reference_grade(puzzle.tolist()) == technique


def test_program_writes_the_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    sizes = ["--train", "30", "--calibration", "20", "--test", "10", "--seed", "2"]
    monkeypatch.setattr(sys, "argv", ["generate.py", "--out", str(tmp_path / "new"), *sizes])
    g.main()
    expected = g.make_splits(30, 20, 10, seed=2)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "calibration.npz",
        "test.npz",
        "train.npz",
    ]
    for name, split in expected.items():
        with np.load(tmp_path / "new" / f"{name}.npz") as data:
            assert set(data.files) == set(vars(split))
            for key, value in vars(split).items():
                assert data[key].dtype == np.uint8
                assert np.array_equal(data[key], value)
    assert "train (30)" in capsys.readouterr().out
