"""Says without the clean image how much error an estimate has left, and how much of it further steps would take away.

It looks at statistics of the estimated noise alone, not at the latent: a judge that also saw the latent's channels knew
the images that it learned from better, and others worse.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FLOOR = 1e-3  # of UNIT: below a sixteenth of a grey level nothing is told apart
BLOCK = 4  # of the unshuffled image: 8 x 8 pixels
EVIDENCE = 17  # how many statistics there are


def rms(x: Tensor) -> Tensor:
    """Root mean square of [slots, c, h, w], float32 [slots, 1]."""
    return x.square().mean((1, 2, 3)).sqrt().unsqueeze(-1)


def evidence(parts: Tensor, before: Tensor, noise: Tensor) -> Tensor:
    """What a judge sees, float32 [slots, EVIDENCE]: logarithms of the size of the noise and of its change in this step, and
    of what in them looks like image.

    parts, before, noise: float32 [slots, 4, h/2, w/2], as in `VisionModel`; before: the noise estimated a step earlier.
    """
    change, image = noise - before, parts - noise
    # White noise has half the deviation when averaged over twice the pixels a side; an image in it does not.
    coarse = [x.mean(1, keepdim=True) for x in (noise, change)]
    averaged = [block_means(x, size) for x in coarse for size in (1, 2, 4)]
    across = image[:, 1::2] - image[:, 0::2]
    down = image[:, 2:] - image[:, :2]
    edges, product = torch.cat((across, down), 1), noise * image
    power, moved = (block_means(x.square().mean(1, keepdim=True), BLOCK) for x in (noise, change))
    found = (
        rms(noise), rms(change), size_of(noise), size_of(change), *(rms(x) for x in averaged),
        product.mean((1, 2, 3)).abs().unsqueeze(-1), size_of(product), rms(edges), size_of(edges),
        spread(power), spread(moved), size_of(moved.sqrt()),
    )  # fmt: skip
    return torch.log(torch.cat(found, 1) + FLOOR)


def block_means(x: Tensor, size: int) -> Tensor:
    """Means of the size x size blocks of [slots, 1, h, w]."""
    height, width = x.shape[2] // size, x.shape[3] // size
    return x.reshape(-1, 1, height, size, width, size).mean((3, 5))


def size_of(x: Tensor) -> Tensor:
    """Mean magnitude of [slots, c, h, w], float32 [slots, 1]."""
    return x.abs().mean((1, 2, 3)).unsqueeze(-1)


def spread(x: Tensor) -> Tensor:
    """Standard deviation of [slots, c, h, w], float32 [slots, 1]."""
    return rms(x - x.mean((1, 2, 3), keepdim=True))


class Judge(nn.Module):
    """Two heads of one hidden layer, for each of the numbers of `VisionModel.judged`: with a layer in common, what is left,
    which is far larger, decided what the layer learned."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(EVIDENCE))
        self.register_buffer("deviation", torch.ones(EVIDENCE))
        self.left, self.gain = (
            nn.Sequential(nn.Linear(EVIDENCE, width), nn.ReLU(), nn.Linear(width, 1)) for _ in range(2)
        )

    def forward(self, seen: Tensor) -> Tensor:
        """float32 [..., 2] of evidence [..., EVIDENCE]."""
        usual = (seen - self.mean) / self.deviation
        return torch.cat((self.left(usual), self.gain(usual)), -1)
