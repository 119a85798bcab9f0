"""The torch targets: steps compiled ahead of time by AOTInductor, or by torch_tensorrt with fallback to PyTorch.

For desktops without TensorRT, for judging TensorRT against, and for any CPU that has a C++ compiler. Only `refine` is
compiled: `encode` and `decode` run once a request, a few operators each, and compiling them would double the wait.
"""

from __future__ import annotations

import importlib
import inspect
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sage_edge.bundle import GRAPH_NAMES, Bundle, GraphSpec
from sage_edge.device import machine, version
from sage_edge.engines.accelerator import Device, DeviceInfo
from sage_edge.engines.accelerator_cuda import CudaDevice
from sage_edge.engines.accelerator_null import NullDevice
from sage_edge.engines.engine_target import EngineTarget, Made, Report
from sage_edge.engines.gpu_recipe import GpuRecipe
from sage_edge.engines.program import Program
from sage_edge.errors import EngineError, InputError, MissingDependencyError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

GraphName = Literal["encode", "refine", "decode"]
MINIMUM_BLOCK = 3  # operators in a row that are worth a TensorRT engine of their own


class TorchTarget(EngineTarget):
    """AOTInductor, for CUDA where torch finds a GPU, else for the CPU."""

    needs: tuple[str, ...] = ()

    def require(self) -> None:
        _import("torch", "export")

    def versions(self) -> dict[str, str]:
        return {"torch": version("torch") or "unknown"}

    def device(self, built_on: str | None = None) -> Device:
        on_gpu = built_on.startswith("cuda/") if built_on else self.uses_gpu()
        return CudaDevice() if on_gpu else NullDevice(name=machine().key)

    @staticmethod
    def uses_gpu() -> bool:
        torch = _import("torch", "export")
        return bool(torch.cuda.is_available())

    def refuse_bundle(self, source: Path, bundle: Bundle) -> None:
        from sage_edge.engines.torch_graph import OnnxModule

        # Here, not in `require`: an engine that is built runs without.
        if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
            raise MissingDependencyError("an engine of torch needs a C++ compiler to be built: apt install g++")
        for name in GRAPH_NAMES:
            OnnxModule(source / f"{name}.onnx")

    def make(self, source: Path, bundle: Bundle, recipe: GpuRecipe, folder: Path, report: Report) -> Made:
        where = "cuda" if self.uses_gpu() else "cpu"
        for name in GRAPH_NAMES:
            if name != "refine":
                shutil.copyfile(source / f"{name}.onnx", folder / f"{name}.onnx")
        report("trace refine", 0.0)
        spec = bundle.graphs.refine
        program = export_program(source / "refine.onnx", spec, recipe.slots, where)
        report("compile refine", 0.2)
        self.compile(program, spec, recipe, folder / "refine.pt2", where)
        return Made(recipe)

    def compile(self, program: ExportedProgram, spec: GraphSpec, recipe: GpuRecipe, path: Path, where: str) -> None:
        package(program, path)

    def programs(self, folder: Path, bundle: Bundle, recipe: GpuRecipe) -> Mapping[str, Program]:
        from sage_edge.engines.torch_program import TorchProgram

        def made(name: GraphName) -> Program:
            if name == "refine":
                return TorchProgram(folder / "refine.pt2", bundle.graph(name), recipe.graphs, self.needs)
            # Once a request, at addresses that change: nothing to capture.
            return TorchProgram(folder / f"{name}.onnx", bundle.graph(name), graphs=False)

        return {name: made(name) for name in GRAPH_NAMES}

    def refuse_foreign(self, recipe: GpuRecipe, built_on: str, built_with: dict[str, str], info: DeviceInfo) -> None:
        for name, here in self.versions().items():
            if built_with.get(name) != here:
                raise InputError(
                    f"built with {name} {built_with.get(name)}, installed is {here}; build it again from its bundle"
                )
        if built_on != info.key:
            raise InputError(f"built for {built_on}, this is {info.key}; build it here from its bundle")


