"""Paired proportions: published figures, exact counts, and how often the interval is wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_edge.irp.paired import Paired, wilson

counts = st.builds(Paired, *(st.integers(0, 500) for _ in range(4))).filter(lambda p: p.items > 0)


def test_newcombes_own_example() -> None:
    """Newcombe 1998, table III: cells 36, 12, 2, 0; method 10 gives 0.0569 to 0.3404."""
    down, up = Paired(36, 12, 2, 0).interval(0.95)
    assert (round(down, 4), round(up, 4)) == (0.0569, 0.3404)


def test_wilsons_interval() -> None:
    """81 of 263 gives 0.2553 to 0.3662 (Newcombe 1998, Statistics in Medicine 17:857, table I)."""
    down, up = wilson(81 / 263, 263, 0.95)
    assert (round(down, 4), round(up, 4)) == (0.2553, 0.3662)


def test_counts_and_exact_p_value() -> None:
    first = np.array([1, 1, 1, 1, 1, 1, 0, 0], bool)
    second = np.array([1, 0, 0, 0, 0, 0, 1, 0], bool)
    pairs = Paired.of(first, second)
    assert pairs == Paired(both=1, lost=5, won=1, neither=1)
    assert pairs.loss == 4 / 8
    assert pairs.p_value == pytest.approx(2 * (1 + 6) / 64)  # at most 1 of 6 coins, twice
    assert Paired(10, 0, 0, 2).p_value == 1


@given(counts, st.sampled_from([0.5, 0.95, 0.99]))
def test_the_interval_holds_the_loss_and_mirrors(pairs: Paired, confidence: float) -> None:
    down, up = pairs.interval(confidence)
    assert -1 - 1e-9 <= down <= pairs.loss + 1e-9
    assert pairs.loss - 1e-9 <= up <= 1 + 1e-9
    mirrored = Paired(pairs.both, pairs.won, pairs.lost, pairs.neither).interval(confidence)
    assert mirrored == pytest.approx((-up, -down))


def test_no_difference_on_few_items_shows_little() -> None:
    """Wald's interval would be empty here; 100 items cannot show a fall of less than a point, 1,000 can."""
    assert Paired(92, 0, 0, 8).interval(0.95)[1] > 0.01
    assert Paired(920, 0, 0, 80).interval(0.95)[1] < 0.01


@pytest.mark.parametrize("rates", [(0.918, 0.012, 0.002), (0.90, 0.02, 0.01), (0.6, 0.04, 0.03)])
@pytest.mark.parametrize("items", [640, 3000])
def test_a_true_fall_of_one_point_passes_no_more_often_than_promised(
    rates: tuple[float, float, float], items: int
) -> None:
    rng = np.random.default_rng(0)
    draws = rng.multinomial(items, [*rates, 1 - sum(rates)], 2000)
    passed = sum(Paired(*map(int, row)).interval(0.95)[1] <= 0.01 for row in draws)
    assert passed / 2000 <= 0.025 + 3 * np.sqrt(0.025 * 0.975 / 2000)
