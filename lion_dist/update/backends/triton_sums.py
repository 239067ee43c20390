"""Kernels that compute the sums of sums.py for a segment table, in one pass over weights, gradients and state.

A program adds up over one tile, in float64, and writes the sums of the tile to elements of its own. A second launch
adds up the tiles of each segment, so that the same table gives the same bits every time (atomics would not). The packed
signs of tile i begin at byte i * TILE / PER_BYTE.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kernel_launch import launch
from .. import sums
from ..reference import MINUS, PER_BYTE, PLUS
from ..segments import STATE, SegmentTable
from ..state import EXP_AVG_SCALE, REMAINDER
from .batch import Mix
from .triton_codecs import SCALE_BLOCK, decode, join
from .triton_common import (
    EXP_AVG_COLUMN,
    GROUP_COLUMN,
    HYPERS_WIDTH,
    INFINITY,
    LENGTH_COLUMN,
    LR_COLUMN,
    PARAM_COLUMN,
    TILE_0_COLUMN,
    TILE_SIZE,
    TRITON_DTYPES,
    blend,
    decay_of,
    elements,
    find_block,
    moved,
    rates,
)
from .triton_signs import sign_codes

BLOCK = 512  # elements that a program reads at a time: a byte of signs for each thread
NUM_WARPS = 4
MAX_REGISTERS = 64  # of a thread: half of the threads that an H100 or H200 holds then fit; a few of the mixes spill
CHUNK = 256  # tiles of a segment that are added up at a time

_PARAM, _MOMENT, _UPDATE, _GRAD = (
    tl.constexpr(sums.PARAM),
    tl.constexpr(sums.MOMENT),
    tl.constexpr(sums.UPDATE),
    tl.constexpr(sums.GRAD),
)
_ZERO, _AGREE, _FLIPPED = tl.constexpr(sums.ZERO), tl.constexpr(sums.AGREE), tl.constexpr(sums.FLIPPED)
_COMPARED, _ELEMENTS = tl.constexpr(sums.COMPARED), tl.constexpr(sums.ELEMENTS)
_COLUMNS = tl.constexpr(sums.COLUMNS)
_LANES = tl.constexpr(PER_BYTE)  # elements whose signs share a byte: they belong to one thread
_OPPOSITE = tl.constexpr(PLUS * MINUS)  # the product of no other two codes


@triton.jit
def _sums_kernel(
    rows, tile_segments, grad_addresses, active, hypers, grad_scale, last, packed, partial,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, SCALE: tl.constexpr, REMAINDER: tl.constexpr, ROW: tl.constexpr,
    BLOCK: tl.constexpr, GRADS_ODD: tl.constexpr,
):  # fmt: skip
    segment, row, start, length, takes_part = find_block(
        rows, tile_segments, tl.program_id(0), 0, active, ROW, TILE_SIZE
    )
    p_address = tl.load(row + PARAM_COLUMN)
    m_address = tl.load(row + EXP_AVG_COLUMN)
    r_address = p_address if REMAINDER is None else tl.load(row + REMAINDER)
    g_address = tl.load(grad_addresses + segment)
    last_address = g_address if packed is None else tl.load(last + segment)
    stepped = takes_part & (g_address != 0)
    hyper = hypers + tl.load(row + GROUP_COLUMN) * HYPERS_WIDTH
    vectors = p_address | m_address | r_address if GRADS_ODD else p_address | g_address | m_address | r_address
    if (start + TILE_SIZE <= length) & ((vectors % 16) == 0):
        _add_up_tile(
            row, p_address, g_address, m_address, r_address, last_address, start, length, stepped, hyper, grad_scale,
            packed, partial, P, G, M, SCALE, REMAINDER, BLOCK, WHOLE=True, GRAD_ALIGNED=not GRADS_ODD,
        )  # fmt: skip
    else:
        _add_up_tile(
            row, p_address, g_address, m_address, r_address, last_address, start, length, stepped, hyper, grad_scale,
            packed, partial, P, G, M, SCALE, REMAINDER, BLOCK, WHOLE=False, GRAD_ALIGNED=False,
        )  # fmt: skip


@triton.jit
def _add_up_tile(
    row, p_address, g_address, m_address, r_address, last_address, start, length, stepped, hyper, grad_scale,
    packed, partial,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, SCALE: tl.constexpr, REMAINDER: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, GRAD_ALIGNED: tl.constexpr,
):  # fmt: skip
    """Adds up over the tile that begins at element ``start`` of a segment, and packs its signs.

    Args:
        last_address: of the segment's packed signs in an earlier step, or 0.
        stepped: whether the segment has a gradient and is active. Otherwise what is packed means nothing.
        WHOLE: whether the tile has TILE elements, and all but the gradients are aligned to 16 bytes.
    """
    AT_ONCE: tl.constexpr = 16 if WHOLE else 1
    GRAD_AT_ONCE: tl.constexpr = 16 if GRAD_ALIGNED else 1
    OTHER: tl.constexpr = None if WHOLE else 0
    words, lanes = tl.arange(0, BLOCK // _LANES), tl.arange(0, _LANES)
    offsets = words[:, None] * _LANES + lanes[None, :]
    scalars = rates(hyper, grad_scale)
    lr64 = tl.load(hyper + LR_COLUMN)
    lr, decay = lr64.to(tl.float32), decay_of(lr64, hyper)
    param, moment = tl.zeros([BLOCK // _LANES], tl.float64), tl.zeros([BLOCK // _LANES], tl.float64)
    update, grad = tl.zeros([BLOCK // _LANES], tl.float64), tl.zeros([BLOCK // _LANES], tl.float64)
    zero, agree = tl.zeros([BLOCK // _LANES], tl.int32), tl.zeros([BLOCK // _LANES], tl.int32)
    flipped = tl.zeros([BLOCK // _LANES], tl.int32)
    n = TILE_SIZE if WHOLE else tl.minimum(length - start, TILE_SIZE)
    for at in range(0, TILE_SIZE, BLOCK):
        if at < n:
            first = start + at
            mask = None if WHOLE else first + offsets < length
            w_mask = None if WHOLE else first + words * _LANES < length
            g_mask = stepped if WHOLE else mask & stepped
            g = tl.load(elements(g_address, G, first, offsets, GRAD_AT_ONCE), mask=g_mask, other=0)
            m = tl.load(elements(m_address, M, first, offsets, AT_ONCE), mask=mask, other=OTHER)
            p = tl.load(elements(p_address, P, first, offsets, AT_ONCE), mask=mask, other=OTHER)
            if REMAINDER is not None:
                r = tl.load(elements(r_address, tl.int16, first, offsets, AT_ONCE), mask=mask, other=OTHER)
                p = join(p, r)
            if SCALE is not None:
                blocks = words * _LANES // SCALE_BLOCK
                s_pointer = elements(tl.load(row + SCALE), tl.float32, first // SCALE_BLOCK, blocks, 4)
                m = decode(m, tl.load(s_pointer, mask=w_mask, other=OTHER)[:, None])
                m += m - m  # NaN where it is infinite, as its code is NaN's there
            c, _ = blend(g, m, scalars, grad_scale, M)
            used = g.to(tl.float32) * scalars[4]
            sign = (c > 0).to(tl.float32) - (c < 0).to(tl.float32) + (c - c)  # see [Note: Not finite] (triton_block.py)
            p = p.to(tl.float32)
            new = moved(p, lr * sign, decay)
            if REMAINDER is None:
                new = new.to(P).to(tl.float32)
            change = tl.where(lr != 0, new, p).to(tl.float64) - p.to(tl.float64)
            is_zero = sign == 0
            if not WHOLE:
                change, is_zero = tl.where(mask, change, 0.0), is_zero & mask
            param += _squares(p)
            moment += _squares(m)
            update += _squares(change)
            grad += _squares(used)
            zero += _count(is_zero)
            agree += _count(sign * used > 0)
            if packed is not None:
                code = sign_codes(c, tl.abs(c) < INFINITY)
                byte = at // _LANES + words
                of_tile = packed + tl.program_id(0).to(tl.int64) * (TILE_SIZE // _LANES)
                tl.store(of_tile + byte, tl.sum(code << (2 * lanes[None, :]), axis=1).to(tl.uint8), mask=w_mask)
                before = last_address.to(tl.pointer_type(tl.uint8)) + start // _LANES + byte
                compared = last_address != 0 if WHOLE else w_mask & (last_address != 0)
                before = tl.load(before, mask=compared, other=0).to(tl.int32)[:, None] >> (2 * lanes[None, :])
                flipped += _count(code * (before & 3) == _OPPOSITE)
    _store(partial, _PARAM, tl.sum(param, axis=0))
    _store(partial, _MOMENT, tl.sum(moment, axis=0))
    _store(partial, _UPDATE, tl.where(stepped, tl.sum(update, axis=0), 0.0))
    _store(partial, _GRAD, tl.where(stepped, tl.sum(grad, axis=0), 0.0))
    _store(partial, _ZERO, tl.where(stepped, tl.sum(zero, axis=0), n))
    _store(partial, _AGREE, tl.sum(agree, axis=0))
    _store(partial, _FLIPPED, tl.where(stepped, tl.sum(flipped, axis=0), 0))
    is_compared = False if packed is None else stepped & (last_address != 0)
    _store(partial, _COMPARED, tl.where(is_compared, n, 0))
    _store(partial, _ELEMENTS, n)


@triton.jit
def _squares(x):
    x = x.to(tl.float64)
    return tl.sum(x * x, axis=1)


@triton.jit
def _count(mask):
    return tl.sum(mask.to(tl.int32), axis=1)


@triton.jit
def _store(partial, COLUMN: tl.constexpr, x):
    tl.store(partial + COLUMN * tl.num_programs(0) + tl.program_id(0), x.to(tl.float64))


@triton.jit(do_not_specialize=["tiles"])
def _add_tiles_kernel(
    rows, partial, total, tiles, ROW: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Adds up the tiles of a segment. COLUMNS: a power of 2, at least _COLUMNS."""
    segment = tl.program_id(0)
    row = rows + segment.to(tl.int64) * ROW
    first, count = tl.load(row + TILE_0_COLUMN), tl.cdiv(tl.load(row + LENGTH_COLUMN), TILE_SIZE)
    columns = tl.arange(0, COLUMNS)
    found = tl.zeros([COLUMNS, CHUNK], tl.float64)
    at = count * 0
    while at < count:  # Triton's interpreter needs constants in a range
        numbers = at + tl.arange(0, CHUNK)
        mask = (columns < _COLUMNS)[:, None] & (numbers < count)[None, :]
        found += tl.load(partial + columns[:, None] * tiles + (first + numbers)[None, :], mask=mask, other=0.0)
        at += CHUNK
    tl.store(total + segment * _COLUMNS + columns, tl.sum(found, axis=1), mask=columns < _COLUMNS)


