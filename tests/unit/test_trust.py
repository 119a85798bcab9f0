"""Trust, convergence and profiles: the protocol's numbers, and their bounds."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_edge.errors import InputError
from sage_edge.irp.calibrate import Certified
from sage_edge.irp.certificate import Certificate
from sage_edge.irp.profiles import PROFILES, Profile, find_profile
from sage_edge.irp.spec import EnergyRange
from sage_edge.irp.trust import HIGHEST, LOWEST, convergence, updated_trust

unit = st.floats(0, 1)


def test_the_update_is_the_protocols_at_its_momentum() -> None:
    modifier = 1 / (1 + math.exp(-0.3 / 0.5))
    assert updated_trust(2.0, 0.9, 0.3, 0.5, 0.6) == pytest.approx(0.7 * 2.0 + 0.2 * 0.9 * modifier + 0.1 * 0.6)


@given(st.floats(LOWEST, HIGHEST), st.none() | unit, st.floats(-1, 1), st.floats(0.01, 1), st.floats(-5, 5), unit)
def test_trust_stays_within_its_bounds(trust: float, quality: float | None, contribution: float, coherence: float,
                                       efficiency: float, momentum: float) -> None:  # fmt: skip
    assert LOWEST <= updated_trust(trust, quality, contribution, coherence, efficiency, momentum) <= HIGHEST


@given(st.floats(LOWEST, HIGHEST), unit, unit, st.floats(-1, 1), st.floats(0.01, 1), unit)
def test_better_convergence_contribution_and_efficiency_never_cost_trust(
    trust: float, low: float, high: float, contribution: float, coherence: float, efficiency: float
) -> None:
    low, high = sorted((low, high))
    same = (contribution, coherence, efficiency)
    assert updated_trust(trust, low, *same) <= updated_trust(trust, high, *same)
    assert updated_trust(trust, 0.5, low, coherence, efficiency) <= updated_trust(
        trust, 0.5, high, coherence, efficiency
    )
    assert updated_trust(trust, 0.5, contribution, coherence, low) <= updated_trust(
        trust, 0.5, contribution, coherence, high
    )


def test_earned_trust_settles_within_one_and_a_grant_wears_off() -> None:
    for start in (0.1, 1.0, 10.0):
        trust = start
        for _ in range(200):
            trust = updated_trust(trust, 1.0, 1.0, 0.5, 1.0)
        assert trust == pytest.approx((0.2 / (1 + math.exp(-2)) + 0.1) / 0.3)


def test_one_step_says_nothing_of_convergence() -> None:
    assert convergence([0.4], EnergyRange()).monotonicity_ratio is None
    assert updated_trust(0.8, None, 0.5, 0.5, 0.8) == pytest.approx(0.7 * 0.8 + 0.2 * 0.8 + 0.1 * 0.8)


def test_convergence_is_what_it_says() -> None:
    halving = convergence([0.8, 0.4, 0.2, 0.1], EnergyRange())
    assert halving.convergence_rate == pytest.approx(0.5)
    assert halving.monotonicity_ratio == 1.0
    swinging = convergence([0.5, 0.7, 0.5, 0.7], EnergyRange())
    assert swinging.monotonicity_ratio == pytest.approx(1 / 3)
    assert swinging.convergence_rate is not None
    assert swinging.convergence_rate < 0
    assert swinging.dE_variance == pytest.approx(8 / 9 * 0.04)
    assert convergence([0.0, 0.0], EnergyRange()).convergence_rate is None
    assert convergence([-1.0, -1.5], EnergyRange(-2.0, 0.0)).convergence_rate == pytest.approx(0.5)


def test_the_published_numbers_of_the_profiles() -> None:
    assert (PROFILES["safety-critical"].L, PROFILES["safety-critical"].R) == (0.9, 0.9)
    assert (PROFILES["learning"].C, PROFILES["learning"].R) == (0.7, 0.5)
    assert (PROFILES["performance"].L, PROFILES["performance"].C) == (0.3, 0.8)
    assert PROFILES["balanced"].momentum == 0.7


def test_profiles_order_strictness_exploration_and_adaptation() -> None:
    safe, fast = PROFILES["safety-critical"], PROFILES["performance"]
    assert safe.adaptation < PROFILES["balanced"].adaptation < fast.adaptation
    assert safe.exploration < fast.exploration
    assert safe.allowed_loss < fast.allowed_loss


def certificate(max_loss: float) -> Certificate:
    chosen = Certified("energy", "energy:0.1", 0.1, 10, 0.0, 0.0, 2.0)
    return Certificate("sage-edge-certificate/1", "x", "0" * 64, "0" * 64, "quality_lost", max_loss, 0.95, ("energy",), 10, 8,
                       chosen, (), None)  # fmt: skip


@pytest.mark.parametrize(
    ("profile", "max_loss", "expected"),
    [
        ("safety-critical", None, "full"),
        ("safety-critical", 0.05, "full"),
        ("safety-critical", 0.01, "certified"),
        ("balanced", None, "learned"),
        ("balanced", 0.05, "certified"),
        ("balanced", 0.06, "learned"),
        ("performance", 0.01, "certified or learned"),
        ("performance", None, "learned"),
    ],
)
def test_how_strictly_a_profile_halts(profile: str, max_loss: float | None, expected: str) -> None:
    held = None if max_loss is None else certificate(max_loss)
    assert PROFILES[profile].halting("learned", held) == expected


def test_a_bold_profile_does_not_join_a_certificate_with_full_steps() -> None:
    assert PROFILES["performance"].halting("full", certificate(0.01)) == "certified"


def test_unknown_profiles_and_numbers_outside_are_refused() -> None:
    with pytest.raises(InputError, match="use balanced, safety-critical, learning, performance"):
        find_profile("reckless")
    with pytest.raises(ValueError, match="R: expected a number in"):
        Profile("odd", 0.5, 1.5, 0.5)
