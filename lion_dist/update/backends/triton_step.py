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

from ..reference import BETA1, BETA2, GRAD_SIGN, HYPER_COLUMNS, LR, NAN_BITS, OVERFLOW, WEIGHT_DECAY
from ..segments import ENTRY, GROUP, LENGTH, PARAM, STATE, TILE, TILE_0, SegmentTable
from .batch import Mix
from .launch import launch

# Bytes of a parameter element -> (elements a block, warps a block).
LAUNCH = {4: (1024, 4), 2: (1024, 2)}

_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# Module constants that a kernel reads must be constexpr.
_TILE = tl.constexpr(TILE)
_PARAM, _LENGTH, _GROUP = tl.constexpr(PARAM), tl.constexpr(LENGTH), tl.constexpr(GROUP)
_TILE_0, _ENTRY = tl.constexpr(TILE_0), tl.constexpr(ENTRY)
_EXP_AVG = tl.constexpr(STATE)  # the momentum is the first state column
_HYPER_COLUMNS = tl.constexpr(HYPER_COLUMNS)
_LR, _WEIGHT_DECAY, _GRAD_SIGN = tl.constexpr(LR), tl.constexpr(WEIGHT_DECAY), tl.constexpr(GRAD_SIGN)
_BETA1, _BETA2 = tl.constexpr(BETA1), tl.constexpr(BETA2)
_NAN_FLOAT32 = tl.constexpr(NAN_BITS[torch.float32][1])
_NAN_BFLOAT16 = tl.constexpr(NAN_BITS[torch.bfloat16][1])
_NAN_FLOAT16 = tl.constexpr(NAN_BITS[torch.float16][1])
_INFINITY = tl.constexpr(OVERFLOW[torch.float32])
_OVERFLOW_BFLOAT16 = tl.constexpr(OVERFLOW[torch.bfloat16])
_OVERFLOW_FLOAT16 = tl.constexpr(OVERFLOW[torch.float16])


@triton.jit
def _find_block(rows, tile_segments, tile, block, active, ROW: tl.constexpr, BLOCK: tl.constexpr):
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
    length = tl.load(row + _LENGTH)
    start = (tile - tl.load(row + _TILE_0)) * _TILE + block * BLOCK
    takes_part = start < length
    if active is not None:
        takes_part = takes_part & (tl.load(active + tl.load(row + _ENTRY)) != 0)
    return segment, row, start, length, takes_part


@triton.jit
def _store(pointer, x, is_number, mask, DTYPE: tl.constexpr):
    """Rounds float32 x to DTYPE and stores it. Where ``is_number`` does not hold, it stores NaN in its canonical form,
    reference.NAN_BITS."""
    if tl.float32 == DTYPE:
        bits = tl.where(is_number, x.to(tl.int32, bitcast=True), _NAN_FLOAT32)
    elif tl.bfloat16 == DTYPE:
        bits = tl.where(is_number, x.to(tl.bfloat16).to(tl.int16, bitcast=True), _NAN_BFLOAT16).to(tl.int16)
    else:
        bits = tl.where(is_number, x.to(tl.float16).to(tl.int16, bitcast=True), _NAN_FLOAT16).to(tl.int16)
    tl.store(pointer, bits.to(DTYPE, bitcast=True), mask=mask)


@triton.jit
def _momentum(g, m, hyper, grad_scale, M: tl.constexpr):
    """reference.blend: c and the new momentum, both float32. Where c or the momentum rounded to M is not finite, the
    returned c is NaN or infinite, and NaN must be stored for parameter and momentum."""
    # Scalars are derived from float64 and rounded once, as in reference.scalars.
    beta1_64 = tl.load(hyper + _BETA1)
    beta2_64 = tl.load(hyper + _BETA2)
    sign = tl.load(hyper + _GRAD_SIGN).to(tl.float32)
    of_g1, of_g2 = (1.0 - beta1_64).to(tl.float32), (1.0 - beta2_64).to(tl.float32)
    g = g.to(tl.float32)
    if grad_scale is None:
        # A sign is exact wherever it is multiplied in, and here that costs nothing an element.
        of_g1, of_g2 = of_g1 * sign, of_g2 * sign
    else:
        g = g * (sign * tl.load(grad_scale))
    m = m.to(tl.float32)
    c = beta1_64.to(tl.float32) * m + of_g1 * g
    m = beta2_64.to(tl.float32) * m + of_g2 * g
    if tl.float32 == M:
        c = tl.where(tl.abs(m) < _INFINITY, c, float("nan"))
    elif tl.bfloat16 == M:
        c = tl.where(tl.abs(m) < _OVERFLOW_BFLOAT16, c, float("nan"))
    else:
        c = tl.where(tl.abs(m) < _OVERFLOW_FLOAT16, c, float("nan"))
    return c, m


@triton.jit
def _moved(p, change, lr64, hyper):
    """reference.parameter_rule, in float32."""
    decay = (1.0 - lr64 * tl.load(hyper + _WEIGHT_DECAY)).to(tl.float32)
    return p.to(tl.float32) * decay - change


@triton.jit
def _step_block(
    p_pointer, g_pointer, m_pointer, mask, hyper, grad_scale, P: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    g = tl.load(g_pointer, mask=mask)
    m = tl.load(m_pointer, mask=mask)
    p = tl.load(p_pointer, mask=mask)
    c, m = _momentum(g, m, hyper, grad_scale, M)
    lr64 = tl.load(hyper + _LR)
    lr = lr64.to(tl.float32)
    # [Note: Not finite] x - x is +0 where x is finite, else NaN, which sums pass on. A condition would have to be kept
    # for each element until it is stored, and predicate registers are few: that took 9 % of the time in 16 bits.
    zero = c - c
    # lr * sign: one product for each sign, not for each element.
    change = tl.where(c > 0, lr, tl.where(c < 0, -lr, lr * 0.0)) + zero
    p = _moved(p, change, lr64, hyper)
    _store(m_pointer, m, zero == zero, mask, M)
    if lr != 0:
        _store(p_pointer, p, p == p, mask, P)


@triton.jit
def _lion_kernel(
    rows, tile_segments, grad_addresses, active, hypers, grad_scale,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    BLOCKS_PER_TILE: tl.constexpr = _TILE // BLOCK
    program = tl.program_id(0)
    tile, block = program // BLOCKS_PER_TILE, program % BLOCKS_PER_TILE
    segment, row, start, length, takes_part = _find_block(rows, tile_segments, tile, block, active, ROW, BLOCK)
    p_address = tl.load(row + _PARAM)
    m_address = tl.load(row + _EXP_AVG)
    group = tl.load(row + _GROUP)
    g_address = tl.load(grad_addresses + segment)
    if takes_part & (g_address != 0):
        hyper = hypers + group * _HYPER_COLUMNS
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
                _TRITON_DTYPES[mix.param], _TRITON_DTYPES[mix.grad], _TRITON_DTYPES[mix.state[0]],
                table.row_width, block,
            ),
            num_warps,
        )  # fmt: skip
