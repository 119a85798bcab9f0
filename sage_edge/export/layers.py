"""The building blocks of the HRM families, in torch.

Names of parameters are those of the original code (sapientinc/HRM), so that its checkpoints load by key.
Attention is written out (scale on Q, MatMul, Softmax, MatMul) because that is the form that the TensorRT parser
fuses and that the ONNX graphs must show; see DESIGN.md, "Precision lives in the ONNX graph".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least `value`."""
    return -(value // -multiple) * multiple


def swiglu_width(hidden_size: int, expansion: float) -> int:
    """Inner width of SwiGLU: two thirds of `expansion * hidden_size`, rounded up to 256 (original code)."""
    return round_up(round(expansion * hidden_size * 2 / 3), 256)


def truncated_normal_(tensor: Tensor, std: float) -> Tensor:
    """Fill in place with a normal truncated at two sigma whose standard deviation after truncation is `std`."""
    if std == 0:
        return nn.init.zeros_(tensor)
    # A normal cut at +-2 sigma has a standard deviation of 0.8796; divide so that `std` is what comes out.
    return nn.init.trunc_normal_(tensor, std=std / 0.87962566, a=-2 * std / 0.87962566, b=2 * std / 0.87962566)


class Linear(nn.Linear):
    """nn.Linear with the original initialisation: truncated LeCun normal, zero bias."""

    def reset_parameters(self) -> None:
        truncated_normal_(self.weight, self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Module):
    """Table [num, dim]; the parameter is called `embedding_weight` as in the original checkpoints."""

    def __init__(self, num: int, dim: int, std: float) -> None:
        super().__init__()
        self.embedding_weight = nn.Parameter(truncated_normal_(torch.empty(num, dim), std))

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.embedding_weight)


class PuzzleEmbedding(nn.Module):
    """Table [num_puzzle_identifiers, puzzle_emb_ndim], zero at the start; a buffer called `weights` in the original."""

    def __init__(self, num: int, dim: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(num, dim))

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weights)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, without a gain, in float32."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class Rotary(nn.Module):
    """Tables cos and sin [positions, head_dim] of rotary position embedding (arXiv 2104.09864), half-rotated form."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, positions: int, theta: float) -> None:
        super().__init__()
        frequency = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        angle = torch.outer(torch.arange(positions, dtype=torch.float32), frequency)
        angle = torch.cat((angle, angle), dim=-1)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate x [slots, heads, positions, head_dim]; fewer positions than the tables have are the first ones."""
        cos, sin = self.cos, self.sin
        if x.shape[-2] != len(cos):
            cos, sin = cos[: x.shape[-2]], sin[: x.shape[-2]]
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-high, low), dim=-1) * sin


class Attention(nn.Module):
    """Bidirectional multi-head self-attention over [slots, positions, hidden]."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.qkv_proj = Linear(hidden_size, 3 * hidden_size, bias=False)
        self.o_proj = Linear(hidden_size, hidden_size, bias=False)

    def weights(self, x: Tensor, rotary: Rotary | None, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attention weights [slots, heads, positions, positions], rows summing to 1, and values [.., head_dim].

        bias is added to the scores and must broadcast to them: padding gets a large negative number.
        """
        slots, positions, _ = x.shape
        q, k, v = (
            part.view(slots, positions, self.num_heads, self.head_dim).transpose(1, 2)
            for part in self.qkv_proj(x).chunk(3, dim=-1)
        )
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        scores = (q * self.head_dim**-0.5) @ k.transpose(-1, -2)
        return torch.softmax(scores if bias is None else scores + bias, dim=-1), v

    def forward(self, x: Tensor, rotary: Rotary | None, bias: Tensor | None = None) -> Tensor:
        weight, v = self.weights(x, rotary, bias)
        out: Tensor = self.o_proj((weight @ v).transpose(1, 2).reshape(x.shape))
        return out


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), arXiv 2002.05202."""

    def __init__(self, hidden_size: int, expansion: float) -> None:
        super().__init__()
        width = swiglu_width(hidden_size, expansion)
        self.gate_up_proj = Linear(hidden_size, 2 * width, bias=False)
        self.down_proj = Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(F.silu(gate) * up)
        return out


class Block(nn.Module):
    """Post-norm transformer block: norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, hidden_size: int, num_heads: int, expansion: float, eps: float) -> None:
        super().__init__()
        self.self_attn = Attention(hidden_size, num_heads)
        self.mlp = SwiGLU(hidden_size, expansion)
        self.eps = eps

    def forward(self, x: Tensor, rotary: Rotary | None, bias: Tensor | None = None) -> Tensor:
        x = rms_norm(x + self.self_attn(x, rotary, bias), self.eps)
        return rms_norm(x + self.mlp(x), self.eps)


class ReasoningModule(nn.Module):
    """A stack of blocks whose input is the state plus an injection."""

    def __init__(self, layers: Sequence[Block]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, state: Tensor, injection: Tensor, rotary: Rotary | None, bias: Tensor | None = None) -> Tensor:
        x = state + injection
        for layer in self.layers:
            x = layer(x, rotary, bias)
        return x
