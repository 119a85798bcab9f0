"""Trust in a plugin, from how its requests converge. Pure.

The update is that of IRP protocol 1.0 ("Trust Update Formula"), at its momentum of 0.7:

    trust <- clip(0.7 trust + 0.2 quality x modifier + 0.1 efficiency, 0.1, 10)
    modifier = 1 / (1 + exp(-contribution / coherence))

For another momentum m the two weights keep their ratio: (1 - m) 2/3 and (1 - m) 1/3. What the protocol leaves open is ours:

quality       share of steps that did not raise the energy (the protocol's monotonicity_ratio)
contribution  what `Plugin.contribution` says of the finished request, about -1..1
coherence     the mean |contribution| of recent requests of all plugins, so that the modifier of an average one is 0.73
efficiency    1 - ATP spent / ATP of all `max_steps` steps

The terms add up to at most 1 - m, so trust that is earned stays within 0.1..1; a larger one is an operator's grant, which
wears off. A request of one step says nothing of convergence; then only the efficiency is new and the rest stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sage_edge.irp.spec import EnergyRange

LOWEST, HIGHEST = 0.1, 10.0
INITIAL = 1.0
MOMENTUM = 0.7
QUALITY_SHARE = 2 / 3  # of what is new; the rest is efficiency


@dataclass(frozen=True)
class Convergence:
    """How the energies of one request moved; None where there are too few steps to say.

    monotonicity_ratio: share of steps with dE <= 0. dE_variance: population variance of dE. convergence_rate: share of
    the distance to the best energy that a step closes, 1 - (g_n / g_1)^(1 / (n - 1)), a linear rate of convergence
    (Nocedal and Wright, Numerical Optimization, section 2.2); negative when the energy rises; None when g_1 = 0.
    """

    monotonicity_ratio: float | None
    dE_variance: float | None
    convergence_rate: float | None


def convergence(energies: Sequence[float], span: EnergyRange) -> Convergence:
    """Of the energies after each step."""
    if len(energies) < 2:
        return Convergence(None, None, None)
    differences = np.diff(np.asarray(energies, np.float64))
    first, last = (max(0.0, energy - span.best) for energy in (energies[0], energies[-1]))
    rate = None if first == 0 else 1 - (last / first) ** (1 / len(differences))
    variance = float(differences.var()) if len(differences) > 1 else None
    return Convergence(float((differences <= 0).mean()), variance, rate)


def updated_trust(trust: float, quality: float | None, contribution: float, coherence: float, efficiency: float,
                  momentum: float = MOMENTUM) -> float:  # fmt: skip
    """Trust after one finished request; see the module. coherence > 0; efficiency is clipped to 0..1."""
    new = 1 - momentum
    effort = min(1.0, max(0.0, efficiency))
    if quality is None:
        earned = QUALITY_SHARE * trust + (1 - QUALITY_SHARE) * effort
    else:
        earned = QUALITY_SHARE * quality * sigmoid(contribution / coherence) + (1 - QUALITY_SHARE) * effort
    return min(HIGHEST, max(LOWEST, momentum * trust + new * earned))


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
