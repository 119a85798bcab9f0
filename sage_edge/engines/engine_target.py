"""What a build target must bring: files for an engine folder, and programs that run them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sage_edge.bundle import Bundle
from sage_edge.engines.accelerator import Device, DeviceInfo
from sage_edge.engines.gpu_recipe import GpuRecipe
from sage_edge.engines.program import Program

Report = Callable[[str, float], None]


@dataclass(frozen=True)
class Made:
    """What `make` did: notes for the user, and the recipe as it was used (with fewer slots when memory was short)."""

    recipe: GpuRecipe
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


class EngineTarget(ABC):
    """One kind of engine. Nothing is imported or touched before `require`."""

    @abstractmethod
    def require(self) -> None:
        """Raises MissingDependencyError when this machine lacks what the target needs, GPU included."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions that an engine depends on; part of its cache key."""

    @abstractmethod
    def device(self) -> Device:
        """The device that the engine runs on, not open."""

    @abstractmethod
    def refuse_bundle(self, source: Path, bundle: Bundle) -> None:
        """Raise InputError for a bundle that this target cannot take, as far as it can be said without building."""

    @abstractmethod
    def make(self, source: Path, bundle: Bundle, recipe: GpuRecipe, folder: Path, report: Report) -> Made:
        """Write the engine's own files into `folder`. `source`: the bundle. Raises InputError, OutOfMemoryError, EngineError."""

    @abstractmethod
    def programs(self, folder: Path, bundle: Bundle, recipe: GpuRecipe) -> Mapping[str, Program]:
        """The three programs of an engine folder whose digests were verified."""

    @abstractmethod
    def refuse_foreign(self, recipe: GpuRecipe, built_on: str, built_with: dict[str, str], info: DeviceInfo) -> None:
        """Raise InputError, saying what to do, when an engine built there with that cannot run here."""
