"""The graph bundle: a folder with encode, refine and decode as ONNX, and bundle.yaml that describes them.

bundle.yaml     tensor specs, signals, digests of every file, provenance (this module's `Bundle`)
encode.onnx     observation -> context, carry
refine.onnx     context, carry -> carry', signals
decode.onnx     carry -> prediction
reference.npz   a few observations and what the fp32 torch model made of them at every step (see `check`)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sage_edge.config import dump_yaml, load_yaml
from sage_edge.errors import InputError, IntegrityError
from sage_edge.files import sha256
from sage_edge.specs import ModelSpec, Precision, TensorSpec

FORMAT = "sage-edge-bundle/1"
BUNDLE_FILE = "bundle.yaml"
REFERENCE_FILE = "reference.npz"


@dataclass(frozen=True)
class GraphSpec:
    """One graph: its inputs and outputs in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Graphs:
    encode: GraphSpec
    refine: GraphSpec
    decode: GraphSpec


def model_spec(graphs: Graphs, signals: tuple[str, ...], max_steps: int) -> ModelSpec:
    """The contract of a model with these graphs: the carry is what refine puts out before `signals`."""
    carried = len(graphs.refine.outputs) - 1
    return ModelSpec(
        observation=graphs.encode.inputs,
        context=graphs.encode.outputs[:-carried],
        carry=graphs.encode.outputs[-carried:],
        prediction=graphs.decode.outputs,
        signals=signals,
        max_steps=max_steps,
    )


LowerableName = Literal["encode", "refine"]  # graphs of which layers may be lowered
GRAPH_NAMES: tuple[Literal["encode", "refine", "decode"], ...] = ("encode", "refine", "decode")


@dataclass(frozen=True)
class Provenance:
    """Where the bundle comes from: digest of the checkpoint, what it was imported from, versions of the exporters."""

    checkpoint_sha256: str
    source: str
    versions: dict[str, str]


