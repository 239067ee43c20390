"""A Llama-shaped language model for the benchmarks.

With the defaults, which are those of Llama 3.2 1B except for a vocabulary of 32,000, it has 1,038,682,112 parameters in
146 tensors; the 33 gains of norms do not decay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Llama:
    """Sizes. A query has width / heads elements; there are kv_heads heads of keys and values."""

    vocabulary: int = 32000
    layers: int = 16
    width: int = 2048
    heads: int = 32
    kv_heads: int = 8
    ffn: int = 8192
    seq_len: int = 1024


class Block(nn.Module):
    def __init__(self, c: Llama) -> None:
        super().__init__()
        self.head = c.width // c.heads
        kv = c.kv_heads * self.head
        self.attention_norm = nn.RMSNorm(c.width)
        self.query = nn.Linear(c.width, c.width, bias=False)
        self.key = nn.Linear(c.width, kv, bias=False)
        self.value = nn.Linear(c.width, kv, bias=False)
        self.output = nn.Linear(c.width, c.width, bias=False)
        self.ffn_norm = nn.RMSNorm(c.width)
        self.gate = nn.Linear(c.width, c.ffn, bias=False)
        self.up = nn.Linear(c.width, c.ffn, bias=False)
        self.down = nn.Linear(c.ffn, c.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape

        def heads(t: Tensor) -> Tensor:
            return t.view(batch, length, -1, self.head).transpose(1, 2)

        y = self.attention_norm(x)
        q, k, v = heads(self.query(y)), heads(self.key(y)), heads(self.value(y))
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=True)
        x = x + self.output(y.transpose(1, 2).reshape(batch, length, -1))
        y = self.ffn_norm(x)
        mixed: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return mixed


def rotate(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of queries or keys, shape (batch, heads, length, head size)."""
    a, b = t.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class LanguageModel(nn.Module):
    """``forward`` takes tokens, shape (batch, seq_len), and returns the mean loss of predicting each token from those
    before it."""

    def __init__(self, c: Llama) -> None:
        super().__init__()
        self.embedding = nn.Embedding(c.vocabulary, c.width)  # the output layer's weight too
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.width)
        half = c.width // c.heads // 2
        angles = torch.outer(torch.arange(c.seq_len), 10000.0 ** -(torch.arange(half) / half))
        self.register_buffer("cos", angles.cos().bfloat16(), persistent=False)
        self.register_buffer("sin", angles.sin().bfloat16(), persistent=False)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.norm(x[:, :-1]), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups: matrices decay, gains do not."""
        params = list(self.parameters())
        return [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
        ]
