"""The two halves of a step as Triton launches, with 2-bit signs between them: `sign_step_` and `apply_signs_` of
reference.py, bit for bit.

The first half reads gradient and momentum, and writes the momentum and the packed signs. It does not touch the
parameter. The second half reads the signs and writes the parameter; if its ``agree`` flag is 0 it writes nothing. Both
read a segment table, as triton_step.py does. In the table of the second half the state column is the packed signs:
bytes, PER_BYTE elements each.

The first half also writes a checksum, `reference.hyper_checksum`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import MINUS, NOT_A_NUMBER, PER_BYTE, PLUS
from ..segments import STATE, TILE, SegmentTable
from .launch import launch
from .triton_common import (
    EXP_AVG_COLUMN,
    GROUP_COLUMN,
    HYPERS_WIDTH,
    INFINITY,
    LR_COLUMN,
    PARAM_COLUMN,
    TILE_SIZE,
    TRITON_DTYPES,
    blend,
    find_block,
    moved,
    store_rounded,
)

# Bytes of the widest element that is read or written -> (elements a block, warps a block, elements a word). A word of
# packed signs belongs to 16 bytes of elements, the largest single access.
PACK = {4: (512, 2, 4), 2: (512, 1, 8)}
APPLY = {4: (1024, 2, 4), 2: (1024, 2, 8)}

_SIGNS = tl.constexpr(STATE)  # the packed signs are the first state column of `apply_signs`' table
_PER_BYTE = tl.constexpr(PER_BYTE)
_WORDS = {4: tl.uint8, 8: tl.uint16}  # elements a word -> its type; the lowest byte is the first
_PLUS, _MINUS, _NOT_A_NUMBER = tl.constexpr(PLUS), tl.constexpr(MINUS), tl.constexpr(NOT_A_NUMBER)


@triton.jit(do_not_specialize=["tiles", "hyper_numel", "salt"])  # numbers that change must not compile anew
def _lion_pack_kernel(
    rows, tile_segments, tiles, grad_addresses, active, hypers, grad_scale,
    exp_avg, packed, checksum, hyper_numel, salt,
    G: tl.constexpr, M: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, WORD: tl.constexpr,
    HYPERS: tl.constexpr,
):  # fmt: skip
    BLOCKS_PER_TILE: tl.constexpr = TILE_SIZE // BLOCK
    program = tl.program_id(0)
    tile, block = program // BLOCKS_PER_TILE, program % BLOCKS_PER_TILE
    if program == 0:
        index = tl.arange(0, HYPERS)
        bits = tl.load(hypers + index, mask=index < hyper_numel, other=0.0).to(tl.int64, bitcast=True)
        total = tl.sum(bits * (2 * index + 1).to(tl.int64), axis=0) + salt
        if grad_scale is not None:
            scale_bits = tl.load(grad_scale).to(tl.int32, bitcast=True).to(tl.int64)
            total += scale_bits * (2 * hyper_numel + 1)
        tl.store(checksum, total)
    if tile < tiles:
        segment, row, start, length, takes_part = find_block(rows, tile_segments, tile, block, active, ROW, BLOCK)
        m_address = tl.load(row + EXP_AVG_COLUMN)
        group = tl.load(row + GROUP_COLUMN)
        g_address = tl.load(grad_addresses + segment)
        if takes_part & (g_address != 0):
            hyper = hypers + group * HYPERS_WIDTH
            words = tl.arange(0, BLOCK // LANES)
            lanes = tl.arange(0, LANES)
            offsets = words[:, None] * LANES + lanes[None, :]
            # Packed signs lie as the momentum does. The division is exact: shards are cut at multiples of 128.
            first = (m_address - exp_avg.to(tl.int64)) // (M.primitive_bitwidth // 8) + start
            w_pointer = (packed + first // _PER_BYTE).to(tl.pointer_type(WORD), bitcast=True) + words
            if (start + BLOCK <= length) & (((g_address | m_address) % 16) == 0):
                g_pointer = tl.multiple_of(g_address.to(tl.pointer_type(G)), 16) + start + offsets
                m_pointer = tl.multiple_of(m_address.to(tl.pointer_type(M)), 16) + start + offsets
                _pack_block(g_pointer, m_pointer, w_pointer, lanes, None, None, hyper, grad_scale, M, WORD)
            else:
                mask = start + offsets < length
                g_pointer = g_address.to(tl.pointer_type(G)) + start + offsets
                m_pointer = m_address.to(tl.pointer_type(M)) + start + offsets
                w_mask = start + words * LANES < length
                _pack_block(g_pointer, m_pointer, w_pointer, lanes, mask, w_mask, hyper, grad_scale, M, WORD)


@triton.jit
def _pack_block(
    g_pointer, m_pointer, w_pointer, lanes, mask, w_mask, hyper, grad_scale, M: tl.constexpr, WORD: tl.constexpr
):  # fmt: skip
    g = tl.load(g_pointer, mask=mask)
    m = tl.load(m_pointer, mask=mask)
    c, m = blend(g, m, hyper, grad_scale, M)
    finite = tl.abs(c) < INFINITY
    code = tl.where(finite, tl.where(c > 0, _PLUS, tl.where(c < 0, _MINUS, 0)), _NOT_A_NUMBER)
    if mask is not None:
        code = tl.where(mask, code, 0)
    store_rounded(m_pointer, m, finite, mask, M)
    # Bits behind the end of a segment, up to a whole word, are padding.
    tl.store(w_pointer, tl.sum(code << (2 * lanes[None, :]), axis=1).to(WORD), mask=w_mask)


@triton.jit
def _lion_apply_kernel(
    rows, tile_segments, active, agree, hypers,
    P: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    BLOCKS_PER_TILE: tl.constexpr = TILE_SIZE // BLOCK
    program = tl.program_id(0)
    tile, block = program // BLOCKS_PER_TILE, program % BLOCKS_PER_TILE
    _, row, start, length, takes_part = find_block(rows, tile_segments, tile, block, active, ROW, BLOCK)
    p_address = tl.load(row + PARAM_COLUMN)
    packed_address = tl.load(row + _SIGNS)
    group = tl.load(row + GROUP_COLUMN)
    lr64 = tl.load(hypers + group * HYPERS_WIDTH + LR_COLUMN)
    if takes_part & (tl.load(agree) != 0) & (lr64.to(tl.float32) != 0):
        hyper = hypers + group * HYPERS_WIDTH
        words = tl.arange(0, BLOCK // LANES)
        lanes = tl.arange(0, LANES)
        offsets = words[:, None] * LANES + lanes[None, :]
        w_pointer = (packed_address + start // _PER_BYTE).to(tl.pointer_type(WORD)) + words
        if (start + BLOCK <= length) & ((p_address % 16) == 0):
            p_pointer = tl.multiple_of(p_address.to(tl.pointer_type(P)), 16) + start + offsets
            _apply_block(p_pointer, w_pointer, lanes, None, None, lr64, hyper, P)
        else:
            mask = start + offsets < length
            p_pointer = p_address.to(tl.pointer_type(P)) + start + offsets
            _apply_block(p_pointer, w_pointer, lanes, mask, start + words * LANES < length, lr64, hyper, P)


@triton.jit
def _apply_block(p_pointer, w_pointer, lanes, mask, w_mask, lr64, hyper, P: tl.constexpr):
    packed = tl.load(w_pointer, mask=w_mask).to(tl.int32)[:, None]
    p = tl.load(p_pointer, mask=mask)
    # lr * sign: one product for each sign, not for each element. A dozen instructions an element are all that the
    # memory leaves time for.
    lr = lr64.to(tl.float32)
    low, high = (packed & (1 << 2 * lanes[None, :])) != 0, (packed & (2 << 2 * lanes[None, :])) != 0
    change = tl.where(low, tl.where(high, float("nan"), lr), tl.where(high, -lr, lr * 0.0))
    p = moved(p, change, lr64, hyper)
    store_rounded(p_pointer, p, p == p, mask, P)


def pack_signs(
    table: SegmentTable, grad_dtype: torch.dtype, hypers: Tensor, grad_scale: Tensor | None, active: Tensor | None,
    exp_avg: Tensor, packed: Tensor, checksum: Tensor, salt: int,
) -> None:  # fmt: skip
    """The first half for every active segment of the table, and the checksum, in one launch.

    Args:
        table, hypers, grad_scale, active: as for `triton_step.lion_step`.
        exp_avg: the flat momentum buffer that all of the table's momenta lie in.
        packed: uint8, one byte for PER_BYTE elements of ``exp_avg``, in its order.
        checksum: int64, shape (), written.
        salt: as for `reference.hyper_checksum`, in [2**31, 2**63): of one width, so that nothing is compiled twice.
    """
    block, num_warps, lanes = PACK[max(grad_dtype.itemsize, exp_avg.itemsize)]
    table.keep_for_launch(hypers, grad_scale, active)
    with torch.cuda.device_of(packed):
        launch(
            _lion_pack_kernel,
            max(1, table.tiles * (TILE // block)),
            (
                table.rows, table.tile_segments, table.tiles, table.grad_addresses, active, hypers, grad_scale,
                exp_avg, packed, checksum, hypers.numel(), salt,
            ),
            (
                TRITON_DTYPES[grad_dtype], TRITON_DTYPES[exp_avg.dtype], table.row_width, block, lanes,
                _WORDS[lanes], triton.next_power_of_2(hypers.numel()),
            ),
            num_warps,
        )  # fmt: skip


def apply_signs(
    table: SegmentTable, param_dtype: torch.dtype, hypers: Tensor, active: Tensor | None, agree: Tensor
) -> None:
    """The second half for every active segment of the table, in one launch.

    Args:
        table: its first state column is the packed signs, uint8.
        param_dtype: storage dtype of the parameters.
        hypers, active: as for `triton_step.lion_step`.
        agree: uint8, shape (), on the table's device: 0 leaves everything untouched.
    """
    block, num_warps, lanes = APPLY[param_dtype.itemsize]
    table.keep_for_launch(hypers, active, agree)
    with torch.cuda.device_of(table.rows):
        launch(
            _lion_apply_kernel,
            table.tiles * (TILE // block),
            (table.rows, table.tile_segments, active, agree, hypers),
            (TRITON_DTYPES[param_dtype], table.row_width, block, lanes, _WORDS[lanes]),
            num_warps,
        )