@dataclass(frozen=True)
class GateResult:
    """One finding of a gate as it was when the bundle or the engine was made."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class StepError:
    """How far a lowered graph is from fp32 at one step; errors are relative RMS of the carry (its worse tensor).

    error, largest (absolute), agreement (share of equal predictions): one step from the fp32 model's own carry. free_*:
    running on by itself. amplification: what a change of 1e-6 after step 1 grows to in the fp32 model; None: not measured.
    """

    step: int
    error: float
    largest: float
    agreement: float
    free_error: float
    free_agreement: float
    amplification: float | None


@dataclass(frozen=True)
class LayerPrecision:
    """One layer: what was asked for, what it has, and why it was kept higher (empty: it was not).

    share: of the multiplications of all layers in encode and one step. error: relative RMS error of a step (for a layer of
    the encode graph: of what that gives) with this layer alone lowered; None: not measured, because nothing had to be kept
    higher.
    """

    layer: str
    module: str
    asked: Precision
    precision: Precision
    share: float
    error: float | None
    reason: str
    graph: LowerableName = "refine"


@dataclass(frozen=True)
class Lowering:
    """How a lowered bundle came about, from which fp32 bundle, calibrated and judged on which data.

    fp32_sha256: of the fp32 bundle's bundle.yaml. data_sha256: of the data (`precision.workbench.data_digest`); range_items:
    observations whose activations set the ranges, over all steps. equalised: pairs of layers whose channels were balanced.
    cost: beside fp32 = 1 (`precision.formats.COST`).
    """

    asked: str
    fp32_sha256: str
    data_sha256: str
    data_items: int
    range_items: int
    equalised: int
    cost: float
    layers: tuple[LayerPrecision, ...]
    limits: dict[str, float]
    gate: tuple[GateResult, ...]
    steps: tuple[StepError, ...]

    @property
    def modules(self) -> dict[str, str]:
        """The precisions of each module, `fp8+fp16` where its layers differ."""
        found: dict[str, set[str]] = {}
        for layer in self.layers:
            found.setdefault(layer.module, set()).add(layer.precision)
        return {module: "+".join(sorted(chosen)) for module, chosen in sorted(found.items())}


@dataclass(frozen=True)
class Bundle:
    """The content of bundle.yaml; step_gflop is the arithmetic of the matrix products of one step of one slot.

    precision: that of all layers, `mixed` where they differ; lowering says the rest, and is absent for
    fp32. Raises ValueError, naming the graph, when the graphs do not fit together.
    """

    format: Literal["sage-edge-bundle/1"]
    name: str
    precision: Precision | Literal["mixed"]
    parameters: int
    step_gflop: float
    max_steps: int
    signals: tuple[str, ...]
    graphs: Graphs
    files: dict[str, str]
    provenance: Provenance
    lowering: Lowering | None = None

    def __post_init__(self) -> None:
        if (self.precision == "fp32") != (self.lowering is None):
            raise ValueError(
                "lowering: a bundle that is not fp32 must say how it was lowered, and an fp32 one must not"
            )
        if self.max_steps < 1:
            raise ValueError(f"max_steps: expected at least 1, found {self.max_steps}")
        for name in (*(f"{g}.onnx" for g in GRAPH_NAMES), REFERENCE_FILE):
            if name not in self.files:
                raise ValueError(f"files: {name} is missing; expected its SHA-256")
        refine, decode, encode = self.graphs.refine, self.graphs.decode, self.graphs.encode
        if len(refine.outputs) < 2 or refine.outputs[-1].name != "signals":
            raise ValueError("graphs.refine: the outputs must be the new carry and, last, `signals`")
        if refine.outputs[-1].item_shape != (len(self.signals),):
            raise ValueError(
                f"graphs.refine: `signals` must have {len(self.signals)} columns, one for each signal name"
            )
        if [t.name for t in encode.outputs] != [t.name for t in refine.inputs]:
            raise ValueError("graphs.refine: the inputs must be what encode puts out: context, then carry")
        carry = self.model.carry
        for old, new in zip(carry, refine.outputs[:-1], strict=True):
            if (old.dtype, old.shape) != (new.dtype, new.shape):
                raise ValueError(f"graphs.refine: {new.name!r} must have the dtype and shape of {old.name!r}")
        if missing := sorted({t.name for t in decode.inputs} - {t.name for t in carry}):
            raise ValueError(f"graphs.decode: input {missing[0]!r} is not part of the carry")
        if "prediction" not in {t.name for t in decode.outputs}:
            raise ValueError("graphs.decode: no output is called `prediction`")

    @property
    def model(self) -> ModelSpec:
        """The contract of the model, derived from the graphs."""
        return model_spec(self.graphs, self.signals, self.max_steps)

    def graph(self, name: Literal["encode", "refine", "decode"]) -> GraphSpec:
        return {"encode": self.graphs.encode, "refine": self.graphs.refine, "decode": self.graphs.decode}[name]


def load_bundle(folder: Path) -> Bundle:
    """Read bundle.yaml and compare every file with its digest.

    Raises InputError for a folder that is no bundle or a bad bundle.yaml, IntegrityError for a missing or changed file.
    """
    path = folder / BUNDLE_FILE
    if not path.is_file():
        raise InputError(f"{folder}: not a bundle (no {BUNDLE_FILE}); `sage-edge export FOLDER -o BUNDLE` makes one")
    bundle = load_yaml(path, Bundle)
    verify_files(folder, bundle.files, path)
    return bundle


def save_bundle(folder: Path, bundle: Bundle) -> None:
    """Write bundle.yaml into a folder that already holds the files."""
    (folder / BUNDLE_FILE).write_text(dump_yaml(bundle), encoding="utf-8")


def verify_files(folder: Path, files: dict[str, str], manifest: Path) -> None:
    """Raise IntegrityError unless every file of `files` (name to hex SHA-256) lies in `folder` unchanged."""
    for name, digest in files.items():
        path = folder / name
        if Path(name).name != name:
            raise IntegrityError(f"{manifest}: files: {name!r} must be a plain file name inside the folder")
        if not path.is_file():
            raise IntegrityError(f"{path}: missing, though {manifest.name} lists it; make the folder again")
        if sha256(path) != digest:
            raise IntegrityError(f"{path}: changed since {manifest.name} was written (SHA-256 differs); not loaded")
