"""Parts that the Triton kernels share: dtypes, constants, and functions that kernels call."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..reference import BETA1, BETA2, GRAD_SIGN, HYPER_COLUMNS, LR, NAN_BITS, OVERFLOW, SEED, WEIGHT_DECAY
from ..segments import ENTRY, FIRST, GROUP, LENGTH, PARAM, STATE, TILE, TILE_0

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
}

# Module constants that a kernel reads must be constexpr.
TILE_SIZE = tl.constexpr(TILE)
PARAM_COLUMN, LENGTH_COLUMN, GROUP_COLUMN = tl.constexpr(PARAM), tl.constexpr(LENGTH), tl.constexpr(GROUP)
TILE_0_COLUMN, _ENTRY, FIRST_COLUMN = tl.constexpr(TILE_0), tl.constexpr(ENTRY), tl.constexpr(FIRST)
EXP_AVG_COLUMN = tl.constexpr(STATE)  # the momentum is the first state column
HYPERS_WIDTH = tl.constexpr(HYPER_COLUMNS)
LR_COLUMN, _WEIGHT_DECAY, _GRAD_SIGN = tl.constexpr(LR), tl.constexpr(WEIGHT_DECAY), tl.constexpr(GRAD_SIGN)
_BETA1, _BETA2, SEED_COLUMN = tl.constexpr(BETA1), tl.constexpr(BETA2), tl.constexpr(SEED)
NAN_FLOAT32 = tl.constexpr(NAN_BITS[torch.float32][1])
_NAN_BFLOAT16 = tl.constexpr(NAN_BITS[torch.bfloat16][1])
_NAN_FLOAT16 = tl.constexpr(NAN_BITS[torch.float16][1])
INFINITY = tl.constexpr(OVERFLOW[torch.float32])
INFINITY_BITS = tl.constexpr(0x7F800000)  # of float32
# The product of a float32 and this number is infinite just where the float32 rounds to infinity in bfloat16.
_TO_INFINITY_BFLOAT16 = tl.constexpr(float.fromhex("0x1.00804p+0"))
_OVERFLOW_FLOAT16 = tl.constexpr(OVERFLOW[torch.float16])


@triton.jit
def find_block(rows, tile_segments, tile, block, active, ROW: tl.constexpr, BLOCK: tl.constexpr):
    """Finds the block that a program works on.

    Args:
        tile: its number in the table.
        block: its number in the tile.
        ROW: number of columns of the table's rows.

    Returns:
        The number of the segment, a pointer to its row, the index of the block's first element in the segment, the
        length of the segment, and whether the block has elements that take part in the step.
    """
    segment = tl.load(tile_segments + tile)
    row = rows + segment.to(tl.int64) * ROW
    length = tl.load(row + LENGTH_COLUMN)
    start = (tile - tl.load(row + TILE_0_COLUMN)) * TILE_SIZE + block * BLOCK
    takes_part = start < length
    if active is not None:
        takes_part = takes_part & (tl.load(active + tl.load(row + _ENTRY)) != 0)
    return segment, row, start, length, takes_part


@triton.jit
def store_rounded(pointer, x, is_number, mask, DTYPE: tl.constexpr):
    """Rounds float32 x to DTYPE and stores it. Where ``is_number`` does not hold, it stores NaN in its canonical form,
    reference.NAN_BITS."""
    if tl.float32 == DTYPE:
        bits = tl.where(is_number, x.to(tl.int32, bitcast=True), NAN_FLOAT32)
    elif tl.bfloat16 == DTYPE:
        bits = tl.where(is_number, x.to(tl.bfloat16).to(tl.int16, bitcast=True), _NAN_BFLOAT16).to(tl.int16)
    else:
        bits = tl.where(is_number, x.to(tl.float16).to(tl.int16, bitcast=True), _NAN_FLOAT16).to(tl.int16)
    tl.store(pointer, bits.to(DTYPE, bitcast=True), mask=mask)


@triton.jit
def rates(hyper, grad_scale):
    """The scalars of `mix`, float32: beta1, what multiplies the gradient in c, beta2, what multiplies it in the new
    momentum, and what multiplies it first where there is a ``grad_scale``."""
    # Scalars are derived from float64 and rounded once, as in reference.scalars.
    beta1, beta2 = tl.load(hyper + _BETA1), tl.load(hyper + _BETA2)
    sign = tl.load(hyper + _GRAD_SIGN).to(tl.float32)
    of_g1, of_g2 = (1.0 - beta1).to(tl.float32), (1.0 - beta2).to(tl.float32)
    if grad_scale is None:
        # A sign is exact wherever it is multiplied in, and here that costs nothing an element.
        of_g1, of_g2 = of_g1 * sign, of_g2 * sign
    else:
        sign *= tl.load(grad_scale)
    return beta1.to(tl.float32), of_g1, beta2.to(tl.float32), of_g2, sign


@triton.jit
def mix(g, m, scalars, grad_scale):
    """c and the new momentum of reference.momentum_rule, float32, before anything is asked about what is not finite."""
    g, m = g.to(tl.float32), m.to(tl.float32)
    if grad_scale is not None:
        g = g * scalars[4]
    return scalars[0] * m + scalars[1] * g, scalars[2] * m + scalars[3] * g


@triton.jit
def blend(g, m, scalars, grad_scale, M: tl.constexpr):
    """reference.blend: c and the new momentum, both float32. Where c or the momentum rounded to M is not finite, the
    returned c is NaN or infinite, and NaN must be stored for parameter and momentum. ``scalars``: those of `rates`.
    Where M is int8, m is decoded."""
    c, m = mix(g, m, scalars, grad_scale)
    # x * 0 is 0 where x is finite, else NaN. A comparison and a selection would go to the busier half of the units.
    if (tl.float32 == M) | (tl.int8 == M):
        c = tl.fma(m, 0.0, c)
    elif tl.bfloat16 == M:
        c = tl.fma(m * _TO_INFINITY_BFLOAT16, 0.0, c)
    else:
        c = tl.where(tl.abs(m) < _OVERFLOW_FLOAT16, c, float("nan"))
    return c, m


@triton.jit
def decay_of(lr64, hyper):
    """The float32 that decay multiplies a parameter by."""
    return (1.0 - lr64 * tl.load(hyper + _WEIGHT_DECAY)).to(tl.float32)


@triton.jit
def moved(p, change, decay):
    """reference.parameter_rule, in float32; ``decay`` is that of `decay_of`."""
    return p.to(tl.float32) * decay - change


@triton.jit
def elements(address, DTYPE: tl.constexpr, start, offsets, HINT: tl.constexpr):
    """Pointers to elements of a run of memory.

    Args:
        address: of the run's first element.
        start, offsets: the elements' indices in the run are their sum.
        HINT: number that the address is a multiple of. It is what lets a 16-byte access be made of an address that came
            from memory.
    """
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), HINT) + start + offsets
