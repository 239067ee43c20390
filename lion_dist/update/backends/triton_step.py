"""The rule as one Triton launch over a segment table; equal to reference.py bit for bit.

A program works on one block of elements: it finds its segment through the tile map, then reads p, g and m, and writes p
and m, as 1-D memory. Blocks that are whole and 16-byte aligned (normally all but the last of a segment) take a path
whose accesses the compiler can vectorise; the others are masked. With an 8-bit momentum the elements are a matrix whose
rows share a scale.

No autotuning: every trial of an in-place kernel would step the weights once more. Block and warps are chosen by
measurement (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..segments import STATE, TILE, SegmentTable
from ..state import EXP_AVG_SCALE, REMAINDER
from .batch import Mix
from .launch import launch
from .triton_codecs import SCALE_BLOCK, decode, encode, join, random_bits, scales, store_split
from .triton_common import (
    EXP_AVG_COLUMN,
    GROUP_COLUMN,
    HYPERS_WIDTH,
    LR_COLUMN,
    PARAM_COLUMN,
    TILE_SIZE,
    TRITON_DTYPES,
    blend,
    elements,
    find_block,
    moved,
    store_rounded,
)

# Bytes of a parameter element, whether the momentum has 8 bits, whether there are master weights -> (elements a block,
# warps a block, most registers a thread). The masked path, which few blocks take, needs twice the registers of the
# other. Half as many threads would then fit on the GPU, so a limit makes that path spill instead.
LAUNCH: dict[tuple[int, bool, bool], tuple[int, int, int | None]] = {
    (4, False, False): (1024, 4, None),
    (2, False, False): (512, 1, 80),
    (2, False, True): (512, 2, 56),
    (4, True, False): (512, 1, 80),
    (2, True, False): (512, 2, 40),
    (2, True, True): (512, 2, 48),
}


@triton.jit
def _step_block(
    row, p_address, g_address, m_address, r_address, start, length, hyper, grad_scale,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, SCALE: tl.constexpr, REMAINDER: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    # Bytes that a thread reads of a tensor at once, if the block is whole and aligned.
    AT_ONCE: tl.constexpr = 16 if WHOLE else 1
    # Of 8 bits as many elements as of the widest tensor: otherwise they would be exchanged among threads.
    WIDEST: tl.constexpr = max(P.primitive_bitwidth, G.primitive_bitwidth)
    M_AT_ONCE: tl.constexpr = AT_ONCE if SCALE is None or not WHOLE else 128 // WIDEST
    if SCALE is None:
        offsets = tl.arange(0, BLOCK)
    else:
        blocks = tl.arange(0, BLOCK // SCALE_BLOCK)
        offsets = blocks[:, None] * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)[None, :]
    mask = None if WHOLE else start + offsets < length
    g = tl.load(elements(g_address, G, start, offsets, AT_ONCE), mask=mask)
    m_pointer = elements(m_address, M, start, offsets, M_AT_ONCE)
    m = tl.load(m_pointer, mask=mask)
    p_pointer = elements(p_address, P, start, offsets, AT_ONCE)
    p = tl.load(p_pointer, mask=mask)
    if REMAINDER is not None:
        r_pointer = elements(r_address, tl.int16, start, offsets, AT_ONCE)
        p = join(p, tl.load(r_pointer, mask=mask))
    if SCALE is not None:
        scale_pointer = elements(tl.load(row + SCALE), tl.float32, start // SCALE_BLOCK, blocks, 4)
        scale_mask = None if WHOLE else start + blocks * SCALE_BLOCK < length
        m = decode(m, tl.load(scale_pointer, mask=scale_mask)[:, None])
    c, m = blend(g, m, hyper, grad_scale, M)
    lr64 = tl.load(hyper + LR_COLUMN)
    lr = lr64.to(tl.float32)
    # [Note: Not finite] x - x is +0 where x is finite, else NaN, which sums pass on. A condition would have to be kept
    # for each element until it is stored, and predicate registers are few: that took 9 % of the time in 16 bits.
    zero = c - c
    # The comparisons become numbers in one instruction each, and occupy no predicate registers.
    change = lr * ((c > 0).to(tl.float32) - (c < 0).to(tl.float32)) + zero
    p = moved(p, change, lr64, hyper)
    if SCALE is None:
        store_rounded(m_pointer, m, zero == zero, mask, M)
    if lr != 0:
        if REMAINDER is None:
            store_rounded(p_pointer, p, p == p, mask, P)
        else:
            store_split(p_pointer, r_pointer, p, mask)
    if SCALE is not None:
        m += zero
        size = tl.abs(m) if WHOLE else tl.where(mask, tl.abs(m), 0.0)
        scale, inverse = scales(tl.max(size, axis=1))  # the maximum ignores NaN
        random = random_bits(row, start, offsets, hyper)
        tl.store(m_pointer, encode(m, (inverse * 2.0)[:, None], random), mask=mask)
        tl.store(scale_pointer, scale, mask=scale_mask)


@triton.jit
def _lion_kernel(
    rows, tile_segments, grad_addresses, active, hypers, grad_scale,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, SCALE: tl.constexpr, REMAINDER: tl.constexpr,
    ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    BLOCKS_PER_TILE: tl.constexpr = TILE_SIZE // BLOCK
    program = tl.program_id(0)
    tile, block = program // BLOCKS_PER_TILE, program % BLOCKS_PER_TILE
    segment, row, start, length, takes_part = find_block(rows, tile_segments, tile, block, active, ROW, BLOCK)
    p_address = tl.load(row + PARAM_COLUMN)
    m_address = tl.load(row + EXP_AVG_COLUMN)
    r_address = p_address if REMAINDER is None else tl.load(row + REMAINDER)
    group = tl.load(row + GROUP_COLUMN)
    g_address = tl.load(grad_addresses + segment)
    if takes_part & (g_address != 0):
        hyper = hypers + group * HYPERS_WIDTH
        if (start + BLOCK <= length) & (((p_address | g_address | m_address | r_address) % 16) == 0):
            _step_block(
                row, p_address, g_address, m_address, r_address, start, length, hyper, grad_scale,
                P, G, M, SCALE, REMAINDER, BLOCK, WHOLE=True,
            )  # fmt: skip
        else:
            _step_block(
                row, p_address, g_address, m_address, r_address, start, length, hyper, grad_scale,
                P, G, M, SCALE, REMAINDER, BLOCK, WHOLE=False,
            )  # fmt: skip


def lion_step(
    table: SegmentTable, mix: Mix, hypers: Tensor, grad_scale: Tensor | None, active: Tensor | None = None
) -> None:
    """Steps every active segment of the table, in one launch on the table's device.

    Args:
        table: with the gradients of this step; dtypes and columns as in ``mix``, its first state column the momentum.
        mix: storage dtypes.
        hypers: float64, shape (groups, HYPER_COLUMNS), on the table's device.
        grad_scale: float32, shape (), on the table's device, or None for 1.
        active: as of `StepTensors`, on the table's device; None: all segments with a gradient are stepped.
    """
    scale, remainder = mix.place(EXP_AVG_SCALE), mix.place(REMAINDER)
    block, num_warps, max_registers = LAUNCH[mix.param.itemsize, scale is not None, remainder is not None]
    table.keep_for_launch(grad_scale, active)  # of the hyper-parameters `HyperTables.table` takes care
    with torch.cuda.device_of(table.rows):
        launch(
            _lion_kernel,
            table.tiles * (TILE // block),
            (table.rows, table.tile_segments, table.grad_addresses, active, hypers, grad_scale),
            (
                TRITON_DTYPES[mix.param], TRITON_DTYPES[mix.grad], TRITON_DTYPES[mix.state[0]],
                None if scale is None else STATE + scale, None if remainder is None else STATE + remainder,
                table.row_width, block,
            ),
            num_warps,
            max_registers,
        )  # fmt: skip
