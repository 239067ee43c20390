"""One block of a step in Triton, of any mix of dtypes; equal to reference.py bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_codecs import SCALE_BLOCK, decode, encode, join, random_bits, scales, store_split
from .triton_common import LR_COLUMN, blend, decay_of, elements, moved, rates, store_rounded


@triton.jit
def step_block(
    row, p_address, g_address, m_address, r_address, start, length, hyper, grad_scale,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, SCALE: tl.constexpr, REMAINDER: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, ALIGNED: tl.constexpr, GRAD_ALIGNED: tl.constexpr,
):  # fmt: skip
    """Steps the elements from ``start`` on, up to BLOCK of them, as many as there are.

    Args:
        row, length: as of `find_block`.
        p_address, g_address, m_address, r_address: of the segment's first elements.
        hyper: pointer to the hyper-parameters of the segment.
        SCALE, REMAINDER: columns of the row; None where the momentum has none, or the parameter.
        BLOCK: of an 8-bit momentum a multiple of SCALE_BLOCK, which ``start`` is too.
        WHOLE: whether there are BLOCK elements.
        ALIGNED: whether those of the parameter and of its state begin at multiples of 16 bytes; with WHOLE alone, and
            without an 8-bit momentum.
        GRAD_ALIGNED: the same of the gradient.
    """
    tl.static_assert((WHOLE and SCALE is None) or not (ALIGNED or GRAD_ALIGNED))
    # Bytes that a thread reads of a tensor at once.
    AT_ONCE: tl.constexpr = 16 if ALIGNED else 1
    GRAD_AT_ONCE: tl.constexpr = 16 if GRAD_ALIGNED else 1
    if SCALE is None:
        offsets = tl.arange(0, BLOCK)
    else:
        blocks = tl.arange(0, BLOCK // SCALE_BLOCK)
        offsets = blocks[:, None] * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)[None, :]
    mask = None if WHOLE else start + offsets < length
    g = tl.load(elements(g_address, G, start, offsets, GRAD_AT_ONCE), mask=mask)
    m_pointer = elements(m_address, M, start, offsets, AT_ONCE)
    m = tl.load(m_pointer, mask=mask)
    p_pointer = elements(p_address, P, start, offsets, AT_ONCE)
    p = tl.load(p_pointer, mask=mask)
    if REMAINDER is not None:
        r_pointer = elements(r_address, tl.int16, start, offsets, AT_ONCE)
        p = join(p, tl.load(r_pointer, mask=mask))
    if SCALE is not None:
        scale_pointer = elements(tl.load(row + SCALE), tl.float32, start // SCALE_BLOCK, blocks, 4)
        scale_mask = start + blocks * SCALE_BLOCK < length
        m = decode(m, tl.load(scale_pointer, mask=scale_mask)[:, None])
    c, m = blend(g, m, rates(hyper, grad_scale), grad_scale, M)
    lr64 = tl.load(hyper + LR_COLUMN)
    lr = lr64.to(tl.float32)
    # [Note: Not finite] x - x is +0 where x is finite, else NaN, which sums pass on. A condition would have to be kept
    # for each element until it is stored, and predicate registers are few: that took 9 % of the time in 16 bits.
    zero = c - c
    # The comparisons become numbers in one instruction each, and occupy no predicate registers.
    change = lr * ((c > 0).to(tl.float32) - (c < 0).to(tl.float32)) + zero
    p = moved(p, change, decay_of(lr64, hyper))
    if SCALE is None:
        store_rounded(m_pointer, m, zero == zero, mask, M)
    if lr != 0:
        if REMAINDER is None:
            store_rounded(p_pointer, p, p == p, mask, P)
        else:
            store_split(p_pointer, r_pointer, p, mask)
    if SCALE is not None:
        m += zero
        size = tl.where(mask, tl.abs(m), 0.0)
        scale, inverse = scales(tl.max(size, axis=1))  # the maximum ignores NaN
        random = random_bits(row, start, offsets, hyper)
        tl.store(m_pointer, encode(m, (inverse * 2.0)[:, None], random), mask=mask)
        tl.store(scale_pointer, scale, mask=scale_mask)
