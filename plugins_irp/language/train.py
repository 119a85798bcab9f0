"""Train the language plugin's model on CLINC150.

    python -m plugins_irp.language.train --data DATA --run RUN      # resumes from RUN when it holds a state

An optimiser step takes a batch of training sentences, each damaged anew (corrupt.py): some steps of refinement without
gradients, so that late steps are practised too, then `--segment` steps with gradients and the loss after each (deep
supervision, arXiv 2506.21734). Loss: cross-entropy of the intent, and of the words that should stand at damaged places. Half of
the intent's target is what a teacher, the averaged weights, says of the sentence before the damage (arXiv 1703.01780);
the halting heads learn whether this step's intent is right (q_halt) and whether the next one's will be (q_continue).
RUN gets tokenizer.json, state.pt (to resume), log.csv and, at the end, model/ and learning-curve.png. `seconds` in the log are
CPU seconds on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from sage_edge.errors import one_line_errors
from sage_edge.export.learning_curve import LOG, plot
from sage_edge.export.training import Muon, Training, common_arguments

from .corrupt import IGNORE, Rates, Vocabulary, damage
from .data import Pair, Texts, load_texts
from .facts import LanguageConfig
from .graphs import save_model
from .model import LanguageModel, WordTable
from .tokens import TOKENIZER, Tokens, train_tokenizer

BLIND = (0, 0, 0, 1, 2, 3)  # steps without gradients before the segment, drawn evenly
CROSSED = 0.25  # of the sentences are put together of two of the same intent
TEACHER_STEPS = 2
LIGHT = Rates(mask=0.05, typo=0.02, cut=0.1)


class Stream:
    """Endless shuffled batches of damaged training sentences; those of a batch are of like length."""

    def __init__(self, texts: Texts, tokens: Tokens, batch: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.tokens = tokens
        self.vocabulary = Vocabulary(tokens.mask, tokens.empty, tokens.pieces)
        self.batch = batch
        number = {name: i for i, name in enumerate(texts.intents)}
        self.words = [tokens.normalise(text).split() for text, _ in texts.train]
        self.labels = np.array([number[intent] for _, intent in texts.train])
        self.alike = [np.flatnonzero(self.labels == label) for label in range(len(texts.intents))]
        self.length = np.array([len(w) for w in self.words])
        self.queue: list[list[int]] = []

    def refill(self) -> None:
        """One epoch: shuffled, sorted by length within stretches of 16 batches."""
        order = self.rng.permutation(len(self.words))
        stretch = 16 * self.batch
        parts = (order[i : i + stretch] for i in range(0, len(order), stretch))
        flat = np.concatenate([part[np.argsort(self.length[part], kind="stable")] for part in parts])
        cut = [flat[i : i + self.batch].tolist() for i in range(0, len(flat) - self.batch + 1, self.batch)]
        self.queue = [cut[i] for i in self.rng.permutation(len(cut))]

    def rates(self) -> Rates:
        """A fifth of the sentences gets little damage, the others any amount up to three fifths of their words."""
        draw, mask, drop = self.rng.random(3)
        return LIGHT if draw < 0.2 else Rates(mask=0.6 * mask, drop=0.1 * drop, typo=0.06, cut=0.1)

    def sentence(self, row: int) -> list[str]:
        """The words of a sentence; sometimes it ends as another of the same intent does."""
        words = self.words[row]
        if self.rng.random() >= CROSSED:
            return words
        other = self.words[self.rng.choice(self.alike[self.labels[row]])]
        share = self.rng.random()
        crossed = words[: round(share * len(words))] + other[round(share * len(other)) :]
        return crossed or words

    def draw(self, limit: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Damaged tokens int32 [batch, n], targets int64 [batch, n], intents int64 [batch] and the tokens before the damage,
        int32 [batch, m]; n and m at most `limit`."""
        if not self.queue:
            self.refill()
        rows = self.queue.pop()
        sentences = [self.sentence(row) for row in rows]
        pairs = [damage(words, self.rates(), self.vocabulary, self.rng) for words in sentences]
        damaged = self.table([found for found, _ in pairs], limit)
        targets = self.table([wanted for _, wanted in pairs], limit, IGNORE).long()
        intact = self.table([self.tokens.ids(words) for words in sentences], limit)
        return damaged, targets, torch.from_numpy(self.labels[rows]), intact

    def table(self, rows: list[list[int]], limit: int, fill: int = 0) -> Tensor:
        """int32 [len(rows), longest row, at most `limit`]."""
        return torch.from_numpy(self.tokens.batch(rows, min(limit, max(map(len, rows))), fill))


