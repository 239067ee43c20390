"""The two halves of a step as Triton launches, with 2-bit signs between them: `sign_step_` and `apply_signs_` of
reference.py, bit for bit.

The first half reads gradient and momentum, and writes the momentum and the packed signs. It does not touch the
parameter. The second half reads the signs and writes the parameter; if its ``agree`` flag is 0 it writes nothing. Both
read a segment table, as triton_step.py does. In the table of the second half the first state column is the packed signs
(bytes, PER_BYTE elements each), and another may be the remainders of master weights.

The first half also writes a checksum, `reference.hyper_checksum`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...kernel_launch import launch
from ..reference import MINUS, NOT_A_NUMBER, PER_BYTE, PLUS
from ..segments import STATE, TILE, SegmentTable
from ..state import EXP_AVG_SCALE, REMAINDER
from .batch import Mix
from .triton_codecs import SCALE_BLOCK, decode, encode, join, random_bits, scales, store_split
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
    decay_of,
    elements,
    find_block,
    moved,
    rates,
    store_rounded,
)

# Bytes of the widest element that is read or written, whether the momentum has 8 bits -> (elements a block, warps a
# block, elements a word). A word of packed signs belongs to 16 bytes of elements, the largest single access.
PACK = {(4, False): (512, 2, 4), (2, False): (512, 1, 8), (4, True): (512, 2, 4), (2, True): (512, 1, 8)}
# Bytes of a parameter element, whether there are master weights -> likewise.
APPLY = {(4, False): (1024, 2, 4), (2, False): (1024, 2, 8), (2, True): (1024, 2, 8)}

_SIGNS = tl.constexpr(STATE)  # the packed signs are the first state column of `apply_signs`' table
_PER_BYTE = tl.constexpr(PER_BYTE)
_WORDS = {4: tl.uint8, 8: tl.uint16}  # elements a word -> its type; the lowest byte is the first
_PLUS, _MINUS, _NOT_A_NUMBER = tl.constexpr(PLUS), tl.constexpr(MINUS), tl.constexpr(NOT_A_NUMBER)


@triton.jit
def sign_codes(c, finite):
    """The codes, int32, of the signs of c, as `blend` returns it; ``finite``: whether it is."""
    return tl.where(finite, tl.where(c > 0, _PLUS, tl.where(c < 0, _MINUS, 0)), _NOT_A_NUMBER)


@triton.jit(do_not_specialize=["tiles", "hyper_numel", "salt"])  # numbers that change must not compile anew
def _lion_pack_kernel(
    rows, tile_segments, tiles, grad_addresses, active, hypers, grad_scale,
    exp_avg, packed, checksum, hyper_numel, salt,
    G: tl.constexpr, M: tl.constexpr, SCALE: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr,
    LANES: tl.constexpr, WORD: tl.constexpr, HYPERS: tl.constexpr,
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
            # Packed signs lie as the momentum does. The division is exact: shards are cut at multiples of 128.
            first = (m_address - exp_avg.to(tl.int64)) // (M.primitive_bitwidth // 8) + start
            words = packed + first // _PER_BYTE
            if (start + BLOCK <= length) & (((g_address | m_address) % 16) == 0):
                _pack_block(
                    row, g_address, m_address, words, start, length, hyper, grad_scale,
                    G, M, SCALE, BLOCK, LANES, WORD, WHOLE=True,
                )  # fmt: skip
            else:
                _pack_block(
                    row, g_address, m_address, words, start, length, hyper, grad_scale,
                    G, M, SCALE, BLOCK, LANES, WORD, WHOLE=False,
                )  # fmt: skip


@triton.jit
def _pack_block(
    row, g_address, m_address, words, start, length, hyper, grad_scale,
    G: tl.constexpr, M: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    WORD: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    AT_ONCE: tl.constexpr = 16 if WHOLE else 1
    M_AT_ONCE: tl.constexpr = AT_ONCE if SCALE is None or not WHOLE else LANES
    lanes = tl.arange(0, LANES)
    if SCALE is None:
        word = tl.arange(0, BLOCK // LANES)
        offsets = word[:, None] * LANES + lanes[None, :]
    else:  # blocks that share a scale, their words, and the lanes of those
        blocks = tl.arange(0, BLOCK // SCALE_BLOCK)
        word = blocks[:, None] * (SCALE_BLOCK // LANES) + tl.arange(0, SCALE_BLOCK // LANES)[None, :]
        offsets = word[:, :, None] * LANES + lanes[None, None, :]
    mask = None if WHOLE else start + offsets < length
    g = tl.load(elements(g_address, G, start, offsets, AT_ONCE), mask=mask)
    m_pointer = elements(m_address, M, start, offsets, M_AT_ONCE)
    m = tl.load(m_pointer, mask=mask)
    if SCALE is not None:
        scale_pointer = elements(tl.load(row + SCALE), tl.float32, start // SCALE_BLOCK, blocks, 4)
        scale_mask = None if WHOLE else start + blocks * SCALE_BLOCK < length
        m = decode(m, tl.load(scale_pointer, mask=scale_mask)[:, None, None])
    c, m = blend(g, m, rates(hyper, grad_scale), grad_scale, M)
    finite = tl.abs(c) < INFINITY
    code = sign_codes(c, finite)
    if not WHOLE:
        code = tl.where(mask, code, 0)
    if SCALE is None:
        store_rounded(m_pointer, m, finite, mask, M)
        packed = tl.sum(code << (2 * lanes[None, :]), axis=1)
    else:
        m += c - c  # see [Note: Not finite]
        size = tl.abs(m) if WHOLE else tl.where(mask, tl.abs(m), 0.0)
        scale, inverse = scales(tl.max(tl.max(size, axis=2), axis=1))
        random = random_bits(row, start, offsets, hyper)
        tl.store(m_pointer, encode(m, (inverse * 2.0)[:, None, None], random), mask=mask)
        tl.store(scale_pointer, scale, mask=scale_mask)
        packed = tl.sum(code << (2 * lanes[None, None, :]), axis=2)
    # Bits behind the end of a segment, up to a whole word, are padding.
    w_mask = None if WHOLE else start + word * LANES < length
    tl.store(words.to(tl.pointer_type(WORD), bitcast=True) + word, packed.to(WORD), mask=w_mask)


@triton.jit
def _lion_apply_kernel(
    rows, tile_segments, active, agree, hypers,
    P: tl.constexpr, REMAINDER: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    WORD: tl.constexpr,
):  # fmt: skip
    BLOCKS_PER_TILE: tl.constexpr = TILE_SIZE // BLOCK
    program = tl.program_id(0)
    tile, block = program // BLOCKS_PER_TILE, program % BLOCKS_PER_TILE
    _, row, start, length, takes_part = find_block(rows, tile_segments, tile, block, active, ROW, BLOCK)
    p_address = tl.load(row + PARAM_COLUMN)
    r_address = p_address if REMAINDER is None else tl.load(row + REMAINDER)
    words = tl.load(row + _SIGNS) + start // _PER_BYTE
    group = tl.load(row + GROUP_COLUMN)
    hyper = hypers + group * HYPERS_WIDTH
    lr64 = tl.load(hyper + LR_COLUMN)
    if takes_part & (tl.load(agree) != 0) & (lr64.to(tl.float32) != 0):
        if (start + BLOCK <= length) & (((p_address | r_address) % 16) == 0):
            _apply_block(
                p_address, r_address, words, start, length, lr64, hyper, P, REMAINDER, BLOCK, LANES, WORD, WHOLE=True
            )
        else:
            _apply_block(
                p_address, r_address, words, start, length, lr64, hyper, P, REMAINDER, BLOCK, LANES, WORD, WHOLE=False
            )


@triton.jit
def _apply_block(
    p_address, r_address, words, start, length, lr64, hyper,
    P: tl.constexpr, REMAINDER: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, WORD: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    AT_ONCE: tl.constexpr = 16 if WHOLE else 1
    word = tl.arange(0, BLOCK // LANES)
    lanes = tl.arange(0, LANES)
    offsets = word[:, None] * LANES + lanes[None, :]
    mask = None if WHOLE else start + offsets < length
    w_mask = None if WHOLE else start + word * LANES < length
    packed = tl.load(words.to(tl.pointer_type(WORD)) + word, mask=w_mask).to(tl.int32)[:, None]
    p_pointer = elements(p_address, P, start, offsets, AT_ONCE)
    p = tl.load(p_pointer, mask=mask)
    if REMAINDER is not None:
        r_pointer = elements(r_address, tl.int16, start, offsets, AT_ONCE)
        p = join(p, tl.load(r_pointer, mask=mask))
    # lr * sign: one product for each sign, not for each element. A dozen instructions an element are all that the
    # memory leaves time for.
    lr = lr64.to(tl.float32)
    low, high = (packed & (1 << 2 * lanes[None, :])) != 0, (packed & (2 << 2 * lanes[None, :])) != 0
    change = tl.where(low, tl.where(high, float("nan"), lr), tl.where(high, -lr, lr * 0.0))
    p = moved(p, change, decay_of(lr64, hyper))
    if REMAINDER is None:
        store_rounded(p_pointer, p, p == p, mask, P)
    else:
        store_split(p_pointer, r_pointer, p, mask)


def pack_signs(
    table: SegmentTable, mix: Mix, hypers: Tensor, grad_scale: Tensor | None, active: Tensor | None,
    exp_avg: Tensor, packed: Tensor, checksum: Tensor, salt: int,
) -> None:  # fmt: skip
    """The first half for every active segment of the table, and the checksum, in one launch.

    Args:
        table, mix, hypers, grad_scale, active: as for `triton_step.lion_step`.
        exp_avg: the flat momentum buffer that all of the table's momenta lie in.
        packed: uint8, one byte for PER_BYTE elements of ``exp_avg``, in its order.
        checksum: int64, shape (), written.
        salt: as for `reference.hyper_checksum`, in [2**31, 2**63): of one width, so that nothing is compiled twice.
    """
    scale = mix.place(EXP_AVG_SCALE)
    block, num_warps, lanes = PACK[max(mix.grad.itemsize, exp_avg.itemsize), scale is not None]
    table.keep_for_launch(hypers, grad_scale, active)
    launch(
        _lion_pack_kernel,
        max(1, table.tiles * (TILE // block)),
        (
            table.rows, table.tile_segments, table.tiles, table.grad_addresses, active, hypers, grad_scale,
            exp_avg, packed, checksum, hypers.numel(), salt,
        ),
        (
            TRITON_DTYPES[mix.grad], TRITON_DTYPES[exp_avg.dtype], None if scale is None else STATE + scale,
            table.row_width, block, lanes, _WORDS[lanes], triton.next_power_of_2(hypers.numel()),
        ),
        num_warps,
    )  # fmt: skip


def apply_signs(table: SegmentTable, mix: Mix, hypers: Tensor, active: Tensor | None, agree: Tensor) -> None:
    """The second half for every active segment of the table, in one launch.

    Args:
        table: its first state column is the packed signs, uint8.
        mix: storage dtypes and columns.
        hypers, active: as for `triton_step.lion_step`.
        agree: uint8, shape (), on the table's device: 0 leaves everything untouched.
    """
    remainder = mix.place(REMAINDER)
    block, num_warps, lanes = APPLY[mix.param.itemsize, remainder is not None]
    table.keep_for_launch(hypers, active, agree)
    launch(
        _lion_apply_kernel,
        table.tiles * (TILE // block),
        (table.rows, table.tile_segments, active, agree, hypers),
        (
            TRITON_DTYPES[mix.param],
            None if remainder is None else STATE + remainder,
            table.row_width,
            block,
            lanes,
            _WORDS[lanes],
        ),
        num_warps,
    )
