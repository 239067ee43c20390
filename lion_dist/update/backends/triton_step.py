"""The rule as one Triton launch over a segment table; equal to reference.py bit for bit.

A program works on one block of elements: it finds its segment through the tile map, then reads p, g and m, and writes p
and m, as 1-D memory. There are three paths: for whole blocks that are aligned to 16 bytes, normally all but the last of
a segment, whose accesses the compiler can vectorise; for whole ones that are not; and, masked, for the last of a
segment. An 8-bit momentum has a kernel of its own.

Gradients may lie at any address, as FSDP2's do. Where one of a table is not aligned, the kernel is compiled anew with
GRADS_ODD: it reads gradients element by element, and does not ask for their alignment. A fourth path in one kernel
would need more registers, and slow down aligned blocks in bfloat16 (benchmarks/RESULTS.md).

No autotuning: every trial of an in-place kernel would step the weights once more. Block and warps are chosen by
measurement (benchmarks/RESULTS.md).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...kernel_launch import launch
from ..segments import STATE, TILE, SegmentTable
from ..state import EXP_AVG_SCALE, REMAINDER
from .batch import Mix
from .triton_block import step_block
from .triton_common import (
    EXP_AVG_COLUMN,
    GROUP_COLUMN,
    HYPERS_WIDTH,
    PARAM_COLUMN,
    TILE_SIZE,
    TRITON_DTYPES,
    find_block,
)
from .triton_step_int8 import lion_kernel_int8


class Launch(NamedTuple):
    """How a kernel is launched.

    Attributes:
        block: elements of a block.
        num_warps: warps of a program.
        max_registers: most registers of a thread; None: the compiler's choice. The masked path, which few blocks take,
            needs twice the registers of the other. Half as many threads would then fit on the GPU, so a limit makes
            that path spill instead.
        blocks: that a program steps, one after another; of the kernel for 8-bit momenta.
    """

    block: int
    num_warps: int
    max_registers: int | None
    blocks: int = 1


# By the bytes of a parameter element, whether the momentum has 8 bits, and whether there are master weights.
LAUNCH = {
    (4, False, False): Launch(1024, 4, None),
    (2, False, False): Launch(512, 1, 80),
    (2, False, True): Launch(512, 2, 56),
    (4, True, False): Launch(512, 1, 80),
    (2, True, False): Launch(512, 1, 96, 4),
    (2, True, True): Launch(512, 1, 112, 4),
}


@triton.jit
def _lion_kernel(
    rows, tile_segments, grad_addresses, active, hypers, grad_scale,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, REMAINDER: tl.constexpr, ROW: tl.constexpr,
    BLOCK: tl.constexpr, GRADS_ODD: tl.constexpr,
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
        if start + BLOCK <= length:
            vectors = p_address | m_address | r_address if GRADS_ODD else p_address | g_address | m_address | r_address
            if (vectors % 16) == 0:
                step_block(
                    row, p_address, g_address, m_address, r_address, start, length, hyper, grad_scale,
                    P, G, M, None, REMAINDER, BLOCK, WHOLE=True, ALIGNED=True, GRAD_ALIGNED=not GRADS_ODD,
                )  # fmt: skip
            else:
                step_block(
                    row, p_address, g_address, m_address, r_address, start, length, hyper, grad_scale,
                    P, G, M, None, REMAINDER, BLOCK, WHOLE=True, ALIGNED=False, GRAD_ALIGNED=False,
                )  # fmt: skip
        else:
            step_block(
                row, p_address, g_address, m_address, r_address, start, length, hyper, grad_scale,
                P, G, M, None, REMAINDER, BLOCK, WHOLE=False, ALIGNED=False, GRAD_ALIGNED=False,
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
    how = LAUNCH[mix.param.itemsize, scale is not None, remainder is not None]
    p, g, m = (TRITON_DTYPES[dtype] for dtype in (mix.param, mix.grad, mix.state[0]))
    columns = [None if place is None else STATE + place for place in (scale, remainder)]
    if scale is None:
        kernel, constants = _lion_kernel, (p, g, m, columns[1], table.row_width, how.block, table.grads_odd)
    else:
        kernel, constants = lion_kernel_int8, (p, g, *columns, table.row_width, how.block, how.blocks)
    table.keep_for_launch(grad_scale, active)  # `HyperTables.table` takes care of the hyper-parameters
    launch(
        kernel,
        table.tiles * (TILE // (how.block * how.blocks)),
        (table.rows, table.tile_segments, table.grad_addresses, active, hypers, grad_scale),
        constants,
        how.num_warps,
        how.max_registers,
    )