class Check:
    """Calibration sentences with a fixed share of masked words, in batches of like length."""

    def __init__(self, pairs: tuple[Pair, ...], intents: tuple[str, ...], tokens: Tokens, rate: float) -> None:
        rng = np.random.default_rng(1)
        vocabulary = Vocabulary(tokens.mask, tokens.empty, tokens.pieces)
        rows = [damage(tokens.normalise(text).split(), Rates(mask=rate), vocabulary, rng)[0] for text, _ in pairs]
        labels = [intents.index(intent) for _, intent in pairs]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        self.batches = []
        for start in range(0, len(order), 250):
            part = order[start : start + 250]
            array = tokens.batch([rows[i] for i in part], len(rows[part[-1]]))
            self.batches.append((torch.from_numpy(array), torch.tensor([labels[i] for i in part])))

    @torch.no_grad()
    def accuracy(self, model: LanguageModel, device: torch.device) -> float:
        """Share of right intents after all steps."""
        right = total = 0
        for tokens, labels in self.batches:
            context, attend, meaning, words = model.encode(tokens.to(device))
            for _ in range(model.config.max_steps):
                meaning, words = model.step(context, attend, meaning, words)
            right += int((model.intent_logits(meaning)[:, 0].argmax(-1).cpu() == labels).sum())
            total += len(labels)
        return right / total


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
        path = args.run / TOKENIZER
        if not path.exists():
            train_tokenizer((text for text, _ in self.texts.train), args.vocab, path)
        tokens = Tokens(path)
        self.config = LanguageConfig(
            tokens.size, len(self.texts.intents), embedding=args.embedding, hidden_size=args.hidden,
            num_heads=args.heads, layers=args.layers, max_steps=args.max_steps,
        )  # fmt: skip
        self.core = LanguageModel(self.config)
        self.core.embed_tokens.requires_grad_(False)  # the table is made of n-grams until the end
        self.table = WordTable(tokens.names, self.config.embedding)
        both = nn.ModuleList([self.core, self.table]).to(args.device)
        self.stream = Stream(self.texts, tokens, args.batch, args.seed)
        named = [(n, p) for n, p in both.named_parameters() if p.requires_grad]
        matrices = [p for n, p in named if ".core." in n]
        others = [p for n, p in named if ".core." not in n]
        muon = Muon(matrices, lr=args.lr)
        adam = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=True)
        super().__init__(args, both, (muon, adam), self.stream.rng)
        # The averaged weights, usable at any time: its parameters are the average's own tensors.
        self.teacher = copy.deepcopy(both).requires_grad_(False)
        for name, p in self.teacher.named_parameters():
            p.data = self.ema.shadow[name]
        parts = {f"val_{round(100 * rate)}": rate for rate in (0.0, 0.2)}
        self.parts = {
            name: Check(self.texts.calibration, self.texts.intents, tokens, rate) for name, rate in parts.items()
        }
        self.checks = tuple(parts)

    @torch.no_grad()
    def taught(self, intact: Tensor) -> Tensor:
        """What the averaged weights say of the sentences before the damage: shares of the intents, float32 [batch, intents]."""
        model, table = parts_of(self.teacher)
        context, attend, meaning, words = model.encode(intact, table.folded())
        for _ in range(TEACHER_STEPS):
            meaning, words = model.step(context, attend, meaning, words)
        return model.intent_logits(meaning)[:, 0].softmax(-1)

    def train_step(self) -> dict[str, float]:
        args, model = self.args, self.core
        tokens, targets, intents, intact = (t.to(self.device) for t in self.stream.draw(self.config.seq_len))
        # What the label says (a tenth spread over all), and what the teacher says, once it knows something.
        trust = args.teacher * min(1.0, self.step / 1000)
        wanted = F.one_hot(intents, self.config.intents) * 0.9 + 0.1 / self.config.intents
        if trust:
            wanted = (1 - trust) * wanted + trust * self.taught(intact)
        table = self.table.folded()
        context, attend, meaning, words = model.encode(tokens, table)
        context = F.dropout(context, args.dropout)
        with torch.no_grad():
            for _ in range(int(self.stream.rng.choice(BLIND))):
                meaning, words = model.step(context, attend, meaning, words)
        losses, rights, q = [], [], []
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
        model, table = parts_of(copy.deepcopy(self.teacher))
        model.embed_tokens.embedding_weight.copy_(table.folded())
        return model.eval()

    def evaluate(self) -> dict[str, float]:
        """Accuracy of the averaged weights on the calibration half, clean and with a fifth of the words masked."""
        model = self.averaged()
        return {name: check.accuracy(model, self.device) for name, check in self.parts.items()}

    def extra(self) -> dict[str, Any]:
        return {"queue": self.stream.queue}

    def restore(self, state: dict[str, Any]) -> None:
        self.stream.queue = state["queue"]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(made, steps=3000, decay=0.5, batch=96, lr=2e-3, ema=0.998)
    made.add_argument("--weight-decay", type=float, default=0.02, help="of AdamW; Muon's is 0.1")
    made.add_argument("--vocab", type=int, default=3072, help="tokens of the tokenizer")
    made.add_argument("--embedding", type=int, default=96)
    made.add_argument("--hidden", type=int, default=192)
    made.add_argument("--heads", type=int, default=4)
    made.add_argument("--layers", type=int, default=1)
    made.add_argument("--max-steps", type=int, default=6)
    made.add_argument("--segment", type=int, default=2, help="refinement steps with gradients")
    made.add_argument("--dropout", type=float, default=0.2)
    made.add_argument("--teacher", type=float, default=0.5, help="weight of the teacher's word beside the label's")
    made.add_argument("--word-weight", type=float, default=0.3)
    return made


def train(args: argparse.Namespace, console: Console) -> None:
    """Train to the last step and write what the module's docstring says."""
    args.run.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args)
    trainer.run(console)
    source = f"plugins_irp/language/train.py: {trainer.step} steps of batch {args.batch}, seed {args.seed}"
    save_model(args.run / "model", trainer.averaged(), trainer.texts.intents, source)
    shutil.copyfile(args.run / TOKENIZER, args.run / "model" / TOKENIZER)
    plot(
        args.run / LOG,
        args.run / "learning-curve.png",
        {"val_0": "clean", "val_20": "20 % of words masked"},
        "intent_loss",
    )
    console.print(f"wrote {args.run / 'model'} after {trainer.seconds / 3600:.2f} hours of training")


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module."""
    train(parser().parse_args(arguments), Console())


if __name__ == "__main__":
    main()
