"""Train the language plugin's model on CLINC150.

    python -m plugins_irp.language.train --data DATA --lessons LESSONS --run RUN    # resumes from RUN when it holds a state

LESSONS is the folder where `teacher.py` wrote its tokenizer and its lessons: damaged training sentences, and what a teacher
thinks of each. An optimiser step takes a batch of them: some steps of refinement without gradients, so that late steps are
practised too, then `--segment` steps with gradients and the loss after each (deep supervision, arXiv 2506.21734). Loss:
cross-entropy of the intent, and of the words that should stand at damaged places. `--teacher` of the intent's target is what
the teacher says, the rest is the label; the halting heads learn whether this step's intent is right (q_halt) and whether the
next one's will be (q_continue). RUN gets state.pt (to resume), log.csv and, at the end, model/ and learning-curve.png.
`seconds` in the log are CPU seconds on a CPU. Where there are two cores, two processes train faster than threads:
`torchrun --standalone --nproc-per-node 2 -m -- plugins_irp.language.train --data ...`.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from sage_edge.errors import one_line_errors
from sage_edge.export.learning_curve import LOG, plot
from sage_edge.export.training import Muon, Training, bfloat16_argument, common_arguments

from .corrupt import IGNORE
from .data import load_texts
from .facts import LanguageConfig
from .graphs import save_model
from .lessons import CURVES, Ints, Lessons, checks, ending_argument, read_words
from .model import LanguageModel, WordTable
from .tokens import TOKENIZER, Tokens

BLIND = (0, 0, 0, 1, 2, 3)  # steps without gradients before the segment, drawn evenly


def parts_of(both: nn.ModuleList) -> tuple[LanguageModel, WordTable]:
    """What a Trainer trains, with its types."""
    model, table = both
    assert isinstance(model, LanguageModel)
    assert isinstance(table, WordTable)
    return model, table


class Trainer(Training):
    model: nn.ModuleList

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.texts = load_texts(args.data)
        tokens = Tokens(args.lessons / TOKENIZER)
        self.config = LanguageConfig(
            tokens.size, len(self.texts.intents), embedding=args.embedding, hidden_size=args.hidden,
            num_heads=args.heads, layers=args.layers, max_steps=args.max_steps,
        )  # fmt: skip
        self.core = LanguageModel(self.config)
        self.core.embed_tokens.requires_grad_(False)  # the table is made of n-grams until the end
        self.table = WordTable(tokens.names, self.config.embedding)
        self.table.begin_with(torch.from_numpy(read_words(args.lessons, tokens.size)))
        both = nn.ModuleList([self.core, self.table]).to(args.device)
        rng = np.random.default_rng(args.seed)
        self.lessons = Lessons(args.lessons, args.batch, self.config.intents, rng)
        named = [(n, p) for n, p in both.named_parameters() if p.requires_grad]
        matrices = [p for n, p in named if ".core." in n]
        others = [p for n, p in named if ".core." not in n]
        muon = Muon(matrices, lr=args.lr)
        adam = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=True)
        super().__init__(args, both, (muon, adam), rng)
        self.parts = checks(self.texts, tokens)
        self.checks = tuple(self.parts)

    def train_step(self) -> dict[str, float]:
        args, model = self.args, self.core
        self.lessons.before(self.step, args.steps, args.ending)
        tokens, targets, intents, shares = (self.share(torch.from_numpy(a)) for a in self.lessons.draw())
        targets = targets.long()
        # What the label says (a tenth spread over all), and what the teacher says.
        label = F.one_hot(intents.long(), self.config.intents) * 0.9 + 0.1 / self.config.intents
        wanted = (1 - args.teacher) * label + args.teacher * shares
        table = self.table.folded()
        losses, rights, q = [], [], []
        with self.autocast():
            context, attend, meaning, words = model.encode(tokens, table)
            context = F.dropout(context, args.dropout)
            with torch.no_grad():
                for _ in range(int(self.rng.choice(BLIND))):
                    meaning, words = model.step(context, attend, meaning, words)
            for _ in range(args.segment):
                meaning, words = model.step(context, attend, meaning, words)
                logits = model.intent_logits(F.dropout(meaning, args.dropout))[:, 0]
                losses.append(F.cross_entropy(logits, wanted))
                rights.append((logits.argmax(-1) == intents).float())
                q.append(model.q_values(meaning.detach()))
        # All places with damage, and a fifth of the intact ones.
        chosen = (targets != IGNORE) & ((targets != tokens) | (torch.rand(targets.shape, device=self.device) < 0.2))
        word = F.cross_entropy(model.word_logits(F.dropout(words[chosen], args.dropout), table), targets[chosen])
        halt = [F.binary_cross_entropy_with_logits(v[:, 0], r) for v, r in zip(q, rights, strict=True)]
        more = [F.binary_cross_entropy_with_logits(v[:, 1], r) for v, r in zip(q[:-1], rights[1:], strict=True)]
        intent = torch.stack(losses).mean()
        loss = intent + args.word_weight * word + 0.1 * torch.stack(halt + more).mean()
        self.update(loss, 1.0)
        return {"loss": float(loss.detach()), "intent_loss": float(intent.detach()), "word_loss": float(word.detach()),
                "train_accuracy": float(rights[-1].mean())}  # fmt: skip

    @torch.no_grad()
    def averaged(self) -> LanguageModel:
        """The model with averaged weights and a plain token table."""
        model, table = parts_of(self.averaged_model())
        model.embed_tokens.embedding_weight.copy_(table.folded())
        return model

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Accuracy of the averaged weights on the calibration half after all steps, clean and with a fifth of the words
        masked."""
        model = self.averaged()

        def intents(tokens: Ints) -> Ints:
            context, attend, meaning, words = model.encode(torch.from_numpy(tokens).to(self.device))
            for _ in range(model.config.max_steps):
                meaning, words = model.step(context, attend, meaning, words)
            return np.asarray(model.intent_logits(meaning)[:, 0].argmax(-1).cpu().numpy(), np.int32)

        return {name: check.accuracy(intents) for name, check in self.parts.items()}

    def extra(self) -> dict[str, Any]:
        return self.lessons.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.lessons.restore(state)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(made, steps=3000, decay=0.5, batch=96, lr=2e-3, ema=0.998)
    made.add_argument("--weight-decay", type=float, default=0.02, help="of AdamW; Muon's is 0.1")
    made.add_argument("--lessons", type=Path, required=True, help="folder of the teacher's tokenizer and lessons")
    made.add_argument("--embedding", type=int, default=96)
    made.add_argument("--hidden", type=int, default=192)
    made.add_argument("--heads", type=int, default=4)
    made.add_argument("--layers", type=int, default=1)
    made.add_argument("--max-steps", type=int, default=6)
    made.add_argument("--segment", type=int, default=2, help="refinement steps with gradients")
    made.add_argument("--dropout", type=float, default=0.2)
    made.add_argument("--teacher", type=float, default=0.8, help="share of the teacher in the target")
    made.add_argument("--word-weight", type=float, default=0.3)
    ending_argument(made)
    bfloat16_argument(made)
    return made


def train(args: argparse.Namespace, console: Console) -> None:
    """Train to the last step and write what the module's docstring says."""
    args.run.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args)
    trainer.run(console)
    if trainer.rank:
        return
    source = f"plugins_irp/language/train.py: {trainer.step} steps of batch {args.batch}, seed {args.seed}"
    save_model(args.run / "model", trainer.averaged(), trainer.texts.intents, source)
    shutil.copyfile(args.lessons / TOKENIZER, args.run / "model" / TOKENIZER)
    plot(args.run / LOG, args.run / "learning-curve.png", CURVES, "intent_loss")
    console.print(f"wrote {args.run / 'model'} after {trainer.seconds / 3600:.2f} hours of training")


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module."""
    train(parser().parse_args(arguments), Console())


if __name__ == "__main__":
    main()
