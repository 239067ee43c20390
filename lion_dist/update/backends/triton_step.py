"""The rule as one Triton launch over a segment table; equal to reference.py bit for bit.

A program works on one block of elements: it finds its segment through the tile map, then reads p, g and m, and writes p
and m, as 1-D memory. Blocks that are whole and 16-byte aligned (normally all but the last of a segment) take a path
whose accesses the compiler can vectorise; the others are masked.

No autotuning: every trial of an in-place kernel would step the weights once more. Block and warps are chosen by
measurement (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..segments import TILE, SegmentTable
from .batch import Mix
from .launch import launch
from .triton_common import (
    EXP_AVG_COLUMN,
    GROUP_COLUMN,
    HYPERS_WIDTH,
    LR_COLUMN,
    PARAM_COLUMN,
    TILE_SIZE,
    TRITON_DTYPES,
    blend,
    find_block,
    moved,
    store_rounded,
)

# Bytes of a parameter element -> (elements a block, warps a block).
LAUNCH = {4: (1024, 4), 2: (1024, 2)}


@triton.jit
def _step_block(
    p_pointer, g_pointer, m_pointer, mask, hyper, grad_scale, P: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    g = tl.load(g_pointer, mask=mask)
    m = tl.load(m_pointer, mask=mask)
    p = tl.load(p_pointer, mask=mask)
    c, m = blend(g, m, hyper, grad_scale, M)
    lr64 = tl.load(hyper + LR_COLUMN)
    lr = lr64.to(tl.float32)
    # [Note: Not finite] x - x is +0 where x is finite, else NaN, which sums pass on. A condition would have to be kept
    # for each element until it is stored, and predicate registers are few: that took 9 % of the time in 16 bits.
    zero = c - c
    # lr * sign: one product for each sign, not for each element.
    change = tl.where(c > 0, lr, tl.where(c < 0, -lr, lr * 0.0)) + zero
    p = moved(p, change, lr64, hyper)
    store_rounded(m_pointer, m, zero == zero, mask, M)
    if lr != 0:
        store_rounded(p_pointer, p, p == p, mask, P)


@triton.jit
def _lion_kernel(
    rows, tile_segments, grad_addresses, active, hypers, grad_scale,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    BLOCKS_PER_TILE: tl.constexpr = TILE_SIZE // BLOCK
    program = tl.program_id(0)
    tile, block = program // BLOCKS_PER_TILE, program % BLOCKS_PER_TILE
    segment, row, start, length, takes_part = find_block(rows, tile_segments, tile, block, active, ROW, BLOCK)
    p_address = tl.load(row + PARAM_COLUMN)
    m_address = tl.load(row + EXP_AVG_COLUMN)
    group = tl.load(row + GROUP_COLUMN)
    g_address = tl.load(grad_addresses + segment)
    if takes_part & (g_address != 0):
        hyper = hypers + group * HYPERS_WIDTH
        offsets = tl.arange(0, BLOCK)
        if (start + BLOCK <= length) & (((p_address | g_address | m_address) % 16) == 0):
            # The hint is what lets a 16-byte access be made of an address that came from memory.
            p_pointer = tl.multiple_of(p_address.to(tl.pointer_type(P)), 16) + start + offsets
            g_pointer = tl.multiple_of(g_address.to(tl.pointer_type(G)), 16) + start + offsets
            m_pointer = tl.multiple_of(m_address.to(tl.pointer_type(M)), 16) + start + offsets
            _step_block(p_pointer, g_pointer, m_pointer, None, hyper, grad_scale, P, M)
        else:
            mask = start + offsets < length
            p_pointer = p_address.to(tl.pointer_type(P)) + start + offsets
            g_pointer = g_address.to(tl.pointer_type(G)) + start + offsets
            m_pointer = m_address.to(tl.pointer_type(M)) + start + offsets
            _step_block(p_pointer, g_pointer, m_pointer, mask, hyper, grad_scale, P, M)


def lion_step(
    table: SegmentTable, mix: Mix, hypers: Tensor, grad_scale: Tensor | None, active: Tensor | None = None
) -> None:
    """Steps every active segment of the table, in one launch on the table's device.

    Args:
        table: with the gradients of this step; dtypes as in ``mix``, the momentum as its first state column.
        mix: storage dtypes.
        hypers: float64, shape (groups, HYPER_COLUMNS), on the table's device.
        grad_scale: float32, shape (), on the table's device, or None for 1.
        active: as of `StepTensors`, on the table's device; None: all segments with a gradient are stepped.
    """
    block, num_warps = LAUNCH[mix.param.itemsize]
    table.keep_for_launch(hypers, grad_scale, active)
    with torch.cuda.device_of(table.rows):
        launch(
            _lion_kernel,
            table.tiles * (TILE // block),
            (table.rows, table.tile_segments, table.grad_addresses, active, hypers, grad_scale),
            (
                TRITON_DTYPES[mix.param], TRITON_DTYPES[mix.grad], TRITON_DTYPES[mix.state[0]],
                table.row_width, block,
            ),
            num_warps,
        )  # fmt: skip
