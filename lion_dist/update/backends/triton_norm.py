"""The sum of squares of all gradients of a segment table, in float64, in one launch.

Each program writes the sum of its block to an element of its own, and torch adds those up, so that the same table gives
the same bits every time (atomics would not).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kernel_launch import launch
from ..segments import TILE, SegmentTable
from .triton_common import TILE_SIZE, TRITON_DTYPES, find_block

BLOCK = 2048
NUM_WARPS = 4


@triton.jit
def _sum_of_squares_kernel(
    rows, tile_segments, grad_addresses, active, partial, G: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    BLOCKS_PER_TILE: tl.constexpr = TILE_SIZE // BLOCK
    program = tl.program_id(0)
    tile, block = program // BLOCKS_PER_TILE, program % BLOCKS_PER_TILE
    segment, _, start, length, takes_part = find_block(rows, tile_segments, tile, block, active, ROW, BLOCK)
    g_address = tl.load(grad_addresses + segment)
    if takes_part & (g_address != 0):
        offsets = start + tl.arange(0, BLOCK)
        g = tl.load(g_address.to(tl.pointer_type(G)) + offsets, mask=offsets < length, other=0.0).to(tl.float64)
        tl.store(partial + program, tl.sum(g * g, axis=0))
    else:
        tl.store(partial + program, 0.0)


def sum_of_squares(table: SegmentTable, grad_dtype: torch.dtype, active: Tensor | None = None) -> Tensor:
    """The sum over the active segments (``active`` as for `triton_step.lion_step`); float64, shape (), on the table's
    device."""
    programs = table.tiles * (TILE // BLOCK)
    partial = torch.empty(programs, dtype=torch.float64, device=table.device)
    table.keep_for_launch(active)
    launch(
        _sum_of_squares_kernel,
        programs,
        (table.rows, table.tile_segments, table.grad_addresses, active, partial),
        (TRITON_DTYPES[grad_dtype], table.row_width, BLOCK),
        NUM_WARPS,
    )
    return partial.sum()
