"""LRC profiles: three numbers that set how strictly to halt, how much to explore and how fast to adapt.

L (inductance: inertia), R (resistance: filtering) and C (capacitance: room for experiments) are those of the LRC model
(dp-web4/web4, LRC_GOVERNANCE.md). The published profiles of SAGE modules give safety-critical L = R = 0.9, learning C = 0.7
and R = 0.5, performance L = 0.3 and C = 0.8; the numbers they leave open, and what each number does here, are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from sage_edge.errors import InputError
from sage_edge.irp.certificate import CERTIFIED, Certificate

STRICT, BOLD = 0.8, 0.4  # R from which only a certificate may halt early; R below which a plugin's own rule may too


@dataclass(frozen=True)
class Profile:
    """A policy preset. Raises ValueError, naming the field, for a number outside 0..1."""

    name: str
    L: float
    R: float
    C: float

    def __post_init__(self) -> None:
        for name in ("L", "R", "C"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number in 0..1, found {getattr(self, name)}")

    @property
    def adaptation(self) -> float:
        """How much of the newest evidence enters trust and the scheduler's estimates; 0.3, the protocol's, at L = 0.5."""
        return 0.6 * (1 - self.L)

    @property
    def momentum(self) -> float:
        """How much of the old trust stays: 0.7, the protocol's, at L = 0.5."""
        return 1 - self.adaptation

    @property
    def reserved(self) -> float:
        """Share of a period's budget that is promised to plugins by their trust; the rest goes where it is worth most."""
        return self.L

    @property
    def exploration(self) -> float:
        """How many standard errors an uncertain step's worth is raised by (an upper confidence bound)."""
        return self.C

    @property
    def allowed_loss(self) -> float:
        """The largest promised loss of a certificate that may halt a request early: 0.01 at R = 0.9, 0.05 at R = 0.5."""
        return 0.1 * (1 - self.R)

    def halting(self, own: str, certificate: Certificate | None) -> str:
        """The text of the policy for a request that asks for none.

        own: the plugin's own rule. A certificate that promises enough rules alone, below BOLD together with the own rule;
        without one, the own rule, from STRICT on every step.
        """
        if certificate is not None and certificate.max_loss <= self.allowed_loss + 1e-12:
            return f"{CERTIFIED} or {own}" if self.R < BOLD and own != "full" else CERTIFIED
        return "full" if self.R >= STRICT else own


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("balanced", L=0.5, R=0.5, C=0.5),  # ours: exactly the protocol's rates
        Profile("safety-critical", L=0.9, R=0.9, C=0.1),
        Profile("learning", L=0.5, R=0.5, C=0.7),
        Profile("performance", L=0.3, R=0.2, C=0.8),
    )
}


def find_profile(name: str) -> Profile:
    """A preset by name. Raises InputError."""
    if name not in PROFILES:
        raise InputError(f"profile {name!r}: not known; use {', '.join(PROFILES)}")
    return PROFILES[name]
