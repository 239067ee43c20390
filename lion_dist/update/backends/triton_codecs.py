"""codecs.py for Triton kernels: master weights and 8-bit momenta in registers, bit for bit.

A block of momenta is an axis, or several, of a tensor; scales are broadcast along it by the caller.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import codecs
from .triton_common import FIRST_COLUMN, NAN_FLOAT32, SEED_COLUMN

SCALE_BLOCK = tl.constexpr(codecs.BLOCK)
_NAN_CODE, _FRACTION, _ONE_BITS = (
    tl.constexpr(codecs.NAN_CODE),
    tl.constexpr(codecs.FRACTION),
    tl.constexpr(codecs.ONE_BITS),
)
_LAST_W, _LARGEST_LEVEL = tl.constexpr(codecs.LAST_W), tl.constexpr(codecs.LARGEST_LEVEL)
_OF_LARGEST = tl.constexpr(torch.tensor(1 / codecs.LARGEST_LEVEL, dtype=torch.float32, device="cpu").item())
_SCALE_MASK, _SMALLEST_SCALE = tl.constexpr(codecs.SCALE_MASK), tl.constexpr(codecs.SMALLEST_SCALE)
_GOLDEN = tl.constexpr(codecs.GOLDEN)
# A level's bits are raised by RAISE in its exponent, so that the code behind the last, which is NaN's, is infinity.
_RAISE = tl.constexpr(120)
_RAISED_ONE_BITS = tl.constexpr(codecs.ONE_BITS + (120 << 23))
_LOWER = tl.constexpr(2.0**-120)


@triton.jit
def first_random(row, hyper):
    """The number, uint32, that rounds a segment's first element in a step.

    Args:
        row: pointer to the segment's row of the table.
        hyper: pointer to the hyper-parameters of the segment.
    """
    seed = tl.load(hyper + SEED_COLUMN).to(tl.int64).to(tl.uint32)
    return tl.load(row + FIRST_COLUMN).to(tl.uint32) * _GOLDEN + seed


@triton.jit
def later_random(elements):
    """What the numbers that round elements are more than that of the element so many before them."""
    return elements.to(tl.uint32) * _GOLDEN


@triton.jit
def random_bits(row, start, offsets, hyper):
    """The numbers, uint32, that round a segment's elements in a step.

    Args:
        row, hyper: as for `first_random`.
        start, offsets: the elements' indices in the segment are their sum.
    """
    return (first_random(row, hyper) + later_random(start)) + later_random(offsets)


@triton.jit
def join(p, remainder):
    """codecs.join: float32 master weights of bfloat16 parameters and int16 remainders."""
    bits = p.to(tl.int16, bitcast=True).to(tl.int32)
    r = remainder.to(tl.int32)
    r = tl.where(((bits & 0x7FFF) == 0) & (r < 0), 0, r)
    return ((bits << 16) + r).to(tl.float32, bitcast=True)


@triton.jit
def store_split(p_pointer, remainder_pointer, master, mask, NUMBERS: tl.constexpr = False):
    """Stores codecs.split of float32 master weights. ``NUMBERS``: none is NaN."""
    bits = master.to(tl.int32, bitcast=True)
    if not NUMBERS:
        bits = tl.where(master == master, bits, NAN_FLOAT32)
    high = ((bits + 0x8000) >> 16).to(tl.int16)
    tl.store(p_pointer, high.to(tl.bfloat16, bitcast=True), mask=mask)
    tl.store(remainder_pointer, bits.to(tl.int16), mask=mask)  # the low half: high << 16 has none


@triton.jit
def decode(codes, scale):
    """codecs.decode, but where the code is NaN's the momentum is infinite or NaN."""
    k = codes.to(tl.int32)
    raised = ((tl.abs(k) << _FRACTION) + _RAISED_ONE_BITS).to(tl.float32, bitcast=True)
    level = tl.fma(raised, _LOWER, -1.0)  # exact
    level = (level.to(tl.int32, bitcast=True) | (k & -0x80000000)).to(tl.float32, bitcast=True)
    return level * scale


@triton.jit
def scales(largest):
    """Scales of blocks whose largest momenta these are, and their inverses, which are 0 where the scale is. The largest
    is NaN where a block has no number: it counts as 0."""
    # Both quotients are those of a division that rounds once, in a third of its instructions.
    quotient = largest * _OF_LARGEST
    quotient = tl.fma(tl.fma(-quotient, _LARGEST_LEVEL, largest), _OF_LARGEST, quotient)
    scale = (quotient.to(tl.int32, bitcast=True) & _SCALE_MASK).to(tl.float32, bitcast=True)
    scale = tl.where(largest > 0, tl.maximum(scale, _SMALLEST_SCALE), 0.0)
    inverse = 1.0 / scale
    inverse = tl.fma(tl.fma(-inverse, scale, 1.0), inverse, inverse)
    short = scale * _LARGEST_LEVEL * inverse + 1.0 < _LAST_W
    inverse = (inverse.to(tl.int32, bitcast=True) + short.to(tl.int32)).to(tl.float32, bitcast=True)
    return scale, tl.where(largest > 0, inverse, 0.0)


@triton.jit
def encode(m, inverse, random, NUMBERS: tl.constexpr = False):
    """The codes of codecs.encode.

    [Note: Twice w] The low byte of the bits of 2 * w, without its last FRACTION bits, is the code.

    Args:
        m: float32, NaN where the code is to be NaN's.
        inverse: twice that of the block's scale, broadcast to m.
        random: see `random_bits`.
        NUMBERS: none is NaN.
    """
    w = tl.abs(m) * inverse + 2.0
    bits = tl.minimum(w, 2 * _LAST_W).to(tl.int32, bitcast=True) | (m.to(tl.int32, bitcast=True) & -0x80000000)
    dither = (random >> (32 - _FRACTION)).to(tl.int32, bitcast=True)
    # Where the sign bit is set this is a multiple of 256 less the code's size.
    k = tl.abs((bits + dither) >> _FRACTION)
    if NUMBERS:
        return k.to(tl.int8)
    # Of m itself the comparison could be made before the inverse is known, and would occupy predicate registers.
    return tl.where(w == w, k, _NAN_CODE).to(tl.int8)
