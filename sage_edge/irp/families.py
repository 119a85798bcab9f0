"""Families of halting policies for calibration: paths of policies from the safest (full steps) to the boldest.

Grids are fixed here, before any data is seen: thresholds read off the data that certifies them would void the
certificate. A fine grid costs nothing under fixed-sequence testing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sage_edge.errors import InputError

FULL = "full"
FAMILIES = ("learned", "entropy", "entropy_max", "patience", "slope", "combined")
PLUGIN_FAMILIES = (*FAMILIES, "energy")  # of an engine, `energy` would be `entropy` again

# Logits: fine around 0 and coarse far out. Nats: even on a logarithmic scale, up to a vocabulary of a thousand tokens.
MARGINS = tuple(float(f"{v:.3g}") for v in np.sinh(np.linspace(4.5, -4.5, 181)))
NATS = tuple(float(f"{v:.3g}") for v in np.geomspace(1e-6, 7, 160))
# A plugin's energy may have any unit and either sign; from far below (hardly ever reached, so: careful) to far above.
_SIZES = tuple(float(f"{v:.3g}") for v in np.geomspace(1e-6, 1e4, 241))
ENERGIES = (*(-v for v in reversed(_SIZES)), *_SIZES)


@dataclass(frozen=True)
class Path:
    """Policies of one family in the order in which they are tested, safest first; thresholds[i] belongs to policies[i]."""

    family: str
    policies: tuple[str, ...]
    thresholds: tuple[float | None, ...]


def _path(family: str, template: str, grid: Sequence[float], before: Sequence[str] = ()) -> Path:
    texts = tuple(template.format(f"{value:g}") for value in grid)
    return Path(family, (FULL, *before, *texts), (None, *(None for _ in before), *grid))


def paths(family: str, steps: int) -> tuple[Path, ...]:
    """The paths of a family for a model of `steps` steps. Raises InputError for an unknown family.

    `combined` joins a threshold with a patience (`learned:T or patience:2`): a request also stops when its answer has
    settled although the signal is not convinced, which is what requests that the model cannot solve look like.
    """
    patience = tuple(range(max(steps - 1, 1), 0, -1))
    if family == "learned":
        return (_path(family, "learned:{}", MARGINS),)
    if family in ("entropy", "entropy_max"):
        return (_path(family, family + ":{}", NATS),)
    if family == "energy":
        return (_path(family, "energy:{}", ENERGIES),)
    if family == "patience":
        return (Path(family, (FULL, *(f"patience:{n}" for n in patience)), (None, *map(float, patience))),)
    if family == "slope":
        return tuple(_path(family, "slope:{}," + str(window), NATS) for window in (1, 2, 3) if window < steps)
    if family == "combined":
        return tuple(
            _path(family, f"{signal}:{{}} or patience:{n}", grid, [f"patience:{m}" for m in patience if m >= n])
            for n in (1, 2, 3)
            if n < steps
            for signal, grid in (("learned", MARGINS), ("entropy_max", NATS))
        )
    raise InputError(f"policy family {family!r} is not known; use {', '.join(PLUGIN_FAMILIES)}")


def acceptance_paths() -> tuple[Path, ...]:
    """Signals that say how sure an answer is, strictest threshold first; "accepted" is what such a policy would halt."""
    return (
        Path("entropy_max", tuple(f"entropy_max:{v:g}" for v in NATS), NATS),
        Path("entropy", tuple(f"entropy:{v:g}" for v in NATS), NATS),
        Path("learned", tuple(f"learned:{v:g}" for v in MARGINS), MARGINS),
    )


def needs(path: Path) -> frozenset[str]:
    """The signals that a path's policies read; `energy` stands for what `History.energy` finds."""
    text = path.policies[-1]
    table = {"learned": ("q_halt", "q_continue"), "entropy_max": ("entropy_max",), "entropy": ("entropy_mean",),
             "patience": ("changed",), "slope": ("energy",), "energy": ("energy",)}  # fmt: skip
    names = {part.partition(":")[0] for part in text.split() if part != "or"}
    return frozenset(signal for name in names for signal in table[name])
