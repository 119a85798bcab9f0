"""Build recipes of engines that run on an accelerator: engines/*.yaml, except cpu.yaml (`build.BuildRecipe`)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal, cast, get_args

from sage_edge.config import load_yaml
from sage_edge.engines.device_runner import RunOptions
from sage_edge.errors import InputError

Engine = Literal["tensorrt", "torch", "torch-tensorrt", "ort-cuda"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
PACKAGE = Path(__file__).resolve().parents[1]
# First compute capability whose tensor cores multiply this type (CUDA C++ programming guide, "compute capabilities";
# for FP8 the builder says "Networks with FP8 Q/DQ layers require hardware with FP8 support").
NEEDS_CAPABILITY = {"fp8": (8, 9), "bf16": (8, 0), "int8": (7, 5), "fp16": (7, 0)}


@dataclass(frozen=True)
class Profile:
    """A range of slots for which one set of kernels is chosen, tuned for `opt`."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max <= 1024:
            raise ValueError(f"expected 1 <= min <= opt <= max <= 1024, found {self.min}, {self.opt}, {self.max}")


@dataclass(frozen=True)
class TensorRTOptions:
    """What the TensorRT builder is told. workspace_mib, tactic_dram_mib: most scratch memory of a kernel, and of the
    search for kernels (null: TensorRT's own limit, most of the device's memory). optimization_level: 0 (fast build) to 5.
    version_compatible: the plan runs on newer TensorRT of the same major version. hardware: GPUs that the plan runs on
    beside those of the same kind. strip_refit: a plan without weights, filled from the ONNX files when it is opened.
    tf32: allow 10-bit mantissas in fp32 products; off, because the fp32 gate would not hold."""

    workspace_mib: int | None = None
    tactic_dram_mib: int | None = None
    optimization_level: int = 3
    timing_cache: bool = True
    version_compatible: bool = False
    hardware: Literal["same", "ampere-plus", "same-capability"] = "same"
    strip_refit: bool = False
    tf32: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.optimization_level <= 5:
            raise ValueError(f"optimization_level: expected 0..5, found {self.optimization_level}")
        for name in ("workspace_mib", "tactic_dram_mib"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")


@dataclass(frozen=True)
class GpuRecipe:
    """How to build for an accelerator. target: the name after --target; precision: the lowest in the bundle it takes.

    capabilities: compute capabilities that the target stands for ("8.7"), empty for any. profiles: slots; the largest
    `max` is the engine's number of slots, the bounds are the sizes it runs at. graphs, speculate: as `RunOptions`.
    """

    target: str
    engine: Engine
    precision: Precision
    profiles: tuple[Profile, ...]
    capabilities: tuple[str, ...] = ()
    graphs: bool = True
    speculate: Literal["auto", "always", "never"] = "auto"
    tensorrt: TensorRTOptions = field(default_factory=TensorRTOptions)

    def __post_init__(self) -> None:
        if not self.profiles:
            raise ValueError("profiles: expected at least one {min, opt, max}")
        covered = 0
        for profile in sorted(self.profiles, key=lambda p: p.min):
            if profile.min > covered + 1:
                raise ValueError(
                    f"profiles: {covered + 1} slots are in none of them; they must cover 1 to the largest max"
                )
            covered = max(covered, profile.max)
        for text in self.capabilities:
            if len(parts := text.split(".")) != 2 or not all(part.isdigit() for part in parts):
                raise ValueError(f"capabilities: expected texts like '8.7', found {text!r}")

    @property
    def slots(self) -> int:
        return max(profile.max for profile in self.profiles)

    @property
    def shapes(self) -> tuple[int, ...]:
        """Sizes of state worth using: powers of two, and the bounds of the profiles."""
        powers = {1 << power for power in range(self.slots.bit_length())}
        bounds = {size for p in self.profiles for size in (p.min, p.opt, p.max)}
        return tuple(sorted(size for size in powers | bounds if size <= self.slots))

    def profile_of(self, slots: int) -> int:
        """The narrowest profile that holds so many slots."""
        holding = [i for i, p in enumerate(self.profiles) if p.min <= slots <= p.max]
        return min(holding, key=lambda i: self.profiles[i].max - self.profiles[i].min)

    def with_slots(self, slots: int) -> GpuRecipe:
        """The recipe cut down to, or stretched up to, `slots` slots."""
        kept = [replace(p, opt=min(p.opt, slots), max=min(p.max, slots)) for p in self.profiles if p.min <= slots]
        if max(p.max for p in kept) < slots:
            kept[-1] = replace(kept[-1], max=slots)
        return replace(self, profiles=tuple(kept))

    @property
    def options(self) -> RunOptions:
        return RunOptions(graphs=self.graphs, speculate=self.speculate)


@dataclass(frozen=True)
class _Kind:
    """The one key of a recipe that says which kind it is."""

    FOREIGN: ClassVar[bool] = True
    engine: str = ""


def is_gpu_recipe(path: Path) -> bool:
    """Whether a recipe file is for an accelerator (it names an `engine`). Raises InputError when it cannot be read."""
    return bool(load_yaml(path, _Kind).engine)


def recipe_folder() -> Path:
    """Where the shipped recipes lie: in the installed package, else in the repository."""
    own = PACKAGE / "recipes" / "engines"
    return own if own.is_dir() else PACKAGE.parent / "engines"


def shipped_recipes() -> dict[str, GpuRecipe]:
    """The shipped recipes by file name without suffix."""
    paths = [path for path in sorted(recipe_folder().glob("*.yaml")) if is_gpu_recipe(path)]
    return {path.stem: load_yaml(path, GpuRecipe) for path in paths}


def targets() -> list[str]:
    """Names that --target takes besides cpu."""
    return sorted({recipe.target for recipe in shipped_recipes().values()})


def choose_recipe(target: str, precision: str) -> GpuRecipe:
    """The shipped recipe of a target for a bundle whose lowest precision is `precision`.

    Raises InputError for an unknown target, or a precision that the target has no recipe for; it says what there is.
    """
    own = [recipe for recipe in shipped_recipes().values() if recipe.target == target]
    if not own:
        raise InputError(f"target {target!r} is not known; there is cpu, {', '.join(targets())}")
    for recipe in own:
        if recipe.precision == precision:
            return recipe
        if recipe.engine != "tensorrt" and precision in get_args(Precision):  # one recipe for bundles of any precision
            return replace(recipe, precision=cast(Precision, precision))
    offered = ", ".join(sorted(recipe.precision for recipe in own))
    message = f"target {target}: no recipe for {precision} bundles; there is {offered}"
    if precision == "fp8":
        message += "; FP8 needs compute capability 8.9 or newer (Ada, Hopper, Blackwell, Thor)"
    raise InputError(f"{message}: export the model again with --precision {own[0].precision}, or give a --recipe")


def refuse_capability(precision: str, capability: tuple[int, int], name: str) -> None:
    """Raise InputError when a GPU cannot multiply `precision`, naming what it can."""
    needed = NEEDS_CAPABILITY.get(precision, (0, 0))
    if capability >= needed:
        return
    able = ", ".join(kind for kind, least in NEEDS_CAPABILITY.items() if capability >= least) or "fp32"
    text = {"fp8": "Ada, Hopper, Blackwell, Thor"}.get(precision)
    raise InputError(
        f"{name} has compute capability {capability[0]}.{capability[1]}; {precision} needs {needed[0]}.{needed[1]} or newer"
        f"{f' ({text})' if text else ''}; export the model again with one of: {able}"
    )
