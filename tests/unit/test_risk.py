"""Tails and bounds against brute force, published values and their own definition."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_edge.irp.risk import (
    allowed_loss,
    binomial_bound,
    binomial_tail,
    certifies,
    items_needed,
    stakes,
    upper_bound,
)


def exact_tail(successes: int, trials: int, rate: Fraction) -> float:
    """The definition, in exact arithmetic."""
    terms = (math.comb(trials, j) * rate**j * (1 - rate) ** (trials - j) for j in range(successes + 1))
    return float(sum(terms, Fraction(0)))


@given(st.integers(1, 60), st.data())
def test_the_binomial_tail_is_the_sum_of_its_definition(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(-1, trials))
    rate = Fraction(data.draw(st.integers(1, 99)), 100)
    expected = exact_tail(successes, trials, rate)
    assert binomial_tail(successes, trials, float(rate)) == pytest.approx(expected, rel=1e-10, abs=1e-300)


def test_the_binomial_tail_does_not_underflow_or_overflow() -> None:
    assert binomial_tail(0, 100_000, 0.001) == pytest.approx(math.exp(100_000 * math.log1p(-0.001)), rel=1e-9)
    assert binomial_tail(50_000, 100_000, 0.5) == pytest.approx(
        0.5 + 0.5 * math.sqrt(2 / (math.pi * 100_000)), abs=1e-6
    )
    assert binomial_tail(10, 1_000_000, 0.9) == 0.0
    assert binomial_tail(5, 5, 0.5) == binomial_tail(3, 5, 0.0) == 1.0


@pytest.mark.parametrize(
    ("lost", "items", "expected"), [(0, 10, 0.2589), (1, 10, 0.3942), (5, 10, 0.7776), (0, 299, 0.00997), (1, 100, 0.0466)]
)  # fmt: skip
def test_upper_bounds_are_those_of_clopper_and_pearson(lost: int, items: int, expected: float) -> None:
    """One-sided 95 % limits; 0 of n is 1 - 0.05 ** (1 / n)."""
    assert binomial_bound(lost, items, 0.05) == pytest.approx(expected, abs=6e-5)
    losses = np.random.default_rng(0).permutation(np.arange(items) < lost).astype(np.float64)
    assert upper_bound(losses, 0.05, binary=True) == binomial_bound(lost, items, 0.05)


@pytest.mark.parametrize(("limit", "error"), [(0.01, 0.05), (0.001, 0.05), (0.005, 0.1), (0.2, 0.01)])
def test_the_rule_of_three_gives_the_least_number_of_items(limit: float, error: float) -> None:
    least = math.ceil(math.log(error) / math.log1p(-limit))
    assert items_needed(0.0, limit, error, binary=True) == least
    assert allowed_loss(least, limit, error) == 0
    assert allowed_loss(least - 1, limit, error) == -1


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.004])
def test_as_many_items_as_said_are_needed(rate: float, binary: bool) -> None:
    least = items_needed(rate, 0.01, 0.05, binary)
    assert least is not None
    for items, enough in ((least, True), (least - 1, False)):
        losses = np.arange(items) < math.ceil(rate * items) if binary else np.full(items, rate)
        assert certifies(losses.astype(np.float64), 0.01, 0.05, binary) == enough


def test_no_number_of_items_certifies_what_is_not_so() -> None:
    assert items_needed(0.01, 0.01, 0.05, binary=True) is None
    assert items_needed(0.02, 0.01, 0.05, binary=False) is None
    assert not certifies(np.zeros(0), 0.5, 0.5, binary=False)


@given(st.integers(1, 3000), st.sampled_from([0.005, 0.01, 0.05, 0.3]), st.sampled_from([0.01, 0.05, 0.2]))
def test_tail_bound_and_allowance_say_the_same(items: int, limit: float, error: float) -> None:
    allowed = allowed_loss(items, limit, error)
    assert binomial_tail(allowed + 1, items, limit) > error
    if allowed >= 0:
        assert binomial_tail(allowed, items, limit) <= error
        assert allowed / items <= binomial_bound(allowed, items, error) <= limit + 1e-9


@given(st.lists(st.floats(0, 1), min_size=1, max_size=300), st.sampled_from([0.01, 0.05, 0.2]))
def test_the_bound_by_betting_is_the_least_limit_that_is_certified(values: list[float], error: float) -> None:
    losses = np.array(values)
    bound = upper_bound(losses, error, binary=False)
    assert losses.mean() <= bound <= 1
    if bound < 1:
        assert certifies(losses, bound + 1e-6, error, binary=False)
    if bound > 1e-6:
        assert not certifies(losses, bound - 1e-6, error, binary=False)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=100), st.integers(0, 99))
def test_no_stake_knows_its_loss(values: list[float], index: int) -> None:
    losses = np.array(values)
    index %= len(losses)
    other = losses.copy()
    other[index:] = -other[index:]
    np.testing.assert_array_equal(stakes(losses, 0.05)[: index + 1], stakes(other, 0.05)[: index + 1])
    assert ((stakes(losses, 0.05) >= 0) & (stakes(losses, 0.05) <= 1)).all()


@pytest.mark.parametrize("shape", [(0.1, 0.9), (1.0, 9.0), (30.0, 270.0), (0.01, 0.09)])
@pytest.mark.parametrize("error", [0.01, 0.05, 0.2])
def test_betting_certifies_what_is_not_so_as_rarely_as_promised(shape: tuple[float, float], error: float) -> None:
    """With the true mean at the limit; Beta losses of mean 0.1, from nearly binary to nearly constant."""
    draws = np.random.default_rng(0).beta(*shape, (3000, 120))
    # Beside them, losses of the same mean that lie on both sides of 0.
    for values in (draws, 1 - 9 * draws):
        wrong = np.mean([certifies(losses, 0.1, error, binary=False) for losses in values])
        assert wrong <= error + 3 * math.sqrt(error * (1 - error) / len(draws))


def test_losses_that_vary_little_need_fewer_items() -> None:
    """Mean 0.03, deviation 0.03: the binomial bound, which must take them for 0 and 1, allows much less."""
    losses = np.random.default_rng(1).beta(0.94, 30.4, 360)
    assert upper_bound(losses, 0.05, binary=False) < 0.042
    assert binomial_bound(math.ceil(losses.sum()), 360, 0.05) > 0.048
