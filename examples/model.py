"""A small GPT over bytes.

Terms: a *token* is one byte (0 to 255), a *position* its place in the sequence, *width* the size of the residual
stream, a *head* one of the equal slices of it that attention works on. Shapes: B sequences, T positions, C width,
H heads, D = C / H.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT; `seq_len` is the longest sequence it reads."""

    layers: int
    width: int
    heads: int
    seq_len: int

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width must be a multiple of 2 * heads (rotary embeddings turn pairs), got width={self.width} and "
                f"heads={self.heads}: try width={2 * self.heads * max(1, self.width // (2 * self.heads))}"
            )


class Attention(nn.Module):
    """Causal self-attention with rotary position embeddings."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).reshape(B, T, C))
        return out


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each behind a norm and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        hidden = F.gelu(self.up(self.mlp_norm(x)), approximate="tanh")
        out: Tensor = x + self.down(hidden)
        return out


class GPT(nn.Module):
    """Bytes in, logits of the next byte out: (B, T) integers to (B, T, 256)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        cos, sin = rotary_table(config.seq_len, config.width // config.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        std = (2 / (5 * self.config.width)) ** 0.5  # "small init", arXiv 1910.05895
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)  # well above what the first blocks add; 0.02 learnt more slowly
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, Block):  # after its linears: 2 * layers branches add up in the residual stream
            for linear in (module.attention.out, module.down):
                nn.init.normal_(linear.weight, std=std / (2 * self.config.layers) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        T = tokens.shape[1]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        logits: Tensor = self.head(self.norm(x))
        return logits

    @torch.no_grad()
    def generate(self, prompt: bytes, count: int, *, seed: int, temperature: float = 0.8) -> bytes:
        """Continue `prompt` by `count` sampled bytes.

        Every byte reads the whole window again: a cache of keys and values would be more code than a short sample
        at the end of a run is worth. Sampling is on the CPU, so a seed means the same on every device.
        """
        generator = torch.Generator().manual_seed(seed)
        tokens = list(prompt)
        for _ in range(count):
            window = torch.tensor([tokens[-self.config.seq_len :]], device=self.head.weight.device)
            logits = self(window)[0, -1].float().cpu()
            tokens.append(int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator)))
        return bytes(tokens)


def rotary_table(seq_len: int, head_width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (T, D / 2) each, of the angles by which a head's pairs are turned at each position."""
    frequencies = 10_000.0 ** -(torch.arange(0, head_width, 2) / head_width)
    angles = torch.outer(torch.arange(seq_len).float(), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) of a head, (..., T, D), by its position's angle (arXiv 2104.09864)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)
