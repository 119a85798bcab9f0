# SPDX-License-Identifier: Apache-2.0
"""Seeded 9x9 sudoku puzzles with unique solutions, graded by holes and by the hardest technique needed.

As a program it writes splits that share no solution grid, not even up to symmetry: generate.py --out DIR
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

U8: TypeAlias = npt.NDArray[np.uint8]
U64: TypeAlias = npt.NDArray[np.uint64]
I64: TypeAlias = npt.NDArray[np.int64]
Int: TypeAlias = int | np.signedinteger[Any]
F = TypeVar("F", bound=Callable[..., Any])

TECHNIQUES = ("naked singles", "hidden singles", "locked candidates", "pairs", "search")
SPLITS = {"train": (24, 50), "calibration": (30, 50), "test": (30, 50)}
MAX_HOLES = 55  # random digging ends near 56 holes; beyond this the restarts would take over
CHUNK = 512


@dataclass(frozen=True)
class Puzzles:
    """N puzzles, all arrays uint8: puzzle [N,81] (0 = blank), solution [N,81], holes [N], technique [N]."""

    puzzle: U8
    solution: U8
    holes: U8
    technique: U8


_cell = np.arange(81, dtype=np.int64)
ROW, COL, BOX = _cell // 9, _cell % 9, _cell // 27 * 3 + _cell % 9 // 3
HOUSES = np.stack([ROW, 9 + COL, 18 + BOX], axis=1)  # [81,3]: the units (of 27) a cell is in
_member = (HOUSES[None] == np.arange(27)[:, None, None]).any(axis=2)  # [27,81]
UNITS = np.array([np.flatnonzero(m) for m in _member], dtype=np.int64)  # [27,9] cells
OVERLAP = (_member[:, UNITS] << np.arange(9)).sum(axis=2).T.copy()  # [u,v]: positions of u lying in v, bits
POP = np.array([m.bit_count() for m in range(512)], dtype=np.int64)
DIGIT = np.array([m.bit_length() for m in range(512)], dtype=np.int64)  # of a one-bit mask

# nogil: chunks then run in threads. No cache=True: it breaks when this file is imported under two names, and
# this file is (as __main__, and by path). The cast keeps the plain functions' types.
_jit = cast(Callable[[F], F], numba.njit(nogil=True))
_elementwise = cast(Callable[[F], F], numba.vectorize(["uint64(uint64)"]))  # type: ignore[no-untyped-call]


@_elementwise
def _mix(x: U64) -> Any:
    """A splitmix64 step, mod 2**64."""
    z = x + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@_jit
def _below(state: U64, n: Int) -> Any:
    """The next of 0..n-1 from the stream `state` (uint64 [1])."""
    z = _mix(state[0])
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    return np.int64(z >> np.uint64(33)) % n


@_jit
def _shuffle(state: U64, items: I64) -> None:
    for i in range(len(items) - 1, 0, -1):
        j = _below(state, i + 1)
        items[i], items[j] = items[j], items[i]


@_jit
def _toggle(used: I64, cell: Int, bit: Int) -> None:
    for u in HOUSES[cell]:
        used[u] ^= bit


@_jit
def _solve(grid: I64, state: U64, randomly: bool, cell: Int, banned: Int) -> bool:
    """Complete `grid` (int64 [81], 0 = blank) in place, keeping `banned` out of `cell`; False if impossible.

    Depth-first, always at the cell with the fewest candidates, so forced cells propagate before any guess.
    """
    used, left, tried = np.zeros(27, np.int64), np.zeros(81, np.int64), np.zeros(81, np.int64)
    for c in np.flatnonzero(grid):
        _toggle(used, c, 1 << (grid[c] - 1))
    empty = np.flatnonzero(grid == 0)
    if randomly:
        _shuffle(state, empty)  # ties among cells are broken by position in this list
    k = 0
    while k < len(empty):
        best, fewest = k, 10
        for i in range(k, len(empty)):
            row, col, box = HOUSES[empty[i]]
            free = 511 & ~(used[row] | used[col] | used[box])
            if empty[i] == cell:
                free &= ~(1 << (banned - 1))
            if POP[free] < fewest:
                best, fewest, left[k] = i, POP[free], free
                if fewest <= 1:
                    break
        empty[k], empty[best] = empty[best], empty[k]
        while left[k] == 0:  # dead end: take back the previous cell
            k -= 1
            if k < 0:
                return False
            _toggle(used, empty[k], tried[k])
        rest = left[k]
        if randomly:
            for _ in range(_below(state, POP[rest])):
                rest &= rest - 1
        tried[k] = rest & -rest
        left[k] ^= tried[k]
        _toggle(used, empty[k], tried[k])
        grid[empty[k]] = DIGIT[tried[k]]
        k += 1
    return True


@_jit
def _place(cand: I64, open_: I64, cell: Int, bit: Int) -> None:
    for u in HOUSES[cell]:
        for c in UNITS[u]:
            cand[c] &= ~bit
    cand[cell], open_[cell] = bit, 0


@_jit
def _strike(cand: I64, cell: Int, mask: Int) -> bool:
    before = cand[cell]
    cand[cell] &= ~mask
    return bool(cand[cell] != before)


@_jit
def _deduce(cand: I64, open_: I64, level: int) -> bool:
    """Sweep one technique over candidate masks int64 [81]; whether it found anything. `open_`: unsolved."""
    found = False
    for u in range(27):
        unit, where = UNITS[u], np.zeros(9, np.int64)  # for each digit its possible positions, as bits
        for k, c in enumerate(unit):
            if level == 0 and open_[c] and POP[cand[c]] == 1:
                _place(cand, open_, c, cand[c])
                found = True
            for d in range(9):
                where[d] |= (open_[c] & cand[c] >> d) << k
        for d in range(9):
            w = where[d]
            first = unit[DIGIT[w & -w] - 1]  # meaningful where w is not empty
            if level == 1 and POP[w] == 1:
                _place(cand, open_, first, 1 << d)
                found = True
            elif level == 2 and w:
                for v in HOUSES[first]:
                    if v != u and w & ~OVERLAP[u, v] == 0:  # confined to v: pointing (from a box) or claiming
                        for k in range(9):
                            if not OVERLAP[v, u] >> k & 1:
                                found |= _strike(cand, UNITS[v, k], 1 << d)
            for e in range(d if level == 3 else 0):
                mask = cand[unit[d]]  # here d and e number cells, for naked pairs
                naked = open_[unit[d]] and open_[unit[e]] and POP[mask] == 2 and cand[unit[e]] == mask
                hidden = POP[w] == 2 and where[e] == w
                for k in range(9):
                    if naked and k != d and k != e:
                        found |= _strike(cand, unit[k], mask)
                    if hidden and w >> k & 1:
                        found |= _strike(cand, unit[k], 511 & ~(1 << d | 1 << e))
    return found


@_jit
def _grade(puzzle: I64) -> int:
    """Hardest level needed. Exact: a level is entered only where all lower ones together are stuck."""
    cand, open_ = np.full(81, 511, np.int64), np.ones(81, np.int64)
    for c in np.flatnonzero(puzzle):
        _place(cand, open_, c, 1 << (puzzle[c] - 1))
    worst = level = 0
    while level < 4 and open_.any():
        worst, level = (max(worst, level), 0) if _deduce(cand, open_, level) else (worst, level + 1)
    return max(worst, level)


def grade(puzzle: U8) -> U8:
    """Technique (uint8 [N], an index into TECHNIQUES) of puzzles uint8 [N,81] with a unique solution."""
    return np.array([_grade(p) for p in puzzle.astype(np.int64)], np.uint8)


@_jit
def _fill(puzzle: U8, solution: U8, holes: U8, technique: U8, seeds: U64, low: int, high: int) -> None:
    for i in range(len(puzzle)):
        state = seeds[i : i + 1].copy()
        target, order, dug = low + _below(state, high - low + 1), np.arange(81), -1
        while dug < target:  # a grid that cannot give up enough cells is replaced; the target stays
            full = np.zeros(81, np.int64)
            _solve(full, state, True, -1, 1)
            work, dug = full.copy(), 0
            _shuffle(state, order)
            for c in order:  # one pass is enough: a cell refused once stays needed with fewer givens
                trial = np.where(np.arange(81) == c, 0, work)
                if dug < target and not _solve(trial, state, False, c, work[c]):  # no other digit fits
                    work[c] = 0
                    dug += 1
        puzzle[i], solution[i], holes[i] = work.astype(np.uint8), full.astype(np.uint8), dug
        technique[i] = _grade(work)


def generate(
    count: int, seed: int, holes: tuple[int, int] = (24, 50), start: int = 0, workers: int = 0, bar: str = ""
) -> Puzzles:
    """`count` puzzles, with hole counts uniform over the inclusive range `holes`.

    Each puzzle has its own stream, seeded by (seed, its index counted from `start`), so neither chunks nor
    `workers` (threads; 0: all cores) change the data. `bar` names a progress bar for the terminal, if any.
    """
    from rich.progress import track  # here, so that whoever only wants `symmetries` needs no rich

    low, high = holes
    if not 0 <= low <= high <= MAX_HOLES:
        raise ValueError(f"holes must be 0 <= low <= high <= {MAX_HOLES}, not {holes}")
    index = np.arange(start, start + count, dtype=np.uint64)
    seeds = _mix(_mix(index) ^ _mix(np.array([seed % 2**64], np.uint64)))
    out = Puzzles(*(np.empty(s, np.uint8) for s in ((count, 81), (count, 81), count, count)))

    def chunk(at: int) -> None:
        s = slice(at, at + CHUNK)
        _fill(out.puzzle[s], out.solution[s], out.holes[s], out.technique[s], seeds[s], low, high)

    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        done = pool.map(chunk, range(0, count, CHUNK))
        list(track(done, bar, -(-count // CHUNK), disable=not bar))
    return out


def symmetries(puzzle: U8, solution: U8, rng: np.random.Generator) -> tuple[U8, U8]:
    """A random symmetry per sample, the same for its puzzle and solution; all arrays are uint8 [N,81]."""
    n = len(puzzle)

    def lines() -> I64:  # [N,9]: bands in random order, and the three lines inside each
        band = rng.random((n, 3, 1)).argsort(axis=1)
        return cast(I64, (3 * band + rng.random((n, 3, 3)).argsort(axis=2)).reshape(n, 9))

    flip = rng.integers(0, 2, (n, 1))  # a transpose swaps the strides of the two axes
    index = (lines() * (9 - 8 * flip))[:, :, None] + (lines() * (1 + 8 * flip))[:, None, :]
    index = index.reshape(n, 81) + 81 * np.arange(n)[:, None]
    relabel = np.zeros((n, 10), np.uint8)
    relabel[:, 1:] = rng.random((n, 9)).argsort(axis=1) + 1
    base = 10 * np.arange(n)[:, None]
    return relabel.take(puzzle.take(index) + base), relabel.take(solution.take(index) + base)


def _cycle_colours(grid: I64, table: U64) -> U64:
    """Colour uint64 [n,9,9] of each cell from how its row and the others exchange digits; grid int64, 0..8.

    For rows r and s, going from a column of r to s and on to where r holds the digit found there permutes the
    columns. The cycle lengths (2 = an unavoidable rectangle) survive every symmetry that keeps rows rows.
    """
    here, where = np.arange(9), grid.argsort(axis=2)
    step = np.take_along_axis(where[:, :, None, :], grid[:, None, :, :], axis=3)  # [n,r,s,column]
    power, length = step, np.zeros(step.shape, np.int64)  # 0 stands for "5 or longer"
    for k in (2, 3, 4):
        power = np.take_along_axis(step, power, axis=3)
        length[(power == here) & (length == 0)] = k
    kind = (here[:, None] // 3 == here // 3) * 1 + np.eye(9, dtype=np.int64)  # other band, same band, itself
    return cast(U64, table[length * 3 + kind[:, :, None]].sum(axis=2))


def canonical_hash(grid: U8, solution: U8) -> U64:
    """uint64 [N], invariant under the sudoku symmetry group; grid (0 = blank) and solution uint8 [N,81].

    The group: digit relabelling; permuting bands, stacks, rows in a band, columns in a stack; transposition.
    Equivalent puzzles always get equal hashes, so unequal hashes prove non-equivalence. Equal hashes prove
    nothing (colour refinement has blind spots, 64 bits can collide) but are treated as duplicates, which is
    conservative. With grid = solution it hashes the solution grid itself.
    """
    salt = _mix(np.arange(1, 40, dtype=np.uint64))
    out = np.empty(len(grid), np.uint64)
    for at in range(0, len(grid), CHUNK):  # in chunks, for the temporaries hold 729 words per grid
        full = solution[at : at + CHUNK].astype(np.int64) - 1
        n, square = len(full), full.reshape(-1, 9, 9)
        across = _cycle_colours(square, salt[:15])
        down = _cycle_colours(square.transpose(0, 2, 1), salt[:15]).transpose(0, 2, 1)
        colour = (_mix(across) + _mix(down)).reshape(n, 81)  # symmetric, as a transpose swaps the two
        colour += salt[15 + (grid[at : at + CHUNK] != 0)]
        by_digit = full.argsort(axis=1, kind="stable")  # cells of digit 1, then of digit 2, ...
        for _ in range(4):
            seen = _mix(colour)
            in_row = _mix(seen.reshape(n, 9, 9).sum(axis=2))[:, ROW]
            in_col = _mix(seen.reshape(n, 9, 9).sum(axis=1))[:, COL]
            in_box = _mix(seen.reshape(n, 3, 3, 3, 3).sum(axis=(2, 4)).reshape(n, 9) ^ salt[20])[:, BOX]
            of_digit = np.take_along_axis(seen, by_digit, axis=1).reshape(n, 9, 9).sum(axis=2)
            same = np.take_along_axis(_mix(of_digit ^ salt[21]), full, axis=1)
            colour = _mix(seen + salt[22]) + _mix(in_row + in_col) + in_box + same
        out[at : at + CHUNK] = _mix(colour).sum(axis=1)
    return out


def make_splits(train: int, calibration: int, test: int, seed: int, bars: bool = False) -> dict[str, Puzzles]:
    """The splits of SPLITS in exactly these sizes; no two puzzles share a solution grid, even up to symmetry.

    Test is made first and train last: what collides with an earlier puzzle is dropped from the later split,
    and the next puzzles of that split's own stream take its place.
    """
    taken, made = np.empty(0, np.uint64), {}
    for stream, (name, size) in enumerate({"test": test, "calibration": calibration, "train": train}.items()):
        split, start = generate(0, 0), 0
        while (missing := size - len(split.holes)) > 0:
            new = generate(missing, 3 * seed + stream, SPLITS[name], start, bar=name if bars else "")
            marks = np.concatenate([taken, canonical_hash(new.solution, new.solution)])
            first = np.sort(np.unique(marks, return_index=True)[1])
            keep = first[len(taken) :] - len(taken)
            split = Puzzles(**{k: np.concatenate([v, vars(new)[k][keep]]) for k, v in vars(split).items()})
            taken, start = marks[first], start + missing
        made[name] = split
    return {name: made[name] for name in SPLITS}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write train, calibration and test sudoku puzzles.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the three .npz files")
    for name, default in (("train", 300_000), ("calibration", 4_000), ("test", 2_000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    made = make_splits(a.train, a.calibration, a.test, a.seed, bars=sys.stdout.isatty())
    for name, split in made.items():
        temporary = a.out / f".{name}.{os.getpid()}.npz"
        np.savez_compressed(temporary, **vars(split))
        os.replace(temporary, a.out / f"{name}.npz")
        print(f"{name} ({len(split.holes)})".ljust(20) + "".join(t.rjust(19) for t in TECHNIQUES))
        for low in np.unique(split.holes // 5 * 5):
            row = np.bincount(split.technique[split.holes // 5 * 5 == low], minlength=len(TECHNIQUES))
            print(f"  {low}-{low + 4} holes".ljust(20) + "".join(str(n).rjust(19) for n in row))


if __name__ == "__main__":
    main()
