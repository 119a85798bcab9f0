"""What steps are worth: what the traces say, monotone, and back from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sage_edge.arrays import read_npz, write_npz
from sage_edge.irp.worth import BANDS, STAGES, WorthTable, blank, fitted, from_arrays, learned, to_arrays


def worth(table: WorthTable, steps: int, energy: float) -> list[float]:
    """Of each of the next steps."""
    return [value for value, count in table.ahead(steps, energy, 0.0) for _ in range(count)]


def halving(count: int, steps: int) -> np.ndarray:
    return np.tile(0.5 ** np.arange(1, steps + 1), (count, 1))


def test_the_mean_fall_of_the_traces() -> None:
    table = fitted(halving(10_000, 4))
    assert worth(table, 0, 1.0)[:2] == pytest.approx([0.5, 0.25], rel=1e-3)
    assert worth(table, 1, 0.5)[0] == pytest.approx(0.25, rel=1e-3)


def test_a_step_that_opens_the_way_is_worth_its_part_of_what_follows() -> None:
    path = np.tile([1.0, 1.0, 0.1, 0.1], (10_000, 1))
    assert worth(fitted(path), 0, 1.0)[:3] == pytest.approx([0.3] * 3, rel=1e-2)
    assert len(worth(fitted(path), 3, 0.1)) == 0 or worth(fitted(path), 3, 0.1)[0] < 1e-3


def test_easy_and_hard_requests_are_told_apart_by_their_energy() -> None:
    easy, hard = np.tile([0.05, 0.05, 0.05], (500, 1)), np.tile([0.8, 0.4, 0.1], (500, 1))
    table = fitted(np.concatenate((easy, hard)))
    assert sum(worth(table, 1, 0.05)) < 0.01
    assert worth(table, 1, 0.8)[0] == pytest.approx(0.4, rel=0.02)


def test_losses_teach_what_energies_only_tell_apart() -> None:
    energies = np.tile([0.1, 0.05], (1000, 1))
    losses = np.tile([0.9, 0.0], (1000, 1))
    table = fitted(energies, losses)
    assert sum(worth(table, 1, 0.1)) == pytest.approx(0.9, rel=0.01)
    assert not table.learns
    assert learned(table, [0.5], True, 0.3) is table


@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 30), st.integers(1, 40)), elements=st.floats(0, 1)))
def test_worth_never_rises_and_is_never_negative_whatever_the_traces(energies: np.ndarray) -> None:
    table = fitted(energies)
    for steps in range(energies.shape[1]):
        for energy in (0.0, 0.3, 1.0):
            for exploration in (0.0, 1.0):
                values = [value for value, _ in table.ahead(steps, energy, exploration)]
                assert all(value > 0 for value in values)
                assert values == sorted(values, reverse=True) or np.allclose(values, sorted(values, reverse=True))
            assert sum(count for _, count in table.ahead(steps, energy, 0.0)) <= STAGES * table.stride


def test_nothing_known_is_tried_and_exploration_raises_what_is_uncertain() -> None:
    table = blank(8)
    assert worth(table, 0, 1.0)[0] == pytest.approx(0.5)
    certain = fitted(halving(10_000, 8))
    for exploration in (0.5, 1.0):
        gain = [t.ahead(0, 1.0, exploration)[0][0] - t.ahead(0, 1.0, 0.0)[0][0] for t in (table, certain)]
        assert gain[0] > 100 * gain[1] > 0


def test_requests_teach_the_table_and_the_newest_count_more() -> None:
    table = blank(4)
    for _ in range(200):
        table = learned(table, [0.9, 0.9, 0.9, 0.9], True, 0.6)
    assert worth(table, 0, 1.0)[0] == pytest.approx(0.1, rel=0.1)
    for _ in range(200):
        table = learned(table, [0.2, 0.2, 0.2, 0.2], True, 0.6)
    assert worth(table, 0, 1.0)[0] == pytest.approx(0.8, rel=0.1)
    slow = blank(4)
    for energy in (0.9, 0.2):
        for _ in range(200):
            slow = learned(slow, [energy] * 4, True, 0.06)
    assert worth(slow, 0, 1.0)[0] < worth(table, 0, 1.0)[0]


def test_what_a_deadline_cut_short_says_nothing_of_the_rest() -> None:
    table = fitted(halving(50, 4))
    cut = learned(table, [0.5], False, 0.3)
    assert cut.counts[0, 0, 1] == table.counts[0, 0, 1] + 1
    assert cut.counts[0, 0, 2] == table.counts[0, 0, 2]
    done = learned(table, [0.5], True, 0.3)
    assert done.counts[0, 0, 2] == table.counts[0, 0, 2] + 1
    assert learned(table, [], True, 0.3) is table


def test_many_steps_are_grouped_into_stages() -> None:
    table = fitted(halving(10, 100))
    assert table.stages <= STAGES
    assert table.stride * table.stages >= 100
    assert table.counts.shape == (table.stages, BANDS, table.stages + 1)
    assert table.ahead(99, 0.0, 1.0) is not None


def test_a_table_comes_back_from_a_file(tmp_path: Path) -> None:
    table = fitted(halving(20, 9))
    write_npz(tmp_path / "worth.npz", to_arrays(table))
    again = from_arrays(read_npz(tmp_path / "worth.npz"))
    for steps in range(9):
        assert again.ahead(steps, 0.1, 0.5) == table.ahead(steps, 0.1, 0.5)


@pytest.mark.parametrize("damage", ["edges", "counts", "facts", "nan"])
def test_a_damaged_table_is_refused(damage: str) -> None:
    arrays = to_arrays(fitted(halving(20, 9)))
    if damage == "nan":
        arrays["sums"][0, 0, 0] = np.nan
    elif damage == "facts":
        arrays["facts"] = np.array([3.0, 1.0, 1.0])
    else:
        arrays[damage] = arrays[damage][1:]
    with pytest.raises(ValueError, match=r"do not fit|NaN"):
        from_arrays(arrays)
