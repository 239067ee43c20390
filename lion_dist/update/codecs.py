"""How state is stored in fewer bits: the definitions that every kernel must match bit for bit.

Master weight: the float32 number that a bfloat16 parameter and its int16 *remainder* are together.
8-bit momentum: int8 codes, and one float32 scale for each block of BLOCK consecutive elements of a parameter, in memory
    order. A momentum is its code's level times the scale of its block.

[Note: Levels] Code k in [0, 127] has the level w - 1, where w is the k-th float, from 1 on, that has MANTISSA fraction
bits. Levels are 1/16 apart near 0, and 3 to 6 % apart near the largest, 247. Code -k has the negative level. Numbers
between two levels are linear in the bits of w, so an integer addition to these bits rounds without a bias.

[Note: Scales] A scale has at most SCALE_BITS significant bits and a level at most 8, so their product is exact. A scale
is rounded down, its inverse up where the last level would otherwise come out below LAST_W, and elements above the last
level are cut to it. So the largest element of a block always has code 127 or -127 (unless the scale is SMALLEST_SCALE),
from which the scale can be computed again: decoding and encoding again gives the same codes and scales.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 128  # elements that share a scale
NAN_CODE = -128
MANTISSA = 4
FRACTION = 23 - MANTISSA  # bits of a float32 behind the MANTISSA bits: the part that is rounded away
ONE_BITS = 0x3F800000  # of 1.0
LAST_W = 248.0  # w of code 127
LARGEST_LEVEL = LAST_W - 1
SCALE_BITS = 16
SCALE_MASK = -1 << (24 - SCALE_BITS)  # of a float32's bits
SMALLEST_SCALE = 2.0**-126  # the smallest number of full precision

# Dither: element i of a parameter is rounded up if its fraction exceeds a number that is uniform in [0, 1): i times
# GOLDEN plus the step's seed, modulo 2**32. Seeds of different steps are independent; within a step the numbers of
# neighbours are spread evenly.
GOLDEN = 0x61C88647  # 2**32 less 2**32 / golden ratio
NEAREST = None  # in place of a seed


def seed_of(step: int) -> int:
    """The seed of a step: a hash of its number, in [0, 2**32)."""
    x = (step + 1) * 0x9E3779B97F4A7C15 & (1 << 64) - 1  # splitmix64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    x = (x ^ x >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
    return (x ^ x >> 31) >> 32


# Master weights -------------------------------------------------------------------------------------


def join(p: Tensor, remainder: Tensor) -> Tensor:
    """The master weights of bfloat16 parameters and int16 remainders of one shape: float32.

    Their bits are those of p, shifted left by 16, plus the remainder. A zero whose remainder is negative has been
    written by other code, since no master weight is split so; its remainder counts as 0.
    """
    bits, r = p.view(torch.int16).int(), remainder.int()
    r = torch.where(((bits & 0x7FFF) == 0) & (r < 0), 0, r)
    return ((bits << 16) + r).view(torch.float32)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 parameters and int16 remainders of float32 master weights, of one shape.

    The parameter is the master weight rounded to nearest, halves away from zero. `join` gives every number and infinity
    back, and NaN in its canonical form.
    """
    bits = torch.where(master == master, master, math.nan).view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


# 8-bit momentum -------------------------------------------------------------------------------------


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """Momenta of codes.

    Args:
        codes: int8, shape (n,).
        scale: float32, shape (ceil(n / BLOCK),).

    Returns:
        float32, shape (n,): exact, and NaN where the code is NAN_CODE.
    """
    k = codes.int()
    level = ((k.abs() << FRACTION) + ONE_BITS).view(torch.float32) - 1
    m = torch.where(k < 0, -level, level) * scale.repeat_interleave(BLOCK)[: codes.numel()]
    return torch.where(k == NAN_CODE, math.nan, m)  # last: a GPU's product of NaN has other bits


def encode(
    m: Tensor, is_number: Tensor | None = None, seed: Tensor | None = NEAREST, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Codes of momenta.

    Args:
        m: float32, shape (n,).
        is_number: bool, shape (n,): where it does not hold, the code is NAN_CODE. None: where m is not finite.
        seed: of the step, int64, shape (), for stochastic rounding; None: to nearest, halves up.
        first: index in its parameter of the first element, a multiple of BLOCK.

    Returns:
        Codes, int8, shape (n,), and scales, float32, shape (ceil(n / BLOCK),).
    """
    n = m.numel()
    if is_number is None:
        is_number = m.abs() < math.inf
    size = torch.where(is_number, m.abs(), 0.0)
    blocks = torch.nn.functional.pad(size, (0, -n % BLOCK)).view(-1, BLOCK)
    largest = blocks.amax(1)
    # On GPUs torch multiplies by the reciprocal of a Python number, which rounds twice; by a tensor it divides.
    levels = torch.full((), LARGEST_LEVEL, dtype=torch.float32, device=m.device)
    scale = ((largest / levels).view(torch.int32) & SCALE_MASK).view(torch.float32)
    scale = torch.where(largest > 0, scale.clamp(min=SMALLEST_SCALE), 0.0)
    inverse = 1 / scale
    short = LARGEST_LEVEL * scale * inverse + 1 < LAST_W
    inverse = torch.where(largest > 0, (inverse.view(torch.int32) + short.int()).view(torch.float32), 0.0)
    w = ((blocks * inverse[:, None]) + 1).clamp(max=LAST_W).view(-1)[:n]
    if seed is None:
        dither: Tensor | int = 1 << (FRACTION - 1)
    else:
        index = torch.arange(first, first + n, device=m.device) & 0xFFFFFFFF
        dither = ((index * GOLDEN + seed & 0xFFFFFFFF) >> (32 - FRACTION)).int()
    k = ((w.view(torch.int32) + dither) >> FRACTION) - (ONE_BITS >> FRACTION)
    k = torch.where(m < 0, -k, k)
    return torch.where(is_number, k, NAN_CODE).to(torch.int8), scale
