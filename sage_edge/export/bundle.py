"""Make a bundle from a model: three graphs, the reference of the gate, bundle.yaml."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from sage_edge import __version__
from sage_edge.bundle import BUNDLE_FILE, Bundle, Graphs, GraphSpec, Provenance, model_spec, save_bundle
from sage_edge.check import Reference, check, load_reference
from sage_edge.device import usable_cores, version
from sage_edge.engines.graph_cost import graph_cost
from sage_edge.engines.ort import OrtRunner
from sage_edge.errors import GateError
from sage_edge.export.graph import SIGNALS, Decode, Encode, Refine, export_graph, use_matmuls
from sage_edge.export.hrm import HRM
from sage_edge.export.recipe import Recipe
from sage_edge.files import replacing_directory, sha256
from sage_edge.specs import SLOTS, Array, HRMConfig, ModelSpec, TensorSpec

# The reference holds carries of every step; this many bytes are enough to find faults and small enough to ship.
REFERENCE_BYTES = 3 << 20
MAX_SAMPLES = 8


def hrm_graphs(config: HRMConfig) -> Graphs:
    """Tensor specs of an HRM's three graphs."""
    state = (SLOTS, config.positions, config.hidden_size)
    observation = (
        TensorSpec("inputs", "int32", (SLOTS, config.seq_len), 0, config.vocab_size - 1),
        TensorSpec("puzzle_identifiers", "int32", (SLOTS,), 0, config.num_puzzle_identifiers - 1),
    )
    context = (TensorSpec("context", "float32", state),)
    carry = (TensorSpec("z_H", "float32", state), TensorSpec("z_L", "float32", state))
    refined = (
        TensorSpec("z_H_next", "float32", state),
        TensorSpec("z_L_next", "float32", state),
        TensorSpec("signals", "float32", (SLOTS, len(SIGNALS))),
    )
    prediction = (
        TensorSpec("logits", "float32", (SLOTS, config.seq_len, config.vocab_size)),
        TensorSpec("prediction", "int32", (SLOTS, config.seq_len)),
    )
    return Graphs(
        encode=GraphSpec(observation, context + carry),
        refine=GraphSpec(context + carry, refined),
        decode=GraphSpec(carry[:1], prediction),
    )


def hrm_spec(config: HRMConfig) -> ModelSpec:
    """The contract of an HRM's graphs, before there is a bundle."""
    return model_spec(hrm_graphs(config), SIGNALS, config.halt_max_steps)


@dataclass(frozen=True, eq=False)
class GraphModel:
    """Any model behind the contract, ready for export: its three graphs as torch modules, and what bundle.yaml says of it.

    Each module takes and returns tensors in the order of its graph's specs; checkpoint_sha256 and source are those of
    `Provenance`.
    """

    name: str
    graphs: Graphs
    signals: tuple[str, ...]
    max_steps: int
    encode: nn.Module
    refine: nn.Module
    decode: nn.Module
    parameters: int
    checkpoint_sha256: str
    source: str

    @property
    def spec(self) -> ModelSpec:
        return model_spec(self.graphs, self.signals, self.max_steps)


def hrm_graph_model(model: HRM, recipe: Recipe) -> GraphModel:
    """An HRM as its three graphs."""
    return GraphModel(
        recipe.name, hrm_graphs(recipe.config), SIGNALS, recipe.config.halt_max_steps,
        Encode(model), Refine(model), Decode(model),
        sum(p.numel() for p in model.parameters()), recipe.checkpoint_sha256, recipe.source,
    )  # fmt: skip


