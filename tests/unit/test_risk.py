"""Tails and bounds against brute force, published values and their own definition."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_edge.irp.risk import allowed_loss, binomial_tail, items_needed, p_value, upper_bound


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
    assert upper_bound(lost, items, 0.05, binary=True) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize(("limit", "error"), [(0.01, 0.05), (0.001, 0.05), (0.005, 0.1), (0.2, 0.01)])
def test_the_rule_of_three_gives_the_least_number_of_items(limit: float, error: float) -> None:
    least = math.ceil(math.log(error) / math.log1p(-limit))
    assert items_needed(0.0, limit, error, binary=True) == least
    assert allowed_loss(least, limit, error, binary=True) == 0
    assert allowed_loss(least - 1, limit, error, binary=True) == -1


def test_no_number_of_items_certifies_what_is_not_so() -> None:
    assert items_needed(0.01, 0.01, 0.05, binary=True) is None
    assert items_needed(0.02, 0.01, 0.05, binary=False) is None


@given(
    st.integers(1, 3000), st.sampled_from([0.005, 0.01, 0.05, 0.3]), st.sampled_from([0.01, 0.05, 0.2]), st.booleans()
)
def test_p_value_bound_and_allowance_say_the_same(items: int, limit: float, error: float, binary: bool) -> None:
    allowed = allowed_loss(items, limit, error, binary)
    assert p_value(allowed + 1, items, limit, binary) > error
    if allowed >= 0:
        assert p_value(allowed, items, limit, binary) <= error
        bound = upper_bound(allowed, items, error, binary)
        assert allowed / items <= bound <= limit + 1e-9


@given(st.integers(1, 500), st.floats(0, 1), st.sampled_from([0.01, 0.1, 0.5]))
def test_a_bounded_loss_is_never_certified_more_easily_than_a_binary_one(items: int, mean: float, limit: float) -> None:
    total = math.floor(mean * items)
    assert p_value(total, items, limit, binary=False) >= p_value(total, items, limit, binary=True) - 1e-12


@pytest.mark.parametrize("shape", [(0.1, 0.9), (1.0, 9.0), (30.0, 270.0)])
def test_hoeffding_bentkus_p_values_are_valid_for_losses_in_between(shape: tuple[float, float]) -> None:
    """With the true mean at the limit, p <= u must happen with probability at most u; Beta losses of mean 0.1."""
    rng = np.random.default_rng(0)
    totals = rng.beta(*shape, (4000, 120)).sum(1)
    p = np.array([p_value(float(total), 120, 0.1, binary=False) for total in totals])
    for u in (0.01, 0.05, 0.2):
        assert (p <= u).mean() <= u + 3 * math.sqrt(u * (1 - u) / len(p))


def test_a_larger_loss_never_looks_better() -> None:
    for binary in (True, False):
        p = [p_value(total, 400, 0.05, binary) for total in range(30)]
        assert p == sorted(p)
    fine = [p_value(total, 400, 0.05, False) for total in np.linspace(0, 25, 400)]
    assert fine == sorted(fine)
