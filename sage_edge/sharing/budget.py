"""A period's budget, divided by trust with a floor, and divided anew when a plugin has no work left. Pure.

IRP protocol 1.0 ("Energy Budgeting") gives each plugin max(5 %, its share by trust), which can add up to more than there
is. Here the shares add up to the budget exactly: who would get less than the floor gets the floor, and the others divide the
rest by trust.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

FLOOR = 0.05


@dataclass(frozen=True)
class Budget:
    """What all plugins together may spend: `total` ATP in every `period_ms`. An ATP is a millisecond of the device (as
    calibrated), or a millijoule. The default gives the whole device. Raises ValueError for what cannot be spent."""

    period_ms: float = 500.0
    total: float = 500.0
    unit: Literal["ms", "mJ"] = "ms"

    def __post_init__(self) -> None:
        if self.period_ms <= 0 or self.total <= 0:
            raise ValueError("period_ms and total: expected positive numbers")


def shares(trust: Mapping[str, float], amount: float, least: float) -> dict[str, float]:
    """`amount` divided by trust, at least `least` (or an equal part, if that is less) for everybody."""
    least = min(least, amount / len(trust)) if trust else 0.0
    given: dict[str, float] = {}
    others, rest = dict(trust), amount
    while others:
        weight = sum(others.values())
        poor = [name for name, value in others.items() if rest * value / weight < least]
        if not poor:
            return given | {name: rest * value / weight for name, value in others.items()}
        for name in poor:
            given[name] = least
            rest -= least
            del others[name]
    return given


def reallocated(left: Mapping[str, float], trust: Mapping[str, float], working: frozenset[str]) -> dict[str, float]:
    """What is `left` of each share, after those who have no work gave theirs to those who have, by trust.

    Nothing is lost: when nobody has work, everything stays where it is.
    """
    active = {name: value for name, value in trust.items() if name in working}
    if not active:
        return dict(left)
    freed = sum(amount for name, amount in left.items() if name not in working)
    weight = sum(active.values())
    return {name: amount + freed * trust[name] / weight if name in active else 0.0 for name, amount in left.items()}