@torch.no_grad()
def reference_run(model: GraphModel, observation: dict[str, Array]) -> Reference:
    """What the fp32 torch modules do with `observation` over all steps."""
    spec, graphs = model.spec, model.graphs

    def outputs(module: nn.Module, tensors: Sequence[Tensor], specs: Sequence[TensorSpec]) -> dict[str, Tensor]:
        return {s.name: tensor for s, tensor in zip(specs, module(*tensors), strict=True)}

    def arrays(tensors: dict[str, Tensor]) -> dict[str, Array]:
        return {name: tensor.numpy() for name, tensor in tensors.items()}

    inputs = [torch.from_numpy(observation[s.name]) for s in graphs.encode.inputs]
    state = outputs(model.encode, inputs, graphs.encode.outputs)
    start = arrays(state)
    carries, signals, answers = [], [], []
    for _ in range(spec.max_steps):
        *carry, signal = model.refine(*(state[s.name] for s in graphs.refine.inputs))
        state |= {s.name: tensor for s, tensor in zip(spec.carry, carry, strict=True)}
        carries.append(arrays({s.name: state[s.name] for s in spec.carry}))
        signals.append(signal.numpy())
        decoded = outputs(model.decode, [state[s.name] for s in graphs.decode.inputs], graphs.decode.outputs)
        answers.append(arrays(decoded))
    return Reference(observation, start, tuple(carries), tuple(signals), tuple(answers))


def export_bundle(
    model: HRM,
    recipe: Recipe,
    output: Path,
    samples: dict[str, Array] | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Bundle:
    """Write the bundle of an HRM to the folder `output`; see `write_bundle`."""
    return write_bundle(hrm_graph_model(model, recipe), output, samples, progress)


def write_bundle(
    model: GraphModel,
    output: Path,
    samples: dict[str, Array] | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Bundle:
    """Write the bundle of `model` to the folder `output` and gate it against the model.

    samples: observations for the reference (the first few are used); seeded random ones by default.
    Raises InputError when `output` is not ours to replace or the samples do not fit, GateError when the graphs are not
    the model; nothing is left behind then.
    """
    graphs, spec = model.graphs, model.spec
    context, carry = (sum(math.prod(s.item_shape) for s in specs) for specs in (spec.context, spec.carry))
    per_sample = 4 * (context + carry * (1 + spec.max_steps))
    count = int(np.clip(REFERENCE_BYTES // per_sample, 2, MAX_SAMPLES))
    chosen = spec.validate_observation(samples, "samples") if samples else spec.random_observation(count)
    chosen = {name: array[:count] for name, array in chosen.items()}
    progress("reference")
    reference = reference_run(model, chosen)
    # Together, so that parts that the three share stay shared.
    encode, refine, decode = copy.deepcopy((model.encode, model.refine, model.decode))
    with replacing_directory(output, BUNDLE_FILE) as folder:
        np.savez_compressed(folder / "reference.npz", **reference.arrays())  # type: ignore[arg-type]
        for name, module, graph in (
            ("encode", encode, graphs.encode),
            ("refine", refine, graphs.refine),
            ("decode", decode, graphs.decode),
        ):
            progress(f"export {name}")
            use_matmuls(module)
            export_graph(module, graph.inputs, graph.outputs, folder / f"{name}.onnx")
        bundle = Bundle(
            format="sage-edge-bundle/1",
            name=model.name,
            precision="fp32",
            parameters=model.parameters,
            step_gflop=round(graph_cost(folder / "refine.onnx", 1).flops / 1e9, 6),
            max_steps=model.max_steps,
            signals=model.signals,
            graphs=graphs,
            files={file.name: sha256(file) for file in sorted(folder.iterdir())},
            provenance=Provenance(
                checkpoint_sha256=model.checkpoint_sha256,
                source=model.source,
                versions={
                    "sage-edge": __version__,
                    "torch": str(torch.__version__),
                    "onnx": onnx.__version__,
                    "onnxscript": version("onnxscript") or "unknown",
                },
            ),
        )
        save_bundle(folder, bundle)
        progress("gate")
        digest = sha256(folder / BUNDLE_FILE)
        with OrtRunner(folder, bundle.model, count, usable_cores(), optimized=True, digest=digest) as runner:
            report = check(runner, load_reference(folder / "reference.npz"))
        if not report.passed:
            reasons = "; ".join(f"{f.name}: {f.detail}" for f in report.failures)
            raise GateError(f"{model.name}: the gate refused the bundle: {reasons}")
    return bundle
