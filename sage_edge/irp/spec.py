"""What a plugin says of itself: plugin.yaml, read without running any of the plugin's code."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sage_edge.config import load_yaml
from sage_edge.errors import InputError

PLUGIN_FILE = "plugin.yaml"
NAME = r"[a-z][a-z0-9_-]{0,63}"


@dataclass(frozen=True)
class Invariants:
    """The four invariants that every plugin declares, as sentences (IRP protocol 1.0, section "Four Invariants").

    state_space: what is refined. noise_model: how uncertainty shows in it. energy: what is measured, in which unit; lower
    is better. coherence: what a finished refinement gives to the rest of the system. Raises ValueError for an empty one.
    """

    state_space: str
    noise_model: str
    energy: str
    coherence: str

    def __post_init__(self) -> None:
        for name in ("state_space", "noise_model", "energy", "coherence"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name}: expected a sentence, found nothing")


@dataclass(frozen=True)
class EnergyRange:
    """Two energies that make those of different plugins comparable: `best`, which a perfect answer has and nothing falls
    below; and `untouched`, that of knowing nothing. Raises ValueError unless best < untouched."""

    best: float = 0.0
    untouched: float = 1.0

    def __post_init__(self) -> None:
        if not self.best < self.untouched:
            raise ValueError(f"best: expected a number below untouched ({self.untouched}), found {self.best}")

    def normalise(self, energy: float) -> float:
        """0 for the best energy, 1 for the untouched one and whatever lies above it."""
        return min(1.0, max(0.0, (energy - self.best) / (self.untouched - self.best)))


@dataclass(frozen=True)
class BenchSpec:
    """How `sage-edge bench --suite irp` measures a plugin.

    calibration, test: what the plugin's `examples` understands (a folder, a file, a name); the two must not overlap.
    quality: what `Plugin.quality` gives, for the head of the table. unit: the loss of quality that counts as a whole
    loss of 1 when halting is calibrated. right: from this quality on an answer counts as right. max_loss, confidence: the
    promise of the certificate, in units. Raises ValueError for numbers that promise nothing.
    """

    calibration: str
    test: str
    quality: str
    unit: float = 1.0
    right: float = 1.0
    max_loss: float = 0.01
    confidence: float = 0.95
    calibration_examples: int = 640
    test_examples: int = 512

    def __post_init__(self) -> None:
        if self.unit <= 0 or not 0 < self.max_loss < 1 or not 0 < self.confidence < 1:
            raise ValueError("unit must be positive, max_loss and confidence between 0 and 1")
        if self.calibration_examples < 1 or self.test_examples < 1:
            raise ValueError("calibration_examples and test_examples must be at least 1")


@dataclass(frozen=True)
class PluginSpec:
    """The content of plugin.yaml.

    entry: FILE:CLASS, a Python file in the plugin's folder (without .py) and the plugin's class in it. max_steps: no request
    takes more. halt: the halting policy of a plugin without a certificate. options: keyword arguments of the class. card:
    path of a model card, from the plugin's folder. Raises ValueError, naming the field, for what describes no plugin.
    """

    format: Literal["sage-edge-plugin/1"]
    name: str
    entry: str
    summary: str
    invariants: Invariants
    max_steps: int
    energy_range: EnergyRange = field(default_factory=EnergyRange)
    halt: str = "slope:0.01,3"
    version: str = "0.1.0"
    options: dict[str, Any] = field(default_factory=dict)
    card: str | None = None
    bench: BenchSpec | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(NAME, self.name):
            raise ValueError(
                f"name: expected lower case letters, digits, - and _, at most 64, a letter first; found {self.name!r}"
            )
        if not re.fullmatch(r"[A-Za-z_]\w*:[A-Za-z_]\w*", self.entry):
            raise ValueError(f"entry: expected FILE:CLASS, e.g. plugin:Example, found {self.entry!r}")
        if self.max_steps < 1:
            raise ValueError(f"max_steps: expected at least 1, found {self.max_steps}")


def load_spec(folder: Path) -> PluginSpec:
    """Read plugin.yaml of a plugin's folder. Raises InputError naming file, line and key."""
    path = folder / PLUGIN_FILE
    if not path.is_file():
        raise InputError(f"{folder}: no {PLUGIN_FILE} there; `sage-edge plugin new NAME` makes a plugin's folder")
    return load_yaml(path, PluginSpec)
