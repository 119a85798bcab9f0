# SPDX-License-Identifier: Apache-2.0
"""The HRM's forward pass once more, from the paper's formulas, in NumPy float64 with loops over positions and heads.

It shares nothing with sage_edge.export but the names of the weights: slow, and plain enough to be checked by eye.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from sage_edge.specs import HRMConfig

Array = npt.NDArray[np.float64]


class Reference:
    """One request at a time: `tokens` int [seq_len], `identifier` int; states are [positions, hidden]."""

    def __init__(self, config: HRMConfig, weights: Mapping[str, npt.NDArray[np.float32]]) -> None:
        self.config = config
        self.weights = {name: array.astype(np.float64) for name, array in weights.items()}

    def embed(self, tokens: npt.NDArray[np.integer], identifier: int) -> Array:
        c, w = self.config, self.weights
        rows: list[Array] = []
        if c.puzzle_emb_ndim > 0:
            blocks = math.ceil(c.puzzle_emb_ndim / c.hidden_size)
            flat = np.zeros(blocks * c.hidden_size)
            flat[: c.puzzle_emb_ndim] = w["puzzle_emb.weights"][identifier]
            for block in range(blocks):
                rows.append(flat[block * c.hidden_size : (block + 1) * c.hidden_size])
        for token in tokens:
            rows.append(w["embed_tokens.embedding_weight"][token])
        if c.pos_encodings == "learned":
            positions = w["embed_pos.embedding_weight"]
            rows = [(row + positions[i]) / math.sqrt(2) for i, row in enumerate(rows)]
        return np.stack([math.sqrt(c.hidden_size) * row for row in rows])

    def start(self) -> tuple[Array, Array]:
        positions = self.config.seq_len + math.ceil(self.config.puzzle_emb_ndim / self.config.hidden_size)
        return np.stack([self.weights["H_init"]] * positions), np.stack([self.weights["L_init"]] * positions)

    def step(self, x: Array, z_H: Array, z_L: Array) -> tuple[Array, Array, Array, Array]:
        """One ACT step: (z_H, z_L, logits [seq_len, vocab], q [2])."""
        c, w = self.config, self.weights
        two_way = c.family == "hrm-bidirectional"
        for _ in range(c.H_cycles):
            for _ in range(c.L_cycles):
                down = np.stack([self.linear("h_to_l", row) for row in z_H]) if two_way else z_H
                z_L = self.level("L_level", c.L_layers, z_L + down + x)
            up = np.stack([self.linear("l_to_h", row) for row in z_L]) if two_way else z_L
            z_H = self.level("H_level", c.H_layers, z_H + up)
        summary = np.concatenate([np.mean(z_H, 0), np.mean(z_L, 0)]) if two_way else z_H[0]
        answers = [w["lm_head.weight"] @ row for row in z_H[len(z_H) - c.seq_len :]]
        return z_H, z_L, np.stack(answers), self.linear("q_head", summary)

    def linear(self, name: str, row: Array) -> Array:
        out: Array = self.weights[f"{name}.weight"] @ row + self.weights[f"{name}.bias"]
        return out

    def level(self, name: str, layers: int, rows: Array) -> Array:
        for layer in range(layers):
            prefix = f"{name}.layers.{layer}"
            attended = self.attention(prefix, rows)
            rows = np.stack([self.norm(row + a) for row, a in zip(rows, attended, strict=True)])
            rows = np.stack([self.norm(row + self.swiglu(prefix, row)) for row in rows])
        return rows

    def norm(self, row: Array) -> Array:
        out: Array = row / math.sqrt(sum(float(v) ** 2 for v in row) / len(row) + self.config.rms_norm_eps)
        return out

    def swiglu(self, prefix: str, row: Array) -> Array:
        both = self.weights[f"{prefix}.mlp.gate_up_proj.weight"] @ row
        gate, up = both[: len(both) // 2], both[len(both) // 2 :]
        out: Array = self.weights[f"{prefix}.mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)
        return out

    def attention(self, prefix: str, rows: Array) -> list[Array]:
        c = self.config
        size = c.hidden_size // c.num_heads
        # Rows of the projection: all heads' queries, then all heads' keys, then all heads' values.
        qkv = [self.weights[f"{prefix}.self_attn.qkv_proj.weight"] @ row for row in rows]
        out = [np.zeros(c.hidden_size) for _ in rows]
        for head in range(c.num_heads):
            low, high = head * size, (head + 1) * size
            q = [self.rotate(v[low:high], i) for i, v in enumerate(qkv)]
            k = [self.rotate(v[c.hidden_size + low : c.hidden_size + high], i) for i, v in enumerate(qkv)]
            for i, query in enumerate(q):
                scores = [math.exp(float(query @ key) / math.sqrt(size)) for key in k]
                for score, v in zip(scores, qkv, strict=True):
                    out[i][low:high] += score / sum(scores) * v[2 * c.hidden_size + low : 2 * c.hidden_size + high]
        return [self.weights[f"{prefix}.self_attn.o_proj.weight"] @ row for row in out]

    def rotate(self, vector: Array, position: int) -> Array:
        """Turn each pair (i, i + half) by position * theta ** (-i / half)."""
        if self.config.pos_encodings != "rope":
            return vector
        half = len(vector) // 2
        out: Array = vector.copy()
        for i in range(half):
            angle = position * self.config.rope_theta ** (-i / half)
            out[i] = vector[i] * math.cos(angle) - vector[i + half] * math.sin(angle)
            out[i + half] = vector[i + half] * math.cos(angle) + vector[i] * math.sin(angle)
        return out
