"""The vision model's three graphs, and the plugin's files: model.yaml, weights.safetensors, bundle/. Needs torch.

python -m plugins_irp.vision.graphs RUN/model -o plugins_irp/vision/bundle
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sage_edge.bundle import Bundle, Graphs, GraphSpec
from sage_edge.config import dump_yaml, load_yaml
from sage_edge.export.bundle import GraphModel, write_bundle
from sage_edge.export.weights import bundle_command, load_weights, save_weights
from sage_edge.files import write_atomic
from sage_edge.specs import SLOTS, TensorSpec

from .data import scene_examples
from .facts import MODEL, QUALITY_UNITS, WEIGHTS, WHITE, ModelFile, VisionConfig
from .judge import rms
from .model import PARTS, UNIT, VisionModel

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
        judged = self.model.judged(parts, noise, found)
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
    file = ModelFile("vision", model.config, save_weights(folder / WEIGHTS, model.state_dict()), source)
    write_atomic(folder / MODEL, dump_yaml(file))
    return file


def load_model(folder: Path) -> tuple[VisionModel, ModelFile]:
    """The model of a folder, in eval mode. Raises InputError and IntegrityError, naming the file."""
    file = load_yaml(folder / MODEL, ModelFile)
    model = VisionModel(file.config)
    load_weights(folder / WEIGHTS, file.weights_sha256, model, MODEL)
    return model, file


def export(folder: Path, output: Path) -> Bundle:
    """Write the bundle of the model in `folder` (model.yaml, weights); its reference are synthetic scenes. Raises what
    `load_model` and `write_bundle` raise."""
    model, file = load_model(folder)
    # Two, no more: their carries at every step are a part of the bundle.
    scenes = scene_examples("report", REFERENCES, file.config.tile)
    noisy = np.stack([observation["image"] for observation in scenes.observations])[:, None]
    return write_bundle(graph_model(model, file), output, {"noisy": noisy})


if __name__ == "__main__":
    bundle_command(__doc__, export, f"{MODEL} and {WEIGHTS}")
