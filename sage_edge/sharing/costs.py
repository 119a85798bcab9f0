"""What a step of so many requests costs, in milliseconds and in ATP. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

RATE = 0.1  # of the newest measurement
OUTLIER = 4.0  # times the estimate: what another program's burst may count as at most


@dataclass(frozen=True)
class Costs:
    """Exponential means by number of requests. A size that was never measured costs in proportion to the nearest one that
    was; without any, a millisecond a request."""

    ms_by_size: Mapping[int, float] = field(default_factory=dict)
    atp_by_size: Mapping[int, float] = field(default_factory=dict)

    def ms(self, size: int) -> float:
        return _lookup(self.ms_by_size, size)

    def atp(self, size: int) -> float:
        return _lookup(self.atp_by_size, size)

    def learned(self, size: int, ms: float, atp: float) -> Costs:
        return replace(
            self, ms_by_size=_mixed(self.ms_by_size, size, ms), atp_by_size=_mixed(self.atp_by_size, size, atp)
        )


def _lookup(known: Mapping[int, float], size: int) -> float:
    if size in known:
        return known[size]
    if not known:
        return float(size)
    nearest = min(known, key=lambda other: (abs(other - size), other))
    return known[nearest] * size / nearest


def _mixed(known: Mapping[int, float], size: int, value: float) -> dict[int, float]:
    old = known.get(size)
    # A clock that is too coarse may say 0; a step is never free, or its worth per ATP would be without bound.
    value = max(value, 1e-6)
    mixed = value if old is None else (1 - RATE) * old + RATE * min(value, OUTLIER * old)
    return {**known, size: mixed}
