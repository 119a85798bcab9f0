"""The vision model's three graphs, and the plugin's files: model.yaml, weights.safetensors, bundle/. Needs torch.

python -m plugins_irp.vision.graphs RUN/model -o plugins_irp/vision/bundle
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sage_edge.bundle import Bundle, Graphs, GraphSpec
from sage_edge.config import dump_yaml, load_yaml
from sage_edge.errors import InputError, IntegrityError, SageError
from sage_edge.export.bundle import GraphModel, write_bundle
from sage_edge.files import replacing, sha256, write_atomic
from sage_edge.specs import SLOTS, TensorSpec

from .data import scene_examples
from .facts import MODEL, QUALITY_UNITS, WEIGHTS, WHITE, ModelFile, VisionConfig
from .model import PARTS, UNIT, VisionModel, rms

REFERENCES = 2
SIGNALS = ("q_halt", "q_continue", "error", "change")
DECIBEL = 20 / math.log(10)  # dB of a root mean square in one unit of its natural logarithm


class Encode(nn.Module):
    """noisy -> parts, fine, middle, coarse, noise."""

    def __init__(self, model: VisionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, noisy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.model.encode(noisy)


class Refine(nn.Module):
    """One step and its signals. q_halt, q_continue: the PSNR that the model thinks the estimate has, and would have after
    all steps, in tenths of a dB; error: the first of them as a root mean square in grey levels; change: of the estimate
    in this step, likewise."""

    def __init__(self, model: VisionModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, parts: Tensor, fine: Tensor, middle: Tensor, coarse: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        fine, middle, coarse, found = self.model.step(parts, fine, middle, coarse, noise)
        judged = self.model.judged(noise, fine, middle, coarse, found)
        left, gain = judged[:, :1], judged[:, 1:]
        now = QUALITY_UNITS * DECIBEL * (math.log(WHITE / UNIT) - left)
        later = now + QUALITY_UNITS * DECIBEL * gain
        change = UNIT * rms(found - noise)
        return fine, middle, coarse, found, torch.cat((now, later, UNIT * torch.exp(left), change), -1)


class Decode(nn.Module):
    """noise -> prediction: the noise in grey levels."""

    def __init__(self, model: VisionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, noise: Tensor) -> tuple[Tensor]:
        return (self.model.decode(noise),)


def vision_graphs(config: VisionConfig) -> Graphs:
    """Tensor specs of the three graphs."""
    tile = config.tile

    def spec(name: str, channels: int, scale: int) -> TensorSpec:
        return TensorSpec(name, "float32", (SLOTS, channels, tile // scale, tile // scale))

    sizes = {"fine": (config.fine, 2), "middle": (config.middle, 4), "coarse": (config.coarse, 8), "noise": (PARTS, 2)}
    context = (spec("parts", PARTS, 2),)
    carry = tuple(spec(name, *size) for name, size in sizes.items())
    refined = (*(spec(f"{name}_next", *size) for name, size in sizes.items()),
               TensorSpec("signals", "float32", (SLOTS, len(SIGNALS))))  # fmt: skip
    return Graphs(
        encode=GraphSpec((spec("noisy", 1, 1),), context + carry), refine=GraphSpec(context + carry, refined),
        decode=GraphSpec(carry[-1:], (spec("prediction", 1, 1),)),
    )  # fmt: skip


def graph_model(model: VisionModel, file: ModelFile) -> GraphModel:
    """The model as `write_bundle` takes it."""
    return GraphModel(
        file.name, vision_graphs(file.config), SIGNALS, file.config.max_steps,
        Encode(model), Refine(model), Decode(model),
        sum(p.numel() for p in model.parameters()), file.weights_sha256, file.source,
    )  # fmt: skip


def save_model(folder: Path, model: VisionModel, source: str) -> ModelFile:
    """Write weights.safetensors (float32) and model.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(folder / WEIGHTS) as temporary:
        save_file(weights, temporary)
        digest = sha256(temporary)
    file = ModelFile("vision", model.config, digest, source)
    write_atomic(folder / MODEL, dump_yaml(file))
    return file


def load_model(folder: Path) -> tuple[VisionModel, ModelFile]:
    """The model of a folder, in eval mode. Raises InputError and IntegrityError, naming the file."""
    file = load_yaml(folder / MODEL, ModelFile)
    path = folder / WEIGHTS
    if not path.is_file() or sha256(path) != file.weights_sha256:
        raise IntegrityError(f"{path}: missing, or not the file that {MODEL} speaks of; restore it or train again")
    try:
        model = VisionModel(file.config)
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise InputError(f"{path}: does not fit {MODEL}: {str(error).splitlines()[0]}") from error
    return model.eval().requires_grad_(False), file


def export(folder: Path, output: Path) -> Bundle:
    """Write the bundle of the model in `folder` (model.yaml, weights); its reference are synthetic scenes. Raises what
    `load_model` and `write_bundle` raise."""
    model, file = load_model(folder)
    # Two, no more: their carries at every step are a part of the bundle.
    scenes = scene_examples("report", REFERENCES, file.config.tile)
    noisy = np.stack([observation["image"] for observation in scenes.observations])[:, None]
    return write_bundle(graph_model(model, file), output, {"noisy": noisy})


def main() -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="model.yaml and weights.safetensors")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the bundle to write")
    arguments = parser.parse_args()
    try:
        bundle = export(arguments.folder, arguments.output)
    except SageError as error:
        raise SystemExit(f"error: {error}") from error
    Console().print(f"wrote {arguments.output}: {bundle.parameters} parameters, {bundle.step_gflop} GFLOP a step")


if __name__ == "__main__":
    main()