def add_up(
    table: SegmentTable, mix: Mix, hypers: Tensor, grad_scale: Tensor | None, active: Tensor | None,
    last: Tensor | None, packed: Tensor | None,
) -> Tensor:  # fmt: skip
    """The sums of every segment of the table. Those that are not stepped count as elements without a gradient.

    Args:
        table, mix, hypers, grad_scale, active: as for `triton_step.lion_step`.
        last: int64, shape (segments,), on the table's device: the addresses of the packed signs that the segments had
            in an earlier step, 0 where there are none.
        packed: uint8, shape (table.tiles * TILE / PER_BYTE,): takes the packed signs. None, like ``last``: no signs are
            compared or kept.

    Returns:
        float64, shape (segments, sums.COLUMNS), on the table's device.
    """
    scale, remainder = mix.place(EXP_AVG_SCALE), mix.place(REMAINDER)
    partial = torch.empty(sums.COLUMNS * table.tiles, dtype=torch.float64, device=table.device)
    total = torch.empty(len(table.rows), sums.COLUMNS, dtype=torch.float64, device=table.device)
    table.keep_for_launch(grad_scale, active)
    launch(
        _sums_kernel,
        table.tiles,
        (
            table.rows, table.tile_segments, table.grad_addresses, active, hypers, grad_scale, last, packed, partial,
        ),
        (
            TRITON_DTYPES[mix.param], TRITON_DTYPES[mix.grad], TRITON_DTYPES[mix.state[0]],
            None if scale is None else STATE + scale, None if remainder is None else STATE + remainder,
            table.row_width, BLOCK, table.grads_odd,
        ),
        NUM_WARPS,
        MAX_REGISTERS,
    )  # fmt: skip
    launch(
        _add_tiles_kernel,
        len(table.rows),
        (table.rows, partial, total, table.tiles),
        (table.row_width, CHUNK, triton.next_power_of_2(sums.COLUMNS)),
        NUM_WARPS,
    )
    return total
