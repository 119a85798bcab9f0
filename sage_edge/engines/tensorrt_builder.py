"""One ONNX graph to one TensorRT plan: strongly typed, for TensorRT 10.3 to 11.

What the precision is, the graph says (casts, Q/DQ); the builder is given no precision flag, which 11 no longer has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsInt

import tensorrt as trt

from sage_edge.bundle import GraphSpec
from sage_edge.engines.accelerator import OutOfMemoryError
from sage_edge.engines.build_progress import BuildProgress, Report
from sage_edge.engines.gpu_recipe import GpuRecipe, TensorRTOptions
from sage_edge.engines.tensorrt_api import network_flags, optional_member
from sage_edge.engines.tensorrt_log import BuildLog
from sage_edge.errors import EngineError, InputError

MIB = 1 << 20


@dataclass(frozen=True)
class Plan:
    """A serialized engine. cache: the timing cache after the build, empty when none was used."""

    content: bytes
    cache: bytes
    warnings: tuple[str, ...]


def build_plan(
    path: Path, spec: GraphSpec, recipe: GpuRecipe, cache: bytes, report: Report, interrupted: Callable[[], bool]
) -> Plan:
    """Build the graph in `path` for the GPU at hand.

    cache: a timing cache of this device and release, or empty. Raises InputError for a graph that the parser refuses,
    naming node and operator; OutOfMemoryError; KeyboardInterrupt when `interrupted`; EngineError with what TensorRT said.
    """
    log = BuildLog()
    builder = trt.Builder(log)
    network = builder.create_network(network_flags(trt.NetworkDefinitionCreationFlag))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(path.read_bytes()):
        raise InputError(f"{path}: TensorRT {trt.__version__} does not take it: {parser_errors(parser)}")
    progress = BuildProgress(path.stem, report, interrupted)
    config = configure(builder, spec, recipe)
    timing = None
    if recipe.tensorrt.timing_cache:
        timing = config.create_timing_cache(cache) or config.create_timing_cache(b"")
        config.set_timing_cache(timing, False)  # False: what another device measured is not believed
    monitor = Monitor(progress)
    config.progress_monitor = monitor
    content = builder.build_serialized_network(network, config)
    if progress.cancelled:
        raise KeyboardInterrupt
    if content is None:
        if log.out_of_memory:
            raise OutOfMemoryError(f"{path.name}: {log.text()}")
        raise EngineError(f"{path}: TensorRT {trt.__version__} could not build it: {log.text()}")
    kept = bytes(memoryview(timing.serialize())) if timing is not None else b""
    return Plan(bytes(memoryview(content)), kept, tuple(log.warnings))


def configure(builder: trt.Builder, spec: GraphSpec, recipe: GpuRecipe) -> trt.IBuilderConfig:
    """The builder's configuration as the recipe wants it. Raises InputError for what this release cannot do."""
    wanted = recipe.tensorrt
    config = builder.create_builder_config()
    for pool, mib in ((trt.MemoryPoolType.WORKSPACE, wanted.workspace_mib),
                      (trt.MemoryPoolType.TACTIC_DRAM, wanted.tactic_dram_mib)):  # fmt: skip
        if mib is not None:
            config.set_memory_pool_limit(pool, mib * MIB)
    config.builder_optimization_level = wanted.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the inspector knows only names
    set_flags(config, wanted)
    level = hardware_level(wanted.hardware)
    if level is not None:
        config.hardware_compatibility_level = level
    for profile in recipe.profiles:
        shapes = builder.create_optimization_profile()
        for tensor in spec.inputs:
            shapes.set_shape(
                tensor.name,
                trt.Dims([profile.min, *tensor.item_shape]),
                trt.Dims([profile.opt, *tensor.item_shape]),
                trt.Dims([profile.max, *tensor.item_shape]),
            )
        if config.add_optimization_profile(shapes) < 0:
            raise EngineError(
                f"TensorRT refused the profile {profile}: some input of the graph has no dynamic slot axis"
            )
    return config


def set_flags(config: trt.IBuilderConfig, wanted: TensorRTOptions) -> None:
    """TF32 is on by default, which costs three digits; the rest is off by default."""
    if not wanted.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if wanted.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if wanted.strip_refit:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)


def hardware_level(wanted: str) -> trt.HardwareCompatibilityLevel | None:
    """None: plans for this kind of GPU only."""
    if wanted == "same":
        return None
    if wanted == "ampere-plus":
        return trt.HardwareCompatibilityLevel.AMPERE_PLUS
    level = optional_member(trt.HardwareCompatibilityLevel, "SAME_COMPUTE_CAPABILITY")
    if level is None:
        raise InputError(
            f"hardware: same-capability is not known to TensorRT {trt.__version__}; use same or ampere-plus"
        )
    return level


def parser_errors(parser: trt.OnnxParser | trt.OnnxParserRefitter) -> str:
    """What the parser found wrong, with operator and node, as one line."""
    lines = []
    for index in range(parser.num_errors):
        error: trt.ParserError = parser.get_error(index)
        where = f"node {error.node_name() or error.node()!r} ({error.node_operator() or 'unknown operator'})"
        lines.append(f"{where}: {' '.join(error.desc().split())} [{error.code().name}]")
    return "; ".join(lines) or "no reason was given"


class Monitor(trt.IProgressMonitor):
    """Passes TensorRT's phases on; called from the builder's threads."""

    def __init__(self, progress: BuildProgress) -> None:
        trt.IProgressMonitor.__init__(self)
        self._progress = progress

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: SupportsInt) -> None:
        self._progress.start(phase_name, parent_phase, int(num_steps))

    def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
        return self._progress.step(phase_name, int(step))

    def phase_finish(self, phase_name: str) -> None:
        self._progress.finish(phase_name)
