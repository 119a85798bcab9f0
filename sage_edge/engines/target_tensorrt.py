"""The TensorRT target: three plans, the report of their layers, and programs that run them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import onnx

from sage_edge.bundle import GRAPH_NAMES, Bundle
from sage_edge.engines.accelerator import Device, DeviceInfo
from sage_edge.engines.accelerator_cuda import CudaDevice
from sage_edge.engines.build import cache_directory
from sage_edge.engines.build_progress import interruptible
from sage_edge.engines.engine_target import EngineTarget, Made, Report
from sage_edge.engines.gpu_recipe import GpuRecipe
from sage_edge.engines.graph_cost import sized_values
from sage_edge.engines.inspector import LayerReport, node_types, read_layers
from sage_edge.engines.program import Program
from sage_edge.engines.tensorrt_api import numbers, require
from sage_edge.engines.tensorrt_support import check_support
from sage_edge.errors import InputError
from sage_edge.files import write_atomic

if TYPE_CHECKING:
    from sage_edge.engines.tensorrt_program import TensorRTProgram

GraphName = Literal["encode", "refine", "decode"]
SHOWN = 3
LAYERS_FILE = "layers.json"
SHARES = {"encode": 0.05, "refine": 0.9, "decode": 0.05}  # of the build's time, for the progress bar


class TensorRTTarget(EngineTarget):
    def require(self) -> None:
        require("an engine of TensorRT")

    def versions(self) -> dict[str, str]:
        return {"tensorrt": require("an engine of TensorRT")}

    def device(self) -> Device:
        return CudaDevice()

    def refuse_bundle(self, source: Path, bundle: Bundle) -> None:
        found = check_support(source, bundle, self.versions()["tensorrt"])
        errors = [f for f in found.findings if f.severity == "error"]
        if errors:
            first = "; ".join(f"{f.graph}: {f.node} ({f.op}): {f.problem}: {f.change}" for f in errors[:SHOWN])
            more = f"; and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
            raise InputError(
                f"{source}: TensorRT {found.release} does not take it: {first}{more}; `sage-edge check {source} --target "
                f"tensorrt:{found.release}` shows all"
            )

    def make(self, source: Path, bundle: Bundle, recipe: GpuRecipe, folder: Path, report: Report) -> Made:
        from sage_edge.engines.tensorrt_builder import build_plan

        with self.device() as device, interruptible() as interrupted:
            cache_file = timing_cache_file(self.versions()["tensorrt"], device.info.key)
            warnings: list[str] = []
            done = 0.0
            for name in GRAPH_NAMES:
                begun, share = done, SHARES[name]

                def inner(stage: str, fraction: float, begun: float = begun, share: float = share) -> None:
                    report(stage, begun + share * fraction)

                cache = cache_file.read_bytes() if recipe.tensorrt.timing_cache and cache_file.is_file() else b""
                path = source / f"{name}.onnx"
                plan = build_plan(path, bundle.graph(name), recipe, cache, inner, interrupted)
                write_atomic(folder / f"{name}.plan", plan.content)
                if plan.cache:
                    write_atomic(cache_file, plan.cache)
                if recipe.tensorrt.strip_refit:
                    shutil.copyfile(path, folder / path.name)
                warnings += plan.warnings
                done += share
            layers = self._inspect(source, folder, bundle, recipe, device)
        write_atomic(folder / LAYERS_FILE, json.dumps({r.graph: r.as_dict() for r in layers}, indent=1) + "\n")
        return Made(recipe, notes(layers, warnings), {report.graph: report.achieved for report in layers})

    def _inspect(
        self, source: Path, folder: Path, bundle: Bundle, recipe: GpuRecipe, device: Device
    ) -> list[LayerReport]:
        from sage_edge.engines.tensorrt_program import layer_information

        reports = []
        for name in GRAPH_NAMES:
            model = onnx.load(str(source / f"{name}.onnx"), load_external_data=False)
            nodes = [(node.name, list(node.output)) for node in model.graph.node]
            program = self._program(folder, bundle, recipe, name)
            program.open(device, device.stream("normal"))
            text = layer_information(program)
            program.close()
            reports.append(read_layers(name, text, node_types(nodes, sized_values(model, 1))))
        return reports

    def programs(self, folder: Path, bundle: Bundle, recipe: GpuRecipe) -> Mapping[str, Program]:
        return {name: self._program(folder, bundle, recipe, name) for name in GRAPH_NAMES}

    @staticmethod
    def _program(folder: Path, bundle: Bundle, recipe: GpuRecipe, name: GraphName) -> TensorRTProgram:
        from sage_edge.engines.tensorrt_program import TensorRTProgram

        weights = folder / f"{name}.onnx" if recipe.tensorrt.strip_refit else None
        return TensorRTProgram(folder / f"{name}.plan", bundle.graph(name), recipe, weights)

    def refuse_foreign(self, recipe: GpuRecipe, built_on: str, built_with: dict[str, str], info: DeviceInfo) -> None:
        built, here = built_with.get("tensorrt", "unknown"), self.versions()["tensorrt"]
        newer = (
            recipe.tensorrt.version_compatible
            and numbers(built)[:1] == numbers(here)[:1]
            and numbers(here) >= numbers(built)
        )
        if built != here and not newer:
            raise InputError(
                f"the plan was built with TensorRT {built}, installed is {here}; build it again from its bundle, or with "
                "version_compatible: true for newer releases of the same major version"
            )
        if built_on == info.key:
            return
        before = re.search(r"sm_(\d+)$", built_on)
        capability = info.capability or (0, 0)
        same = before is not None and before.group(1) == f"{capability[0]}{capability[1]}"
        ampere = before is not None and int(before.group(1)) >= 80 and capability >= (8, 0)
        allowed = {"same": False, "same-capability": same, "ampere-plus": ampere}[recipe.tensorrt.hardware]
        if not allowed:
            raise InputError(
                f"the plan was built for {built_on}, this GPU is {info.key}; build it here from its bundle, or with "
                "hardware: ampere-plus in the recipe (slower, runs on every GPU from Ampere on)"
            )


def timing_cache_file(version: str, device: str) -> Path:
    """What TensorRT measured of kernels before, for one release and kind of GPU."""
    safe = re.sub(r"[^A-Za-z0-9.]+", "-", f"{version}-{device}")
    return cache_directory() / "timing" / f"{safe}.cache"


def notes(reports: list[LayerReport], warnings: list[str]) -> tuple[str, ...]:
    """What a user should know of the layers, in a few lines."""
    said = []
    for report in reports:
        if not report.detailed:
            said.append(f"{report.graph}: the inspector gave no details; the precision of its layers is not known")
        if report.silent:
            names = ", ".join(layer.name for layer in report.silent[:3])
            said.append(
                f"{report.graph}: {len(report.silent)} layers run in fp32 though the graph does not say so: {names}"
            )
    if warnings:
        said.append(f"TensorRT gave {len(warnings)} warnings; the first: {' '.join(warnings[0].split())}")
    return tuple(said)
