"""What training scripts share: the loop with its log and its state, the Muon optimiser, averaged weights.

Muon: momentum whose update of each matrix is made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).
`torch.optim.Muon` computes the Newton-Schulz iteration in bfloat16, which a CPU without bfloat16 units does several times
slower than float32: at the language model's size that was a third of the training time. This one computes in float32.
"""

from __future__ import annotations

import argparse
import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, distributed, nn

from sage_edge.errors import InputError
from sage_edge.export.learning_curve import LOG, append_row, keep_until
from sage_edge.export.weights import first_misfit
from sage_edge.files import replacing

STATE, HOLD = "state.pt", "hold.pt"

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


class Training(ABC):
    """A training run: a step, a log, a state from which a killed run goes on.

    A subclass makes the model and its optimisers, names the optimiser steps before the full learning rate (`warm_up`) and
    writes `train_step`, `evaluate`, and, where it keeps more than this class does, `extra` and `restore`. args: what
    `common_arguments` adds. rng: what draws the data.

    A subclass that takes its `share` of each batch may run under torchrun: every process draws the whole batch, and
    gradients are averaged, so that all hold the same model. The first one checks, logs and saves.
    """

    warm_up = 100
    checks: tuple[str, ...]  # the names that `evaluate` gives

    def __init__(self, args: argparse.Namespace, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer],
                 rng: np.random.Generator) -> None:  # fmt: skip
        self.args, self.model, self.optimizers, self.rng = args, model, list(optimizers), rng
        self.device = torch.device(args.device)
        launched = distributed.is_available() and distributed.is_torchelastic_launched()
        if launched and not distributed.is_initialized():
            distributed.init_process_group("gloo")
        self.rank, self.processes = (distributed.get_rank(), distributed.get_world_size()) if launched else (0, 1)
        if args.batch % self.processes:
            raise InputError(f"batch: expected a multiple of the {self.processes} processes, found {args.batch}")
        self.ema = Ema(model, args.ema)
        self.step, self.seconds = 0, 0.0

    @abstractmethod
    def train_step(self) -> dict[str, float]:
        """One optimiser step (`update`); what the log shall hold of it, losses first."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Quality of the averaged weights on data that is not trained on."""

    def extra(self) -> dict[str, Any]:
        """What a state holds besides: of what `torch.load` reads with weights_only."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take back what `extra` gave."""

    def share(self, batch: Tensor) -> Tensor:
        """The part of a batch that this process learns from, on its device."""
        return batch[self.rank :: self.processes].to(self.device)

    def update(self, loss: Tensor, clip: float) -> float:
        """Gradients, clipped to the norm `clip`; a step of the optimisers and of the average. Returns the norm. A group of
        parameters with a `scale` learns at that many times the learning rate."""
        loss.backward()  # type: ignore[no-untyped-call]
        if self.processes > 1:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            flat = torch.cat([g.flatten() for g in gradients])
            distributed.all_reduce(flat)
            means = torch.split(flat / self.processes, [g.numel() for g in gradients])
            for gradient, mean in zip(gradients, means, strict=True):
                gradient.copy_(mean.view_as(gradient))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate() * group.get("scale", 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.ema.update(self.model, self.step)
        return float(norm)

    def autocast(self) -> torch.autocast:
        """A context that computes in bfloat16 where `--bfloat16` says so (see `bfloat16_argument`)."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bfloat16)

    def averaged_state(self) -> dict[str, Any]:
        """The model's state dict with averaged parameters; buffers are as they are."""
        return {**self.model.state_dict(), **self.ema.shadow}

    def averaged_model(self) -> Any:
        """A copy of the model with averaged weights, not in training; of the class of `model`."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.averaged_state())
        return model.eval()

    def falling(self) -> float:
        """Share of the learning rate that is left: 1 until it falls, linearly to 2 % at the end of the run."""
        left = (self.args.steps - self.step) / max(1.0, self.args.decay * self.args.steps)
        return float(min(1.0, max(0.02, left)))

    def learning_rate(self) -> float:
        return float(self.args.lr * min(1.0, (self.step + 1) / self.warm_up) * self.falling())

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(), "ema": self.ema.shadow, "step": self.step, "seconds": self.seconds,
            "optimizers": [o.state_dict() for o in self.optimizers], "torch_rng": torch.get_rng_state(),
            "numpy_rng": self.rng.bit_generator.state, **self.extra(),
        }  # fmt: skip
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> None:
        """Raises InputError where `path` is no state of this model."""
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
        except Exception as error:  # a damaged file: UnpicklingError, EOFError, IndexError, whatever its bytes lead to
            raise InputError(f"{path}: no state of this model: {first_misfit(error) or 'damaged'}") from error
        for name, average in self.ema.shadow.items():
            average.copy_(state["ema"][name])
        self.step, self.seconds = state["step"], state["seconds"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["torch_rng"].cpu())
        self.rng.bit_generator.state = state["numpy_rng"]
        self.restore(state)

    def run(self, console: Console) -> None:
        """Train to the last step. RUN gets state.pt, from which a later call goes on, hold.pt, the state where the learning
        rate began to fall, and log.csv, whose `seconds` are CPU seconds on a CPU."""
        args, log = self.args, self.args.run / LOG
        if (args.run / STATE).exists():
            self.load(args.run / STATE)
            if not self.rank:
                keep_until(log, self.step)
                console.print(f"resumed {args.run / STATE} at step {self.step}")
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        sums: dict[str, list[float]] = {}
        while self.step < args.steps:
            began, held = clock(), self.falling() == 1.0
            for name, value in self.train_step().items():
                sums.setdefault(name, []).append(value)
            self.seconds += (clock() - began) * self.processes
            if self.rank:
                sums.clear()
                continue
            last = self.step == args.steps
            evaluates = self.step % args.eval_every == 0 or last
            if evaluates or self.step % args.log_every == 0:
                row: dict[str, Any] = {
                    "step": self.step, "seconds": round(self.seconds), "lr": round(self.learning_rate(), 7),
                    **{name: round(float(np.mean(values)), 5) for name, values in sums.items()},
                    **dict.fromkeys(self.checks, ""),
                }  # fmt: skip
                if evaluates:
                    row |= {name: round(value, 4) for name, value in self.evaluate().items()}
                    console.print(row, highlight=False)
                append_row(log, row)
                sums.clear()
            if held and self.falling() < 1.0:
                self.save(args.run / HOLD)
            if self.step % args.save_every == 0 or last:
                self.save(args.run / STATE)


def common_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """The options that `Training` reads. defaults: of steps, decay, batch, lr and ema, and others where they differ."""
    chosen = {"seed": 0, "log_every": 25, "eval_every": 250, "save_every": 100} | defaults
    parser.add_argument("--data", type=Path, required=True, help="folder with the data (see above)")
    parser.add_argument("--run", type=Path, required=True, help="folder for the state, the log and the model")
    parser.add_argument("--steps", type=int, help="optimiser steps in all")
    parser.add_argument("--decay", type=float, help="last fraction of the run with falling learning rate")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float, help="learning rate")
    parser.add_argument("--ema", type=float, help="decay of the averaged weights; less for short runs")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--log-every", type=int)
    parser.add_argument("--eval-every", type=int)
    parser.add_argument("--save-every", type=int)
    parser.set_defaults(**chosen)


def bfloat16_argument(parser: argparse.ArgumentParser) -> None:
    """The option that `Training.autocast` reads."""
    parser.add_argument(
        "--bfloat16", action="store_true", help="compute in bfloat16: up to 1.7 times as fast where the CPU can"
    )
