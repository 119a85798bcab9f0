"""Train the sudoku9 reference model: a small HRM that solves 9x9 sudoku in refinement steps.

    python export/sudoku9/generate.py --out DATA --train 300000 --calibration 4000 --test 2000 --seed 0
    python export/sudoku9/train.py --data DATA --run RUN            # resumes from RUN when it holds a state

Every optimiser step is one ACT step of a batch in which each slot carries its own puzzle: a slot that halts takes the
next puzzle (arXiv 2506.21734, section 2, "deep supervision"; the original training loop). Gradients flow through the
last H cycle of that step. The target of q_continue is the next step's own Q value, taken one optimiser step later, so
that no extra forward pass is needed. RUN gets state.pt (to resume), log.csv and, at the end, model/ (recipe.yaml and
checkpoint.safetensors).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from sage_edge.errors import InputError, one_line_errors
from sage_edge.export.hrm import HRM
from sage_edge.export.layers import Block
from sage_edge.export.learning_curve import LOG, plot
from sage_edge.export.training import STATE, Ema, Muon, Training, common_arguments
from sage_edge.specs import HRMConfig

CONFIG = HRMConfig(
    vocab_size=11,  # 0 pad, 1 blank, 2..10 digits 1..9, as in the original sudoku data
    seq_len=81,
    hidden_size=128,
    num_heads=4,
    expansion=4.0,
    H_layers=2,
    L_layers=2,
    H_cycles=2,
    L_cycles=2,
    halt_max_steps=8,
    puzzle_emb_ndim=128,
    pos_encodings="learned",
)

Batch = tuple[Tensor, Tensor]  # tokens int32 [slots, 81], labels int64 [slots, 81]


def load_generator() -> ModuleType:
    """The generator beside this file (export/ holds artefacts and is not a package)."""
    spec = importlib.util.spec_from_file_location("sudoku9_generate", Path(__file__).with_name("generate.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Puzzles:
    """Endless shuffled stream of puzzles under random symmetries, the harder ones drawn more often."""

    def __init__(self, path: Path, seed: int, validation: int = 512) -> None:
        data = np.load(path)
        self.generate = load_generator()
        self.rng = np.random.default_rng(seed)
        self.puzzle, self.solution, self.holes = data["puzzle"], data["solution"], data["holes"]
        held_out = np.flatnonzero(self.holes >= 30)[-validation:]
        self.validation = (to_tokens(self.puzzle[held_out]), to_tokens(self.solution[held_out]).long())
        self.rows = np.setdiff1d(np.arange(len(self.puzzle)), held_out)
        # Sorted by holes, so that a limit on them is a limit on the cumulated weight.
        self.rows = self.rows[np.argsort(self.holes[self.rows], kind="stable")]
        # Puzzles of 24-32 holes are solved early in training and teach little after that.
        weight = np.interp(self.holes[self.rows].astype(np.float64), [24, 34, 50], [0.25, 1.0, 2.0])
        self.cumulated = np.cumsum(weight)

    def draw(self, count: int, most_holes: float) -> Batch:
        """`count` puzzles of at most `most_holes` holes."""
        last = int(np.searchsorted(self.holes[self.rows], most_holes, side="right")) - 1
        drawn = self.rng.random(count) * self.cumulated[last]
        rows = self.rows[np.minimum(np.searchsorted(self.cumulated, drawn), last)]
        puzzle, solution = self.generate.symmetries(self.puzzle[rows], self.solution[rows], self.rng)
        return to_tokens(puzzle), to_tokens(solution).long()


def to_tokens(grid: npt.NDArray[np.uint8]) -> Tensor:
    """uint8 [N, 81] with 0 = blank to int32 tokens 1..10."""
    return torch.from_numpy(grid.astype(np.int32) + 1)


@torch.no_grad()
def see_units(model: HRM) -> None:
    """Initial weights by which heads 0, 1 and 2 of every layer look at a cell's row, column and box.

    Positions are row + column + box vectors, each kind in the dimensions of one head, tokens in those that are left; the
    query and key maps of these heads begin as the identity on them. Everything is trained from there.
    """
    config = model.config
    width = config.hidden_size // config.num_heads
    cell = torch.arange(81)
    row, column = cell // 9, cell % 9
    positions = torch.zeros(81, config.hidden_size)
    for head, unit in enumerate((row, column, row // 3 * 3 + column // 3)):
        vectors = torch.linalg.qr(torch.randn(width, 9)).Q.T / 3**0.5
        positions[:, head * width : (head + 1) * width] = vectors[unit]
    model.embed_pos.embedding_weight[: config.prefix] = 0
    model.embed_pos.embedding_weight[config.prefix :] = positions
    model.embed_tokens.embedding_weight[:, : 3 * width] = 0
    model.embed_tokens.embedding_weight[:, 3 * width :] *= (
        config.hidden_size / (config.hidden_size - 3 * width)
    ) ** 0.5
    for level in (model.H_level, model.L_level):
        for layer in level.layers:
            assert isinstance(layer, Block)
            weight = layer.self_attn.qkv_proj.weight
            for start in (0, config.hidden_size):  # queries, then keys
                weight[start : start + 3 * width] = torch.eye(3 * width, config.hidden_size)


@dataclasses.dataclass
class Carry:
    """What each slot keeps between optimiser steps."""

    tokens: Tensor
    labels: Tensor
    z_H: Tensor
    z_L: Tensor
    steps: Tensor
    halted: Tensor


class Trainer(Training):
    model: HRM
    warm_up = 200
    checks = ("val_exact_full", "val_exact_learned", "val_steps")

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.config = dataclasses.replace(
            CONFIG, hidden_size=args.hidden, num_heads=args.heads, puzzle_emb_ndim=args.hidden
        )
        model = HRM(self.config)
        see_units(model)
        model.to(args.device)
        self.data = Puzzles(args.data / "train.npz", args.seed)
        matrices = [p for n, p in model.named_parameters() if "_level." in n]
        others = [p for n, p in model.named_parameters() if "_level." not in n]
        # Muon orthogonalises the update of each hidden matrix; embeddings and heads stay with AdamW.
        muon = Muon(matrices, lr=args.lr)
        adam = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
        super().__init__(args, model, (muon, adam), self.data.rng)
        self.carry = self._fresh_carry()
        self.first_cycles = self._compile(self._first_cycles)
        self.last_cycle = self._compile(self._last_cycle)

    def _compile(self, function: Any) -> Any:
        return torch.compile(function) if self.args.compile else function

    def _fresh_carry(self) -> Carry:
        n, c = self.args.batch, self.config
        state = torch.zeros(n, c.positions, c.hidden_size, device=self.device)
        tokens = torch.ones(n, c.seq_len, dtype=torch.int32, device=self.device)
        return Carry(
            tokens, tokens.long(), state, state.clone(),
            torch.zeros(n, dtype=torch.int32, device=self.device),
            torch.ones(n, dtype=torch.bool, device=self.device),
        )  # fmt: skip

    def _first_cycles(self, tokens: Tensor, z_H: Tensor, z_L: Tensor) -> tuple[Tensor, Tensor]:
        context = self.model.embed(tokens, torch.zeros_like(tokens[:, 0]))
        for _ in range(self.config.H_cycles - 1):
            z_H, z_L = self.model.cycle(context, z_H, z_L)
        return z_H, z_L

    def _last_cycle(
        self, tokens: Tensor, labels: Tensor, z_H: Tensor, z_L: Tensor, previous: Tensor, steps: Tensor
    ) -> tuple[Tensor, ...]:
        context = self.model.embed(tokens, torch.zeros_like(tokens[:, 0]))
        z_H, z_L = self.model.cycle(context, z_H, z_L)
        logits = self.model.logits(z_H)
        cross_entropy = F.cross_entropy(logits.reshape(-1, self.config.vocab_size), labels.reshape(-1))
        right = logits.argmax(-1) == labels
        exact = right.all(-1)
        q = self.model.q_head(z_H[:, 0])
        halt_loss = F.binary_cross_entropy_with_logits(q[:, 0], exact.float())
        # The step before this one asked "what is continuing worth?": this step's Q values are the answer.
        with torch.no_grad():
            best = torch.where(steps >= self.config.halt_max_steps, q[:, 0], q.amax(-1))
            target = torch.sigmoid(best)
        continued = (steps > 1).float()
        continue_loss = F.binary_cross_entropy_with_logits(
            self.model.q_head(previous)[:, 1], target, weight=continued, reduction="sum"
        ) / continued.sum().clamp_min(1)
        loss = cross_entropy + 0.5 * halt_loss + 0.5 * continue_loss
        return loss, cross_entropy.detach(), z_H.detach(), z_L.detach(), q.detach(), right.detach(), exact

    def train_step(self) -> dict[str, float]:
        carry, model, config = self.carry, self.model, self.config
        fresh = carry.halted
        if count := int(fresh.sum()):
            tokens, labels = self.data.draw(count, self.most_holes())
            carry.tokens[fresh], carry.labels[fresh] = tokens.to(self.device), labels.to(self.device)
            carry.z_H[fresh], carry.z_L[fresh] = model.H_init, model.L_init
            carry.steps[fresh] = 0
        carry.steps += 1
        previous, z_H, z_L = carry.z_H[:, 0].clone(), carry.z_H, carry.z_L
        if self.step >= self.args.single_cycle_until:
            with torch.no_grad():
                z_H, z_L = self.first_cycles(carry.tokens, z_H, z_L)
        loss, ce, z_H, z_L, q, right, exact = self.last_cycle(
            carry.tokens, carry.labels, z_H, z_L, previous, carry.steps
        )
        self.update(loss, 1.0)
        explore = torch.rand(self.args.batch, device=self.device) < 0.1
        minimum = torch.randint(2, config.halt_max_steps + 1, (self.args.batch,), device=self.device) * explore
        wants = (q[:, 0] > q[:, 1]) & (carry.steps >= minimum)
        carry.z_H, carry.z_L = z_H.clone(), z_L.clone()
        carry.halted = wants | (carry.steps >= config.halt_max_steps)
        done = max(1, int(carry.halted.sum()))
        return {
            "loss": float(loss.detach()), "cross_entropy": float(ce), "token_accuracy": float(right.float().mean()),
            "exact_at_halt": float((exact & carry.halted).sum()) / done,
            "steps_at_halt": float((carry.steps * carry.halted).sum()) / done,
        }  # fmt: skip

    def most_holes(self) -> float:
        """Easy puzzles first: from 34 holes at the start up to 50, which is all, at step `ramp`."""
        return float(34 + 16 * min(1.0, self.step / max(1, self.args.ramp)))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Share of exact solutions at full steps and by the learned rule, and the mean steps of that rule."""
        model: HRM = self.averaged_model()
        tokens, labels = (t.to(self.device) for t in self.data.validation)
        context, z_H, z_L = model.encode(tokens, torch.zeros_like(tokens[:, 0]))
        halted = torch.zeros(len(tokens), dtype=torch.bool, device=self.device)
        exact_halted, steps = halted.clone(), torch.zeros(len(tokens), device=self.device)
        exact = halted
        for step in range(1, self.config.halt_max_steps + 1):
            z_H, z_L, q = model.step(context, z_H, z_L)
            exact = (model.logits(z_H).argmax(-1) == labels).all(-1)
            stops = ~halted & ((q[:, 0] > q[:, 1]) | (step == self.config.halt_max_steps))
            exact_halted, steps = torch.where(stops, exact, exact_halted), torch.where(stops, step, steps)
            halted = halted | stops
        found = (exact.float().mean(), exact_halted.float().mean(), steps.mean())
        return dict(zip(self.checks, map(float, found), strict=True))

    def extra(self) -> dict[str, Any]:
        return {"carry": dataclasses.asdict(self.carry)}

    def restore(self, state: dict[str, Any]) -> None:
        self.carry = Carry(**state["carry"])

    def start_from(self, folder: Path) -> None:
        """Take the weights of a model folder or an original checkpoint of the same architecture."""
        from sage_edge.export.checkpoint import open_model

        recipe, model = open_model(folder)
        if recipe.config != self.config:
            raise InputError(f"{folder}: its architecture is {recipe.config}, this run trains {self.config}")
        self.model.load_state_dict(model.state_dict())
        self.ema = Ema(self.model, self.ema.decay)

    def finish(self, run: Path, source: str) -> None:
        """Write the averaged weights as a model folder, and the learning curve."""
        from sage_edge.export.model_folder import save_model_folder

        save_model_folder(run / "model", self.averaged_state(), name="sudoku9", config=self.config, source=source)
        plot(
            run / LOG,
            run / "learning-curve.png",
            quality={"val_exact_full": "full steps", "val_exact_learned": "learned rule"},
            loss="cross_entropy",
        )


@one_line_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser, steps=4500, decay=0.45, batch=64, lr=4e-3, ema=0.999, log_every=20, eval_every=500)
    parser.add_argument("--init", type=Path, help="start from these weights: a model folder or an original checkpoint")
    parser.add_argument("--single-cycle-until", type=int, default=1200, help="train with one H cycle up to this step")
    parser.add_argument("--ramp", type=int, default=1500, help="step from which on the hardest puzzles are drawn too")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    train(parser.parse_args(), Console())


def train(args: argparse.Namespace, console: Console) -> None:
    """Train to the last step and write what the module's docstring says."""
    args.run.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args)
    if args.init and not (args.run / STATE).exists():
        trainer.start_from(args.init)
        console.print({"started from": str(args.init), **trainer.evaluate()}, highlight=False)
    trainer.run(console)
    begun = f"started from {args.init}, " if args.init else ""
    trainer.finish(args.run, f"export/sudoku9/train.py: {begun}{trainer.step} steps of batch {args.batch}")
    console.print(f"wrote {args.run / 'model'} after {trainer.seconds / 3600:.2f} hours of training")


if __name__ == "__main__":
    main()
