"""The rule with an 8-bit momentum as a Triton kernel over a segment table; equal to reference.py bit for bit.

With 8 bits so little memory moves that the arithmetic counts. So a program steps several blocks, and finds its segment
and derives the scalars once for all of them. It reads a block ahead of the one that it works on. Whether all numbers
are finite, as they are while training goes well, is asked once for a block and not for each element. Blocks that are
not whole, not aligned or not finite take `step_block`.

Tensors have three axes: runs of elements that share a scale, parts of a run, and the elements of a part, which belong
to one thread.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_block import step_block
from .triton_codecs import SCALE_BLOCK, decode, encode, first_random, join, later_random, scales, store_split
from .triton_common import (
    EXP_AVG_COLUMN,
    GROUP_COLUMN,
    HYPERS_WIDTH,
    INFINITY_BITS,
    LR_COLUMN,
    PARAM_COLUMN,
    TILE_SIZE,
    decay_of,
    elements,
    find_block,
    mix,
    rates,
)  # fmt: skip


@triton.jit
def _offsets(RUNS: tl.constexpr, RUN: tl.constexpr, PART: tl.constexpr):
    """Indices of the elements of RUNS runs of RUN elements, in parts of PART."""
    runs, parts = tl.arange(0, RUNS), tl.arange(0, RUN // PART)
    return runs[:, None, None] * RUN + parts[None, :, None] * PART + tl.arange(0, PART)[None, None, :]


@triton.jit
def _read(
    p_address, g_address, m_address, r_address, s_address, start, mask,
    P: tl.constexpr, G: tl.constexpr, REMAINDER: tl.constexpr, RUNS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """A block's parameters, gradients, codes, remainders (parameters, if there are none) and scales. bfloat16 comes in
    pairs, int32, which become float32 in one instruction an element."""
    offsets = _offsets(RUNS, SCALE_BLOCK, PART)
    pairs = _offsets(RUNS, SCALE_BLOCK // 2, PART // 2)
    if tl.bfloat16 == G:
        g = tl.load(elements(g_address, tl.int32, start // 2, pairs, 16), mask=mask)
    else:
        g = tl.load(elements(g_address, G, start, offsets, 16), mask=mask)
    m = tl.load(elements(m_address, tl.int8, start, offsets, PART), mask=mask)
    if (tl.bfloat16 == P) & (REMAINDER is None):
        p = tl.load(elements(p_address, tl.int32, start // 2, pairs, 16), mask=mask)
    else:
        p = tl.load(elements(p_address, P, start, offsets, 16), mask=mask)
    r = p
    if REMAINDER is not None:
        r = tl.load(elements(r_address, tl.int16, start, offsets, 16), mask=mask)
    scale = tl.load(elements(s_address, tl.float32, start // SCALE_BLOCK, tl.arange(0, RUNS), 4), mask=mask)
    return p, g, m, r, scale


@triton.jit
def _widened(x, DTYPE: tl.constexpr, RUNS: tl.constexpr, PART: tl.constexpr):
    if tl.bfloat16 == DTYPE:
        pairs = tl.join(x << 16, x & -0x10000).to(tl.float32, bitcast=True)
        wide = tl.reshape(pairs, (RUNS, SCALE_BLOCK // PART, PART))
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def _step_finite(
    p_address, m_address, r_address, s_address, start, p, g, m, r, scale, scalars, lr, decay, random, grad_scale,
    P: tl.constexpr, G: tl.constexpr, REMAINDER: tl.constexpr, RUNS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Steps a block that has been read and writes it, if all numbers are finite, before and after the step.

    Returns:
        Whether they are; otherwise nothing has been written.
    """
    m = decode(m, scale[:, None, None])
    c, m = mix(_widened(g, G, RUNS, PART), m, scalars, grad_scale)
    p = _widened(p, P, RUNS, PART) if REMAINDER is None else join(p, r)
    # lr times a sign is exact, so that the sum is rounded as in reference.parameter_rule.
    p = tl.fma((c > 0).to(tl.float32) - (c < 0).to(tl.float32), -lr, p * decay)
    # x * 0 is 0 where x is finite, else NaN, whose bits are more than infinity's.
    size = tl.abs(m) + tl.fma(p, 0.0, c * 0.0)
    bits = size.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # a NaN may have a sign
    largest = tl.max(tl.max(bits, axis=2), axis=1)
    finite = tl.max(largest, axis=0) < INFINITY_BITS
    if finite:
        offsets = _offsets(RUNS, SCALE_BLOCK, PART)
        if lr != 0:
            p_pointer = elements(p_address, P, start, offsets, 16)
            if REMAINDER is None:
                tl.store(p_pointer, p.to(P))
            else:
                store_split(p_pointer, elements(r_address, tl.int16, start, offsets, 16), p, None, NUMBERS=True)
        scale, inverse = scales(largest.to(tl.float32, bitcast=True))
        # Summed so that all but one addition is made for many elements at once.
        of_runs = random + later_random(start) + later_random(tl.arange(0, RUNS) * SCALE_BLOCK)
        of_parts = of_runs[:, None] + later_random(tl.arange(0, SCALE_BLOCK // PART) * PART)[None, :]
        of_elements = of_parts[:, :, None] + later_random(tl.arange(0, PART))[None, None, :]
        code = encode(m, (inverse * 2.0)[:, None, None], of_elements, NUMBERS=True)
        tl.store(elements(m_address, tl.int8, start, offsets, PART), code)
        tl.store(elements(s_address, tl.float32, start // SCALE_BLOCK, tl.arange(0, RUNS), 4), scale)
    return finite


@triton.jit
def lion_kernel_int8(
    rows, tile_segments, grad_addresses, active, hypers, grad_scale,
    P: tl.constexpr, G: tl.constexpr, SCALE: tl.constexpr, REMAINDER: tl.constexpr, ROW: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The kernel; columns and constants as for `step_block`, BLOCKS: number of blocks of a program."""
    PARTS_OF_TILE: tl.constexpr = TILE_SIZE // (BLOCK * BLOCKS)
    RUNS: tl.constexpr = BLOCK // SCALE_BLOCK
    # As many elements as 16 bytes of the widest tensor hold: were they more or fewer, threads would exchange elements.
    PART: tl.constexpr = 128 // max(P.primitive_bitwidth, G.primitive_bitwidth)
    program = tl.program_id(0)
    tile, part = program // PARTS_OF_TILE, program % PARTS_OF_TILE
    segment, row, first, length, takes_part = find_block(rows, tile_segments, tile, part, active, ROW, BLOCK * BLOCKS)
    p_address, m_address = tl.load(row + PARAM_COLUMN), tl.load(row + EXP_AVG_COLUMN)
    s_address = tl.load(row + SCALE)
    r_address = p_address if REMAINDER is None else tl.load(row + REMAINDER)
    g_address = tl.load(grad_addresses + segment)
    group = tl.load(row + GROUP_COLUMN)
    if takes_part & (g_address != 0):
        hyper = hypers + group * HYPERS_WIDTH
        aligned = ((p_address | g_address | m_address | r_address) % 16) == 0
        whole = aligned & (first + BLOCK <= length)
        p, g, m, r, scale = _read(
            p_address, g_address, m_address, r_address, s_address, first, whole, P, G, REMAINDER, RUNS, PART
        )
        scalars = rates(hyper, grad_scale)
        lr64 = tl.load(hyper + LR_COLUMN)
        lr, decay = lr64.to(tl.float32), decay_of(lr64, hyper)
        random = first_random(row, hyper)
        for i in tl.range(BLOCKS, num_stages=1):
            start = first + i * BLOCK
            next_whole = aligned & (i + 1 < BLOCKS) & (start + 2 * BLOCK <= length)
            next_p, next_g, next_m, next_r, next_scale = _read(
                p_address, g_address, m_address, r_address, s_address, start + BLOCK, next_whole,
                P, G, REMAINDER, RUNS, PART,
            )  # fmt: skip
            done = start >= length
            if whole:
                done = _step_finite(
                    p_address, m_address, r_address, s_address, start, p, g, m, r, scale, scalars, lr, decay, random,
                    grad_scale, P, G, REMAINDER, RUNS, PART,
                )  # fmt: skip
            if not done:
                # A run at a time, since the registers that this rare path takes would be missing in the other.
                for j in tl.range(RUNS):
                    run = start + j * SCALE_BLOCK
                    if run < length:
                        step_block(
                            row, p_address, g_address, m_address, r_address, run, length, hyper, grad_scale,
                            P, G, tl.int8, SCALE, REMAINDER, SCALE_BLOCK,
                            WHOLE=False, ALIGNED=False, GRAD_ALIGNED=False,
                        )  # fmt: skip
            p, g, m, r, scale, whole = next_p, next_g, next_m, next_r, next_scale, next_whole
