"""What training scripts share: the Muon optimiser, averaged weights, a state file that a kill does not halve.

Muon: momentum whose update of each matrix is made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).
`torch.optim.Muon` computes the Newton-Schulz iteration in bfloat16, which a CPU without bfloat16 units does several times
slower than float32: at the language model's size that was a third of the training time. This one computes in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sage_edge.files import replacing

# The quintic's coefficients of the source: steep at 0, so that five iterations bring singular values near 1.
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonal(matrix: Tensor, iterations: int = 5) -> Tensor:
    """A matrix with the singular vectors of `matrix` [n, m] and singular values near 1."""
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.t() if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.t()
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x.t() if tall else x


class Muon(torch.optim.Optimizer):
    """For matrices, and filters [out, in, h, w] as matrices [out, in h w]. The update has the root mean square of an AdamW
    update (0.2), so the learning rate may be shared (arXiv 2502.16982, section 2.2); Nesterov momentum, decoupled weight decay.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.1, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(buffer, group["momentum"]).flatten(1))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view(p.shape), alpha=-group["lr"] * 0.2 * max(update.shape) ** 0.5)


class Ema:
    """Exponential moving average of all parameters; its memory is short at first."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in model.named_parameters():
            self.shadow[name].lerp_(p, 1 - decay)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state that `torch.load` reads with weights_only; a kill leaves the one before."""
    with replacing(path) as temporary:
        torch.save(state, temporary)
