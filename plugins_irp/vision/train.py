"""Train the vision plugin's model on the 400 grey images of the denoising literature.

    python -m plugins_irp.vision.train --data DATA --run RUN                     # resumes from RUN when it holds a state
    python -m plugins_irp.vision.train --data DATA --run RUN --export state.pt   # model/ from any checkpoint, no training

An optimiser step takes a batch of random patches, turned and mirrored, each with Gaussian noise of its own level, and lets
the model refine them with gradients through all steps, with a loss after each (deep supervision, weighed by
`--weights`): squared error over what is usual at that noise level, so that no level rules. From the finished model the
judge learns how much error is left, and how much of it the remaining steps take away.

`--grow MODEL` begins with a model that has as many blocks at the fine scale, or fewer. On a CPU, a process for each core
trains faster than threads: `torchrun --standalone --nproc-per-node 2 -m -- plugins_irp.vision.train --data ...`

The learning rate warms up, holds, and falls over the last `--decay` of `--steps`. RUN/hold.pt is the state where the fall
began: to train longer, copy it over state.pt and give more `--steps`. RUN gets state.pt, log.csv (`val_k`: PSNR of Set12 at
sigma 25 after k steps, by averaged weights; `seconds`: CPU seconds on a CPU) and, at the end, model/ and learning-curve.png.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from sage_edge.errors import InputError, one_line_errors
from sage_edge.export.learning_curve import LOG, plot
from sage_edge.export.training import Muon, Training, bfloat16_argument, common_arguments

from .data import MAX_SIGMA, Sets, load_sets, psnr
from .facts import WHITE, VisionConfig
from .graphs import DECIBEL, load_model, save_model
from .judge import evidence
from .model import FOLD, UNIT, VisionModel

CHECK_SIGMA = 25.0
CAP = 20.0
JUDGE_EPOCHS, JUDGE_BATCH, JUDGE_RATE = 60, 100, 1e-3
GAIN_CAP = 1 / DECIBEL  # 1 dB
USUAL = 1.1  # squared error that a denoiser leaves grows about as sigma ** USUAL (from the PSNR published for DnCNN)


class Stream:
    """Endless batches of random patches."""

    def __init__(self, images: np.ndarray, batch: int, patch: int, seed: int) -> None:
        """images uint8 [n, h, w]. Raises InputError for a patch that is larger."""
        if patch > min(images.shape[1:]):
            raise InputError(
                f"patch or tile: expected at most {min(images.shape[1:])} pixels, as in the images, found {patch}"
            )
        self.rng = np.random.default_rng(seed)
        self.images, self.batch, self.patch = images, batch, patch

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """clean and noisy float32 [batch, 1, patch, patch] and sigma float32 [batch], in grey levels."""
        rng, size = self.rng, self.patch
        clean = np.empty((self.batch, 1, size, size), np.float32)
        count, height, width = self.images.shape
        for row in range(self.batch):
            image = self.images[rng.integers(count)]
            top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
            piece = np.rot90(image[top : top + size, left : left + size], int(rng.integers(4)))
            clean[row, 0] = piece[:, ::-1] if rng.random() < 0.5 else piece
        sigma = (MAX_SIGMA * rng.random(self.batch)).astype(np.float32)
        noise = rng.standard_normal(clean.shape, dtype=np.float32) * sigma[:, None, None, None]
        return torch.from_numpy(clean), torch.from_numpy(clean + noise), torch.from_numpy(sigma)


@torch.no_grad()
def check(model: VisionModel, sets: Sets, device: torch.device, sigma: float = CHECK_SIGMA) -> list[float]:
    """Mean PSNR (dB) of Set12 after each step, whole images."""
    sums = np.zeros(model.config.max_steps)
    for at, clean in enumerate(sets.chosen):
        noise = np.random.default_rng(at).standard_normal(clean.shape, dtype=np.float32) * np.float32(sigma)
        noisy = torch.from_numpy(clean + noise)[None, None].to(device)
        parts, *state = model.encode(noisy.contiguous(memory_format=torch.channels_last))
        for k in range(model.config.max_steps):
            state = list(model.step(parts, *state))
            restored = (noisy - model.decode(state[-1]))[0, 0].cpu().numpy()
            sums[k] += psnr(restored.clip(0, WHITE).round(), clean)
    return [float(s) / len(sets.chosen) for s in sums]


def unrolled(
    model: VisionModel, clean: Tensor, noisy: Tensor, steps: int
) -> Iterator[tuple[tuple[Tensor, Tensor, Tensor], Tensor]]:
    """After each step: the parts, the estimate before it and after it, and the squared error of that, [batch]."""
    parts, *state = model.encode(noisy.contiguous(memory_format=torch.channels_last))
    truth = F.pixel_unshuffle((noisy - clean) / UNIT, FOLD)
    for _ in range(steps):
        before = state[-1]
        state = list(model.step(parts, *state))
        yield (parts, before, state[-1]), (state[-1] - truth).square().mean((1, 2, 3))


def continued(weights: Sequence[float], steps: int) -> list[float]:
    """As many as there are steps; the last of them stands for all further ones."""
    return [weights[min(at, len(weights) - 1)] for at in range(steps)]


def teach_judge(model: VisionModel, stream: Stream, patches: int, console: Console) -> None:
    """Fit the judge to the finished model, whose other weights stay: by squared error, as promises are about means, but for
    gains beyond GAIN_CAP. Those say "go on", however large; without a cap the few patches without noise decided the fit.
    """
    evidences, wanted = [], []
    with torch.no_grad():
        for _ in track(range(-(-patches // stream.batch)), "what the judge learns from", console=console):
            clean, noisy, _ = (t.to(next(model.parameters()).device) for t in stream.draw())
            seen, errors = [], []
            for estimates, error in unrolled(model, clean, noisy, model.config.max_steps):
                seen.append(evidence(*estimates))
                errors.append(error)
            left = 0.5 * torch.log(torch.stack(errors, 1) + 1e-8)
            gain = (left - left[:, -1:]).clamp(-GAIN_CAP, GAIN_CAP)
            evidences.append(torch.stack(seen, 1))
            wanted.append(torch.stack((left, gain), -1))
    x, y = torch.cat(evidences), torch.cat(wanted)
    judge, usual = model.judge, y.var((0, 1))
    judge.mean.copy_(x.mean((0, 1)))
    judge.deviation.copy_(x.std((0, 1)) + 1e-3)
    optimizer = torch.optim.Adam(judge.parameters(), lr=JUDGE_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, JUDGE_EPOCHS)
    order = torch.Generator().manual_seed(0)
    for _ in track(range(JUDGE_EPOCHS), "the judge learns", console=console):
        unexplained = torch.zeros(2)
        for rows in torch.split(torch.randperm(len(x), generator=order), JUDGE_BATCH):
            losses = (judge(x[rows]) - y[rows]).square().mean((0, 1))
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            unexplained += (losses.detach() / usual).cpu() * len(rows) / len(x)
        schedule.step()
    console.print(
        f"judge: of the variance unexplained: {unexplained[0]:.4f} of what is left, {unexplained[1]:.4f} of the gain"
    )


class Trainer(Training):
    model: VisionModel
    warm_up = 50

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.sets = load_sets(args.data)
        try:
            self.config = VisionConfig(
                args.tile, args.fine, args.middle, args.coarse, args.judge_width, args.max_steps, args.fine_blocks
            )
        except ValueError as error:
            raise InputError(str(error)) from error
        if not all(0 < weight < math.inf for weight in args.weights):
            raise InputError(f"weights: expected finite numbers above 0, found {' '.join(map(str, args.weights))}")
        self.checks = tuple(f"val_{k + 1}" for k in range(self.config.max_steps))
        model: VisionModel = VisionModel(self.config).to(args.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.grown_from = ""
        if args.grow:
            smaller, file = load_model(args.grow)
            try:
                model.grow_from(smaller)
            except ValueError as error:
                raise InputError(f"{args.grow}: {error}") from error
            self.grown_from = f", grown from {file.source}"
        self.stream = Stream(self.sets.train, args.batch, args.patch, args.seed)
        named = list(model.named_parameters())
        inner = [p for n, p in named if ".conv" in n or "core_" in n]
        outer = [p for n, p in named if not (".conv" in n or "core_" in n)]
        muon = Muon(inner, lr=args.lr, weight_decay=args.weight_decay)
        adam = torch.optim.AdamW(outer, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        super().__init__(args, model, (muon, adam), self.stream.rng)

    def train_step(self) -> dict[str, float]:
        args, model = self.args, self.model
        clean, noisy, sigma = (self.share(t) for t in self.stream.draw())
        steps = args.shallow if self.step < args.shallow_until else self.config.max_steps
        usual = (sigma + 2) ** USUAL / UNIT**2
        with self.autocast():
            errors = [error for _, error in unrolled(model, clean, noisy, steps)]
        weights = torch.tensor(continued(args.weights, steps), device=self.device)
        # Beyond CAP times the usual the loss grows with the logarithm: one patch on which the recurrence runs away must not
        # decide the batch.
        table = torch.stack([(CAP * torch.log1p(e / usual / CAP)).mean() for e in errors])
        loss: Tensor = (table * weights).sum() / weights.sum()
        norm = self.update(loss, args.clip)
        return {"loss": float(table[-1].detach()), "first_loss": float(table[0].detach()), "gradient": norm}

    def evaluate(self) -> dict[str, float]:
        return dict(zip(self.checks, check(self.averaged_model(), self.sets, self.device), strict=True))

    def write_model(self, console: Console) -> None:
        """RUN/model and RUN/learning-curve.png of where the training stands."""
        args, model = self.args, self.averaged_model()
        stream = Stream(self.sets.train, args.batch, args.tile, args.seed + 1)
        teach_judge(model, stream, args.judge_patches, console)
        hours = self.seconds / 3600
        source = (
            f"plugins_irp/vision/train.py: {self.step} steps of batch {args.batch} x {args.patch} x {args.patch}, "
            f"seed {args.seed}, {hours:.2f} hours{self.grown_from}"
        )
        save_model(args.run / "model", model, source)
        last = self.config.max_steps
        labels = {f"val_{k}": f"{k} steps" for k in (1, last // 2, last)}
        plot(args.run / LOG, args.run / "learning-curve.png", labels, "loss", "PSNR of Set12, dB")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(made, steps=19000, decay=0.29, batch=10, lr=2e-3, ema=0.999, eval_every=1000)
    made.add_argument("--export", type=Path, help="write RUN/model from this state (of RUN, or a path) and end")
    made.add_argument("--grow", type=Path, help="folder of a model to begin with, of as many --fine-blocks or fewer")
    made.add_argument("--patch", type=int, default=64, help="pixels of a side, a multiple of 8")
    made.add_argument("--weight-decay", type=float, default=0.0, help="of Muon")
    made.add_argument("--clip", type=float, default=5.0, help="largest norm of the gradient")
    bfloat16_argument(made)
    made.add_argument("--shallow", type=int, default=3, help="refinement steps at first")
    made.add_argument("--shallow-until", type=int, default=12000, help="optimiser steps with that few")
    made.add_argument(
        "--weights",
        type=float,
        nargs="+",
        default=[1.0],
        help="of the losses after step 1, 2, ...; the last: of all further",
    )
    made.add_argument("--tile", type=int, default=72)
    made.add_argument("--fine", type=int, default=64)
    made.add_argument("--fine-blocks", type=int, default=1, help="residual blocks at the fine scale")
    made.add_argument("--middle", type=int, default=64)
    made.add_argument("--coarse", type=int, default=112)
    made.add_argument("--judge-width", type=int, default=64, help="of the judge's hidden layers")
    made.add_argument("--max-steps", type=int, default=6)
    made.add_argument(
        "--judge-patches", type=int, default=12000, help="patches of a tile from which the judge learns at last"
    )
    return made


def train(args: argparse.Namespace, console: Console) -> None:
    """Train to the last step and write what the module's docstring says."""
    args.run.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args)
    if args.export:
        trainer.load(args.export if args.export.exists() else args.run / args.export)
    else:
        trainer.run(console)
    if trainer.rank:
        return
    trainer.write_model(console)
    console.print(
        f"wrote {args.run / 'model'} of step {trainer.step}, after {trainer.seconds / 3600:.2f} hours of training"
    )


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module."""
    train(parser().parse_args(arguments), Console())


if __name__ == "__main__":
    main()
