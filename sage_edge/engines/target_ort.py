"""The ort-cuda target: ONNX Runtime's CUDA provider on the bundle's own graphs, everything bound on the device."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from sage_edge.bundle import GRAPH_NAMES, Bundle
from sage_edge.device import version
from sage_edge.engines.accelerator import Device, DeviceInfo
from sage_edge.engines.accelerator_cuda import CudaDevice
from sage_edge.engines.engine_target import EngineTarget, Made, Report
from sage_edge.engines.gpu_recipe import GpuRecipe
from sage_edge.engines.ort_program import OrtProgram, require_cuda_provider
from sage_edge.engines.program import Program
from sage_edge.errors import InputError


class OrtCudaTarget(EngineTarget):
    def require(self) -> None:
        require_cuda_provider()

    def versions(self) -> dict[str, str]:
        return {"onnxruntime": version("onnxruntime-gpu") or version("onnxruntime") or "unknown"}

    def device(self, built_on: str | None = None) -> Device:
        return CudaDevice()

    def refuse_bundle(self, source: Path, bundle: Bundle) -> None:
        """Whatever ONNX Runtime loads; it says so itself when it is opened."""

    def make(self, source: Path, bundle: Bundle, recipe: GpuRecipe, folder: Path, report: Report) -> Made:
        for name in GRAPH_NAMES:  # optimized when loaded: that takes a second, and depends on the provider's version
            shutil.copyfile(source / f"{name}.onnx", folder / f"{name}.onnx")
        return Made(recipe)

    def programs(self, folder: Path, bundle: Bundle, recipe: GpuRecipe) -> Mapping[str, Program]:
        return {name: OrtProgram(folder / f"{name}.onnx", bundle.graph(name)) for name in GRAPH_NAMES}

    def refuse_foreign(self, recipe: GpuRecipe, built_on: str, built_with: dict[str, str], info: DeviceInfo) -> None:
        here = self.versions()["onnxruntime"]
        if built_with.get("onnxruntime") != here:
            raise InputError(
                f"gated with ONNX Runtime {built_with.get('onnxruntime')}, installed is {here}; build it again from its bundle"
            )
        if built_on != info.key:
            raise InputError(f"gated on {built_on}, this GPU is {info.key}; build it here from its bundle")
