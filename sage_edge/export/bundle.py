"""Make a bundle from a model: three graphs, the reference of the gate, bundle.yaml."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch

from sage_edge import __version__
from sage_edge.bundle import BUNDLE_FILE, Bundle, Graphs, GraphSpec, Provenance, save_bundle
from sage_edge.check import Reference, check, load_reference
from sage_edge.device import usable_cores, version
from sage_edge.engines.ort import OrtRunner
from sage_edge.errors import GateError
from sage_edge.export.graph import SIGNALS, Decode, Encode, Refine, export_graph, matmul_gflop, use_matmuls
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
    graphs = hrm_graphs(config)
    return ModelSpec(
        graphs.encode.inputs, graphs.encode.outputs[:1], graphs.encode.outputs[1:], graphs.decode.outputs, SIGNALS,
        config.halt_max_steps,
    )  # fmt: skip


@torch.no_grad()
def reference_run(model: HRM, observation: dict[str, Array], steps: int) -> Reference:
    """What the fp32 torch model does with `observation` over `steps` steps."""
    encode, refine, decode = Encode(model), Refine(model), Decode(model)
    context, z_H, z_L = encode(*(torch.from_numpy(array) for array in observation.values()))
    start = {"context": context.numpy(), "z_H": z_H.numpy(), "z_L": z_L.numpy()}
    carries, signals, outputs = [], [], []
    for _ in range(steps):
        z_H, z_L, signal = refine(context, z_H, z_L)
        logits, prediction = decode(z_H)
        carries.append({"z_H": z_H.numpy(), "z_L": z_L.numpy()})
        signals.append(signal.numpy())
        outputs.append({"logits": logits.numpy(), "prediction": prediction.numpy()})
    return Reference(observation, start, tuple(carries), tuple(signals), tuple(outputs))


def export_bundle(
    model: HRM,
    recipe: Recipe,
    output: Path,
    samples: dict[str, Array] | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Bundle:
    """Write the bundle of `model` to the folder `output` and gate it against the model.

    samples: observations for the reference (the first few are used); seeded random ones by default.
    Raises InputError when `output` is not ours to replace or the samples do not fit, GateError when the graphs are not
    the model; nothing is left behind then.
    """
    config = recipe.config
    graphs, spec = hrm_graphs(config), hrm_spec(config)
    per_sample = 4 * config.positions * config.hidden_size * (3 + 2 * config.halt_max_steps)
    count = int(np.clip(REFERENCE_BYTES // per_sample, 2, MAX_SAMPLES))
    chosen = spec.validate_observation(samples, "samples") if samples else spec.random_observation(count)
    chosen = {name: array[:count] for name, array in chosen.items()}
    progress("reference")
    reference = reference_run(model, chosen, config.halt_max_steps)
    traced = copy.deepcopy(model)
    use_matmuls(traced)
    with replacing_directory(output, BUNDLE_FILE) as folder:
        np.savez_compressed(folder / "reference.npz", **reference.arrays())  # type: ignore[arg-type]
        for name, module, graph in (
            ("encode", Encode(traced), graphs.encode),
            ("refine", Refine(traced), graphs.refine),
            ("decode", Decode(traced), graphs.decode),
        ):
            progress(f"export {name}")
            export_graph(module, graph.inputs, graph.outputs, folder / f"{name}.onnx")
        bundle = Bundle(
            format="sage-edge-bundle/1",
            name=recipe.name,
            precision="fp32",
            parameters=sum(p.numel() for p in model.parameters()),
            step_gflop=round(matmul_gflop(folder / "refine.onnx"), 6),
            max_steps=config.halt_max_steps,
            signals=SIGNALS,
            graphs=graphs,
            files={file.name: sha256(file) for file in sorted(folder.iterdir())},
            provenance=Provenance(
                checkpoint_sha256=recipe.checkpoint_sha256,
                source=recipe.source,
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
            raise GateError(f"{recipe.name}: the gate refused the bundle: {reasons}")
    return bundle