class TorchTensorRTTarget(TorchTarget):
    """torch_tensorrt: what TensorRT supports goes to TensorRT, the rest stays in PyTorch. Needs a GPU."""

    needs = ("torch_tensorrt",)

    def require(self) -> None:
        super().require()
        _import("torch_tensorrt", "")
        if not self.uses_gpu():
            raise MissingDependencyError("target torch-tensorrt needs a CUDA GPU; there is none that torch can use")

    def versions(self) -> dict[str, str]:
        return super().versions() | {"torch_tensorrt": version("torch_tensorrt") or "unknown"}

    def compile(self, program: ExportedProgram, spec: GraphSpec, recipe: GpuRecipe, path: Path, where: str) -> None:
        torch, torch_tensorrt = _import("torch", "export"), _import("torch_tensorrt", "")
        slots = recipe.slots
        inputs = [
            torch_tensorrt.Input(min_shape=(1, *t.item_shape), opt_shape=(slots, *t.item_shape),
                                 max_shape=(slots, *t.item_shape), dtype=getattr(torch, t.dtype))
            for t in spec.inputs
        ]  # fmt: skip
        wanted = recipe.tensorrt
        try:
            compiled = torch_tensorrt.dynamo.compile(
                program, arg_inputs=inputs, disable_tf32=not wanted.tf32, min_block_size=MINIMUM_BLOCK,
                optimization_level=wanted.optimization_level, workspace_size=(wanted.workspace_mib or 0) << 20,
            )  # fmt: skip
            examples = example_inputs(spec, min(2, slots), where)
            # Explicit: axes inferred from min and max shapes would be another one for each input.
            torch_tensorrt.save(compiled, str(path), output_format="aot_inductor", arg_inputs=list(examples),
                                dynamic_shapes=slot_axes(compiled, spec, slots))  # fmt: skip
        except Exception as error:  # neither compiler's errors share a base class that is public
            text = (str(error).splitlines() or [""])[0]
            raise EngineError(
                f"{path.name}: torch_tensorrt could not compile it: {type(error).__name__}: {text}"
            ) from error


def _import(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        cure = f"pip install 'sage-edge[{extra}]'" if extra else f"pip install {name} (it must fit the installed torch)"
        raise MissingDependencyError(f"an engine of torch needs {name} ({error}); {cure}") from error


def example_inputs(spec: GraphSpec, slots: int, where: str) -> tuple[Any, ...]:
    import torch

    return tuple(torch.zeros(slots, *t.item_shape, dtype=getattr(torch, t.dtype), device=where) for t in spec.inputs)


def export_program(path: Path, spec: GraphSpec, slots: int, where: str) -> ExportedProgram:
    """Trace a graph for 1 to `slots` slots. Raises InputError for an operator without a translation."""
    import torch

    from sage_edge.engines.torch_graph import OnnxModule

    module = OnnxModule(path).eval().to(where)
    if list(module.inputs) != [t.name for t in spec.inputs] or list(module.outputs) != [t.name for t in spec.outputs]:
        raise InputError(f"{path}: its inputs and outputs are not those of bundle.yaml; export the bundle again")
    with torch.no_grad():
        return torch.export.export(
            module,
            example_inputs(spec, min(2, slots), where),
            dynamic_shapes=slot_axes(module, spec, slots),
            strict=False,
        )


def slot_axes(module: Any, spec: GraphSpec, slots: int) -> dict[str, Any] | None:
    """One symbolic first axis for all inputs, in the form that torch.export wants for this module's `forward`."""
    import torch

    if slots == 1:
        return None
    axis = torch.export.Dim("slots", min=1, max=slots)
    axes = tuple({0: axis} for _ in spec.inputs)
    parameters = [p for p in inspect.signature(module.forward).parameters.values() if p.kind is not p.VAR_KEYWORD]
    if parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return {parameters[0].name: axes}
    return dict(zip((p.name for p in parameters), axes, strict=True))


def package(program: ExportedProgram, path: Path) -> None:
    """Compile with AOTInductor into `path`. Raises EngineError with the compiler's first line."""
    import torch

    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:  # inductor's errors share no base class that is public
        text = (str(error).splitlines() or [""])[0]
        raise EngineError(f"{path.name}: AOTInductor could not compile it: {type(error).__name__}: {text}") from error
