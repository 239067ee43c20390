"""Weights and gradients for tests of master weights and 8-bit momenta: every kind of number that rounding may meet."""

from __future__ import annotations

import torch
from torch import Tensor

BF16, F32, I8, I16 = torch.bfloat16, torch.float32, torch.int8, torch.int16


def _generator(*seeds: int) -> torch.Generator:
    seed = 0
    for s in seeds:
        seed = (seed * 1_000_003 + s + 1) % 2**62
    return torch.Generator().manual_seed(seed)


def weights_of(shape: tuple[int, ...], seed: int) -> Tensor:
    """float32 weights: of many sizes, ties of the rounding to bfloat16, zeros, subnormal, huge and infinite ones."""
    generator = _generator(seed)
    w = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-12, 3, shape, generator=generator)
    kind = torch.randint(0, 24, shape, generator=generator)
    bits = w.view(torch.int32)
    w = torch.where(kind < 5, (bits & ~0xFFFF | 0x8000).view(F32), w)
    w = torch.where(kind == 5, 0.0, w)
    w = torch.where(kind == 6, -0.0, w)
    w = torch.where(kind == 7, (bits & (-0x80000000 | 0x7FFFFF)).view(F32), w)
    w = torch.where(kind == 8, 3.4e38, w)
    return torch.where((kind == 9) & (w > 1), torch.inf, w)


def gradient_of(shape: tuple[int, ...], seed: int, step: int) -> Tensor:
    """A bfloat16 gradient: of many sizes, with zeros, and from the 40th step on now and then a NaN or an infinity."""
    generator = _generator(seed, step)
    g = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-9, 2, shape, generator=generator)
    g = torch.where(torch.rand(shape, generator=generator) < 0.1, 0.0, g)
    if step >= 40 and step % 20 < 2 and g.numel():
        g.view(-1)[int(torch.randint(g.numel(), (), generator=generator))] = (torch.nan, -torch.inf)[step % 2]
    return g.to(BF16)


def rounded_half_away(w: Tensor) -> Tensor:
    """float32 weights in bfloat16: to nearest, halves away from zero, which torch's own conversion does not do."""
    w = w.detach()
    finite = ((w.view(torch.int32) + 0x8000) >> 16).to(I16).view(BF16)
    return torch.where(w.isnan(), torch.full_like(finite, torch.nan), finite)
