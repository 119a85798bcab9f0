"""The restorer: encode once, refine a latent of three scales with weight-tied steps, decode the noise.

The image is taken apart into four half-size ones (2 x 2 pixel unshuffle, FFDNet, arXiv 1710.04026): a quarter of the work.
No convolution has a bias, so that the estimate scales with the image and holds for noise levels between and beyond those
trained on (arXiv 1906.05478). The network predicts the noise, not the image (residual learning, DnCNN, arXiv 1608.03981).
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .facts import VisionConfig
from .judge import Judge, evidence

FOLD = 2
PARTS = FOLD * FOLD
UNIT = 64.0  # grey levels: about the deviation of an image, so that what flows through the network is of order one


def conv(inputs: int, outputs: int, size: int = 3, gain: float = 1.0) -> nn.Conv2d:
    """A convolution without bias that keeps the size. gain: on He's initialisation."""
    made = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(made.weight, nonlinearity="relu")
    with torch.no_grad():
        made.weight.mul_(gain)
    return made


class Residual(nn.Module):
    """x + conv(relu(conv(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = conv(width, width), conv(width, width, gain=0.2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(F.relu(self.first(x)))
        return out


class Down(nn.Module):
    """Half the resolution: 2 x 2 convolution with stride 2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 2, stride=2, bias=False)
        with torch.no_grad():
            self.conv.weight.mul_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class Up(nn.Module):
    """Twice the resolution: 1 x 1 convolution and pixel shuffle."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = conv(inputs, 4 * outputs, 1, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        # The same numbers as pixel_shuffle(conv(x), 2), in one operator that ONNX Runtime is much faster at.
        weight = self.conv.weight
        return F.conv_transpose2d(x, weight.view(-1, 2, 2, weight.shape[1]).permute(3, 0, 1, 2), stride=2)


class VisionModel(nn.Module):
    """noisy float32 [slots, 1, h, w] in grey levels (0..255 and what noise adds), h and w multiples of 8.

    parts float32 [slots, 4, h/2, w/2]: the image less its mean, in UNIT grey levels, unshuffled; fine, middle,
    coarse float32 [slots, c, ...] at 1/2, 1/4, 1/8 of the resolution; noise float32 [slots, 4, h/2, w/2]: the noise estimated
    so far, like parts.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        fine, middle, coarse = config.fine, config.middle, config.coarse
        self.embed = conv(PARTS, fine)
        self.core_embed = conv(fine, fine)  # by its name lowered with the core (precision/layers.py)
        self.inject = conv(2 * PARTS, fine, gain=0.3)
        self.down_fine, self.down_middle = Down(fine, middle), Down(middle, coarse)
        self.up_coarse, self.up_middle = Up(coarse, middle), Up(middle, fine)
        self.core_coarse, self.core_middle = Residual(coarse), Residual(middle)
        self.core_fine = nn.Sequential(*(Residual(fine) for _ in range(config.fine_blocks)))
        self.noise_head = conv(fine, PARTS, gain=0.03)
        self.judge = Judge(config.judge_width)

    def encode(self, noisy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Observation to (parts, fine, middle, coarse, noise); what is not known yet is 0."""
        parts = F.pixel_unshuffle((noisy - noisy.mean((2, 3), keepdim=True)) / UNIT, FOLD)
        fine = self.core_embed(F.relu(self.embed(parts)))
        slots, _, height, width = fine.shape
        middle = fine.new_zeros((slots, self.config.middle, height // 2, width // 2))
        coarse = fine.new_zeros((slots, self.config.coarse, height // 4, width // 4))
        return parts, fine, middle, coarse, torch.zeros_like(parts)

    def step(
        self, parts: Tensor, fine: Tensor, middle: Tensor, coarse: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One refine step: (fine, middle, coarse, noise) anew."""
        fine = fine + self.inject(torch.cat((parts, noise), 1))
        middle = middle + self.down_fine(fine)
        coarse = self.core_coarse(coarse + self.down_middle(middle))
        middle = self.core_middle(middle + self.up_coarse(coarse))
        fine = self.core_fine(fine + self.up_middle(middle))
        return fine, middle, coarse, self.noise_head(fine)

    def judged(self, parts: Tensor, before: Tensor, noise: Tensor) -> Tensor:
        """float32 [slots, 2]: ln of the error that the estimate is thought to have left (root mean square, in UNIT),
        and how much of it the remaining steps are thought to take away yet (a difference of ln, mostly above 0). before:
        the estimate of the step before."""
        out: Tensor = self.judge(evidence(parts, before, noise))
        return out

    @torch.no_grad()
    def grow_from(self, smaller: VisionModel) -> None:
        """Take the weights of a model that has fewer blocks at the fine scale and compute what it computes: blocks that it
        lacks begin as identity (Net2Net, arXiv 1511.05641). Raises ValueError where they differ in anything else."""
        had = smaller.config.fine_blocks
        if dataclasses.replace(smaller.config, fine_blocks=self.config.fine_blocks) != self.config:
            raise ValueError(f"expected {self.config} but for fine_blocks, found {smaller.config}")
        if had > self.config.fine_blocks:
            raise ValueError(f"fine_blocks: expected at most {self.config.fine_blocks}, found {had}")
        self.load_state_dict(smaller.state_dict(), strict=False)  # what it lacks is in the new blocks alone
        for name, parameter in self.core_fine[had:].named_parameters():
            if "second" in name:
                parameter.zero_()

    def decode(self, noise: Tensor) -> Tensor:
        """The noise in grey levels, float32 [slots, 1, h, w], to be taken off the image."""
        return F.pixel_shuffle(noise, FOLD) * UNIT
