"""The language model's three graphs, and the plugin's files: model.yaml, weights.safetensors, bundle/. Needs torch.

python -m plugins_irp.language.graphs RUN/model -o plugins_irp/language/bundle
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from sage_edge.bundle import Bundle, Graphs, GraphSpec
from sage_edge.config import dump_yaml, load_yaml
from sage_edge.errors import InputError
from sage_edge.export.bundle import GraphModel, write_bundle
from sage_edge.export.graph import entropies, relative_change
from sage_edge.export.weights import bundle_command, load_weights, save_weights
from sage_edge.files import write_atomic
from sage_edge.specs import SLOTS, Array, TensorSpec

from .data import labelled
from .facts import MODEL, SENTENCES, WEIGHTS, LanguageConfig, ModelFile
from .model import LanguageModel
from .tokens import TOKENIZER, Tokens

REFERENCES = 3
SIGNALS = ("q_halt", "q_continue", "entropy_mean", "changed", "meaning_change")


class Encode(nn.Module):
    """tokens -> context, attend, meaning, words."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.model.encode(tokens)


class Refine(nn.Module):
    """One step and its signals. entropy_mean: of the intent; changed: whether the likeliest intent is another one now;
    meaning_change: how far the meaning moved, in proportion."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, context: Tensor, attend: Tensor, meaning: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before = self.model.intent_logits(meaning).argmax(-1)
        new_meaning, new_words = self.model.step(context, attend, meaning, words)
        logits = self.model.intent_logits(new_meaning)
        entropy, _ = entropies(logits)
        changed = (logits.argmax(-1) != before).float()
        moved = relative_change(meaning, new_meaning)
        return new_meaning, new_words, torch.cat((self.model.q_values(new_meaning), entropy, changed, moved), dim=-1)


class Decode(nn.Module):
    """meaning, words -> logits over the intents, the likeliest one, the likeliest token at every place, and how sure."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, meaning: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = self.model.intent_logits(meaning)
        sure, best = torch.softmax(self.model.word_logits(words), -1).max(-1)
        return logits, logits.argmax(-1).to(torch.int32), best.to(torch.int32), sure


def language_graphs(config: LanguageConfig) -> Graphs:
    """Tensor specs of the three graphs."""
    length, hidden = config.seq_len, config.hidden_size
    context = (
        TensorSpec("context", "float32", (SLOTS, 1 + length, hidden)),
        TensorSpec("attend", "float32", (SLOTS, 1 + length)),
    )
    meaning, words = (SLOTS, 1, hidden), (SLOTS, length, hidden)
    carry = (TensorSpec("meaning", "float32", meaning), TensorSpec("words", "float32", words))
    refined = (
        TensorSpec("meaning_next", "float32", meaning),
        TensorSpec("words_next", "float32", words),
        TensorSpec("signals", "float32", (SLOTS, len(SIGNALS))),
    )
    prediction = (
        TensorSpec("logits", "float32", (SLOTS, 1, config.intents)),
        TensorSpec("prediction", "int32", (SLOTS, 1)),
        TensorSpec("filled", "int32", (SLOTS, length)),
        TensorSpec("filled_probability", "float32", (SLOTS, length)),
    )
    tokens = (TensorSpec("tokens", "int32", (SLOTS, length), 0, config.vocab_size - 1),)
    return Graphs(
        encode=GraphSpec(tokens, context + carry), refine=GraphSpec(context + carry, refined),
        decode=GraphSpec(carry, prediction),
    )  # fmt: skip


def graph_model(model: LanguageModel, file: ModelFile) -> GraphModel:
    """The model as `write_bundle` takes it."""
    return GraphModel(
        file.name, language_graphs(file.config), SIGNALS, file.config.max_steps,
        Encode(model), Refine(model), Decode(model),
        sum(p.numel() for p in model.parameters()), file.weights_sha256, file.source,
    )  # fmt: skip


def save_model(folder: Path, model: LanguageModel, intents: tuple[str, ...], source: str) -> ModelFile:
    """Write weights.safetensors (float16) and model.yaml. The weights of `model` are rounded to float16 on the way, so
    that what is stored, exported and measured is the same."""
    halves = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor.float() for name, tensor in halves.items()})
    file = ModelFile("language", model.config, intents, save_weights(folder / WEIGHTS, halves), source)
    write_atomic(folder / MODEL, dump_yaml(file))
    return file


def load_model(folder: Path) -> tuple[LanguageModel, ModelFile]:
    """The model of a folder, in eval mode. Raises InputError and IntegrityError, naming the file."""
    file = load_yaml(folder / MODEL, ModelFile)
    model = LanguageModel(file.config)
    load_weights(folder / WEIGHTS, file.weights_sha256, model, MODEL)
    return model, file


def export(folder: Path, output: Path) -> Bundle:
    """Write the bundle of the model in `folder` (model.yaml, weights, tokenizer); its reference are the plugin's own
    sentences. Raises what `load_model` and `write_bundle` raise."""
    model, file = load_model(folder)
    tokens = Tokens(folder / TOKENIZER)
    if tokens.size != file.config.vocab_size:
        raise InputError(f"{tokens.path}: holds {tokens.size} tokens, the model of {MODEL} {file.config.vocab_size}")
    sentences = labelled(Path(__file__).with_name(SENTENCES))
    # A few of all kinds: their carries at every step are a part of the bundle, and should stay a small one.
    texts = [text for text, _ in sentences[:: len(sentences) // REFERENCES]][:REFERENCES]
    samples: dict[str, Array] = {"tokens": tokens.batch([tokens.encode(text) for text in texts], file.config.seq_len)}
    return write_bundle(graph_model(model, file), output, samples)


if __name__ == "__main__":
    bundle_command(__doc__, export, f"{MODEL}, {WEIGHTS} and {TOKENIZER}")
