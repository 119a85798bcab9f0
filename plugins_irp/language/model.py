"""The language model in torch: encode, weight-tied refine steps, decode (DESIGN.md). For training and export only.

The meaning is one vector of its own, in front of the words; both are refined together by the same blocks at every step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sage_edge.export.layers import Block, Embedding, Linear, ReasoningModule, Rotary, rms_norm, truncated_normal_

from .facts import LanguageConfig

MASKED_OUT = -1e4  # added to attention scores of padding: exp of it is 0 in fp32 and it is finite in fp16


GRAM_LENGTHS = range(2, 6)


class WordTable(nn.Module):
    """Token table [vocab, width]: each row is the token's own vector plus those of its letter n-grams (arXiv 1607.04606).

    So rare words borrow from words that are written alike. It is one plain table in the end (`folded`): the exported
    graphs know nothing of n-grams. Parameters: `own` [vocab, width], `grams` [n-grams of at least two tokens, width].
    """

    index: Tensor
    offsets: Tensor

    def __init__(self, vocabulary: Sequence[str], width: int) -> None:
        super().__init__()
        parts = [letter_grams(token) for token in vocabulary]
        counts = Counter(gram for grams in parts for gram in grams)
        number = {gram: i for i, gram in enumerate(sorted(g for g, n in counts.items() if n > 1))}
        rows = [[number[gram] for gram in grams if gram in number] for grams in parts]
        flat = [i for row in rows for i in row]
        self.register_buffer("index", torch.tensor(flat, dtype=torch.int64), persistent=False)
        starts = torch.tensor([0, *(len(row) for row in rows)], dtype=torch.int64).cumsum(0)[:-1]
        self.register_buffer("offsets", starts, persistent=False)
        self.own = nn.Parameter(truncated_normal_(torch.empty(len(vocabulary), width), width**-0.5))
        self.grams = nn.Parameter(truncated_normal_(torch.empty(max(1, len(number)), width), 0.5 * width**-0.5))

    @torch.no_grad()
    def begin_with(self, vectors: Tensor) -> None:
        """Own vectors from what is known of the tokens, float32 [vocab, n]: their directions among the first principal
        components. Rows of zeros, of which nothing is known, stay random."""
        known = vectors.abs().sum(1) > 0
        centred = vectors[known] - vectors[known].mean(0)
        _, _, axes = torch.linalg.svd(centred, full_matrices=False)
        near = centred @ axes[: self.own.shape[1]].t()
        self.own[known, : near.shape[1]] = F.normalize(near, dim=1)

    def folded(self) -> Tensor:
        """The table, float32 [vocab, width]."""
        return self.own + F.embedding_bag(self.index, self.grams, self.offsets, mode="mean")


def letter_grams(token: str) -> list[str]:
    """The letter n-grams of a piece, its word boundary included; none for special tokens and bytes."""
    if token.startswith("<"):
        return []
    return sorted({token[i : i + n] for n in GRAM_LENGTHS for i in range(len(token) - n + 1)})


class LanguageModel(nn.Module):
    """tokens int32 [slots, n], 0 = padding; n is seq_len in the exported graphs and may be less in training.

    context float32 [slots, 1 + n, hidden]; attend float32 [slots, 1 + n]: 0, or MASKED_OUT at padding; meaning float32
    [slots, 1, hidden]; words float32 [slots, n, hidden].
    """

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.embed_tokens = Embedding(config.vocab_size, config.embedding, config.embedding**-0.5)
        # Each word sees its neighbours before the first step: word pairs say much in short commands.
        self.embed_local = Linear(3 * config.embedding, hidden, bias=False)
        self.embed_bag = Linear(config.embedding, hidden, bias=False)
        self.start = nn.Parameter(truncated_normal_(torch.empty(2, hidden), 1.0))
        self.core = ReasoningModule(
            [Block(hidden, config.num_heads, config.expansion, config.rms_norm_eps) for _ in range(config.layers)]
        )
        self.rotary = Rotary(hidden // config.num_heads, 1 + config.seq_len, config.rope_theta)
        self.intent_head = Linear(hidden, config.intents, bias=True)
        self.word_head = Linear(hidden, config.embedding, bias=False)
        self.word_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.q_head = Linear(hidden, 2, bias=True)
        nn.init.zeros_(self.q_head.weight)

    def encode(self, tokens: Tensor, table: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Observation to (context, attend, meaning, words). table: stands in for the model's own (training)."""
        eps = self.config.rms_norm_eps
        known = (tokens != 0).float().unsqueeze(-1)
        x = (self.embed_tokens(tokens) if table is None else F.embedding(tokens, table)) * known
        nothing = torch.zeros_like(x[:, :1])
        local = torch.cat((torch.cat((nothing, x[:, :-1]), 1), x, torch.cat((x[:, 1:], nothing), 1)), -1)
        context = torch.cat((rms_norm(self.embed_bag(x.sum(1, keepdim=True)), eps),
                             rms_norm(self.embed_local(local), eps)), 1)  # fmt: skip
        attend = torch.cat((torch.zeros_like(known[:, :1]), (1 - known) * MASKED_OUT), 1).squeeze(-1)
        start = torch.zeros_like(context)
        return context, attend, start[:, :1] + self.start[0], start[:, 1:] + self.start[1]

    def step(self, context: Tensor, attend: Tensor, meaning: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """One refine step: (meaning, words) anew."""
        bias = attend[:, None, None, :]
        x = self.core(torch.cat((meaning, words), 1), context, self.rotary, bias)
        return x[:, :1], x[:, 1:]

    def intent_logits(self, meaning: Tensor) -> Tensor:
        out: Tensor = self.intent_head(meaning).float()
        return out

    def word_logits(self, words: Tensor, table: Tensor | None = None) -> Tensor:
        table = self.embed_tokens.embedding_weight if table is None else table
        out: Tensor = self.word_head(words).float() @ table.t() + self.word_bias
        return out

    def q_values(self, meaning: Tensor) -> Tensor:
        out: Tensor = self.q_head(meaning[:, 0]).float()
        return out
