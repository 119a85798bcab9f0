"""What plugin, training and export share without torch: the files' names, the model's sizes, model.yaml."""

from __future__ import annotations

from dataclasses import dataclass

MODEL = "model.yaml"
WEIGHTS = "weights.safetensors"
SENTENCES = "sentences.csv"  # written for this project: text, intent
WRITTEN = "written.csv"  # of the same form: more training sentences


@dataclass(frozen=True)
class LanguageConfig:
    """Sizes of one model. embedding: width of the token table, which input and word head share. seq_len: most tokens of a
    command. Raises ValueError, naming the field, for what is no model."""

    vocab_size: int
    intents: int
    seq_len: int = 64
    embedding: int = 96
    hidden_size: int = 192
    num_heads: int = 4
    layers: int = 1
    expansion: float = 4.0
    max_steps: int = 8
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "intents",
            "seq_len",
            "embedding",
            "hidden_size",
            "num_heads",
            "layers",
            "max_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"num_heads: rotary positions need an even hidden_size / num_heads, found {self.hidden_size}"
            )


@dataclass(frozen=True)
class ModelFile:
    """The content of model.yaml: the model, the names of its intents in the order of the logits, and its weights."""

    name: str
    config: LanguageConfig
    intents: tuple[str, ...]
    weights_sha256: str
    source: str

    def __post_init__(self) -> None:
        if len(self.intents) != self.config.intents:
            raise ValueError(f"intents: {len(self.intents)} names for {self.config.intents} intents")
