"""HRM in torch: the two families behind one contract, encode / refine / decode (DESIGN.md).

`hrm-act-v1` is the original model (arXiv 2506.21734, sapientinc/HRM `hrm_act_v1.py`). `hrm-bidirectional` adds explicit
projections between the levels in every cycle and a halting head that sees both states.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sage_edge.export.layers import (
    Block,
    Embedding,
    Linear,
    PuzzleEmbedding,
    ReasoningModule,
    Rotary,
    truncated_normal_,
)
from sage_edge.specs import HRMConfig


class HRM(nn.Module):
    """One Hierarchical Reasoning Model.

    Shapes: tokens int32 [slots, seq_len]; puzzle_identifiers int32 [slots]; context, z_H, z_L float32
    [slots, prefix + seq_len, hidden]; logits float32 [slots, seq_len, vocab]; q float32 [slots, 2] (halt, continue).
    """

    H_init: Tensor
    L_init: Tensor

    def __init__(self, config: HRMConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        std = 1.0 / math.sqrt(hidden)
        self.embed_tokens = Embedding(config.vocab_size, hidden, std)
        self.lm_head = Linear(hidden, config.vocab_size, bias=False)
        self.q_head = Linear(2 * hidden if config.bidirectional else hidden, 2, bias=True)
        if config.puzzle_emb_ndim > 0:
            self.puzzle_emb = PuzzleEmbedding(config.num_puzzle_identifiers, config.puzzle_emb_ndim)
        self.rotary: Rotary | None = None
        if config.pos_encodings == "rope":
            self.rotary = Rotary(hidden // config.num_heads, config.positions, config.rope_theta)
        else:
            self.embed_pos = Embedding(config.positions, hidden, std)
        self.H_level = self._stack(config.H_layers)
        self.L_level = self._stack(config.L_layers)
        if config.bidirectional:
            self.h_to_l = Linear(hidden, hidden, bias=True)
            self.l_to_h = Linear(hidden, hidden, bias=True)
        self.register_buffer("H_init", truncated_normal_(torch.empty(hidden), 1.0))
        self.register_buffer("L_init", truncated_normal_(torch.empty(hidden), 1.0))
        # "Never halt" at the start: the heads learn from there (original code).
        nn.init.zeros_(self.q_head.weight)
        nn.init.constant_(self.q_head.bias, -5.0)

    def _stack(self, layers: int) -> ReasoningModule:
        c = self.config
        return ReasoningModule([Block(c.hidden_size, c.num_heads, c.expansion, c.rms_norm_eps) for _ in range(layers)])

    def embed(self, tokens: Tensor, puzzle_identifiers: Tensor) -> Tensor:
        """Scaled input embeddings with the puzzle prefix: the context of every step."""
        config = self.config
        x = self.embed_tokens(tokens)
        if config.puzzle_emb_ndim > 0:
            puzzle = self.puzzle_emb(puzzle_identifiers)
            padding = config.prefix * config.hidden_size - config.puzzle_emb_ndim
            puzzle = nn.functional.pad(puzzle, (0, padding)) if padding else puzzle
            x = torch.cat((puzzle.view(-1, config.prefix, config.hidden_size), x), dim=1)
        if config.pos_encodings == "learned":
            x = math.sqrt(0.5) * (x + self.embed_pos.embedding_weight)
        scaled: Tensor = math.sqrt(config.hidden_size) * x
        return scaled

    def encode(self, tokens: Tensor, puzzle_identifiers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Observation to (context, z_H, z_L)."""
        context = self.embed(tokens, puzzle_identifiers)
        return context, self.H_init.expand_as(context), self.L_init.expand_as(context)

    def cycle(self, context: Tensor, z_H: Tensor, z_L: Tensor) -> tuple[Tensor, Tensor]:
        """One H cycle: L_cycles updates of the low level, then one of the high level."""
        for _ in range(self.config.L_cycles):
            guidance = self.h_to_l(z_H) if self.config.bidirectional else z_H
            z_L = self.L_level(z_L, guidance + context, self.rotary)
        feedback = self.l_to_h(z_L) if self.config.bidirectional else z_L
        return self.H_level(z_H, feedback, self.rotary), z_L

    def step(self, context: Tensor, z_H: Tensor, z_L: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One ACT step: H_cycles cycles. Returns (z_H, z_L, q)."""
        for _ in range(self.config.H_cycles):
            z_H, z_L = self.cycle(context, z_H, z_L)
        return z_H, z_L, self.q_values(z_H, z_L)

    def q_values(self, z_H: Tensor, z_L: Tensor) -> Tensor:
        state = torch.cat((z_H.mean(1), z_L.mean(1)), dim=-1) if self.config.bidirectional else z_H[:, 0]
        q: Tensor = self.q_head(state)
        return q.float()

    def logits(self, z_H: Tensor) -> Tensor:
        out: Tensor = self.lm_head(z_H)[:, self.config.prefix :]
        return out
