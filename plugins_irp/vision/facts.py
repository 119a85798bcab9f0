"""What plugin, training and export share without torch: the files' names, the model's sizes, model.yaml."""

from __future__ import annotations

from dataclasses import dataclass

MODEL = "model.yaml"
WEIGHTS = "weights.safetensors"
WHITE = 255.0  # grey levels of full scale
QUALITY_UNITS = 10.0  # of the signals q_halt and q_continue in a dB: halting thresholds are finest about one such unit


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of one model. tile: pixels of a side of the square that the engine restores at a time. fine, middle, coarse:
    channels of the latent at 1/2, 1/4 and 1/8 of the image's resolution; fine_blocks: residual blocks in a row at 1/2 of it;
    judge_width: width of the judge's hidden layers. Raises ValueError, naming the field, for what is no model."""

    tile: int = 72
    fine: int = 32
    middle: int = 64
    coarse: int = 128
    judge_width: int = 64
    max_steps: int = 6
    fine_blocks: int = 1

    def __post_init__(self) -> None:
        for name in ("tile", "fine", "middle", "coarse", "judge_width", "max_steps", "fine_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.tile % 8:
            raise ValueError(f"tile: expected a multiple of 8 (the coarse latent has 1/8), found {self.tile}")


@dataclass(frozen=True)
class ModelFile:
    """The content of model.yaml: the model, its weights, and how they came about."""

    name: str
    config: VisionConfig
    weights_sha256: str
    source: str
