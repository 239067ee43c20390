"""The two halves of an average in 16 bits (all_to_all.py) as Triton launches, one each for a bucket.

The first half reads gradients where they lie, rounds them and writes the rows to send. The second reads the rows that
were received, and writes or adds averages. Both are bound by memory: for each element of a float32 gradient the first
moves 6 bytes; for each element of an output, of which a rank has a world_size-th, the second moves 2 * world_size + 4.

Piece: what one rank owns of one gradient of the bucket. Its length is a multiple of ALIGN (layout.py), so that pieces
    are aligned in the rows and no access of 16 bytes passes an end. Gradients may lie anywhere.
Block: BLOCK consecutive elements of a piece (the last of a piece may hold fewer). The programs of a row work on its
    blocks in order.

The conversions between float32 and bfloat16 are integer arithmetic, so that Triton's interpreter, whose own truncates,
computes what a GPU does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernel_launch import launch
from ..upload import upload
from .layout import ALIGN

BLOCK = 2048
NUM_WARPS = 4

# Columns of a piece's entry in the table, int64: the number of its first block, its length, where it begins in a row of
# the bucket, the address of its output, and the length of a row of the bucket.
_FIRST_BLOCK, _LENGTH, _OFFSET, _OUTPUT, _ROW_NUMEL = (tl.constexpr(i) for i in range(5))
_COLUMNS = tl.constexpr(5)

# Numbers of the dtypes of gradients, for a kernel that meets several in one bucket.
_NUMBER_OF = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FLOAT32, _BFLOAT16 = (tl.constexpr(_NUMBER_OF[dtype]) for dtype in (torch.float32, torch.bfloat16))

_ALIGN = tl.constexpr(ALIGN)
_NAN_BFLOAT16 = tl.constexpr(0x7FC0)


@triton.jit
def _aligned(number):
    """An int64 from the table, which is a multiple of ALIGN. Without this hint no access of 16 bytes could be made."""
    return tl.multiple_of(tl.load(number), _ALIGN)


@triton.jit
def _find(table, block_pieces, block, BLOCK: tl.constexpr):
    """The piece that a block of a row belongs to.

    Returns:
        The number of the piece, a pointer to its entry in the table, the indices of the block's elements in the piece,
        and which of them exist.
    """
    piece = tl.load(block_pieces + block).to(tl.int64)
    entry = table + piece * _COLUMNS
    elements = (block - tl.load(entry + _FIRST_BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    return piece, entry, elements, elements < _aligned(entry + _LENGTH)


@triton.jit
def _round_block(target, address, elements, mask, DTYPE: tl.constexpr, HINT: tl.constexpr):
    x = tl.load(tl.multiple_of(address.to(tl.pointer_type(DTYPE)), HINT) + elements, mask=mask)
    if tl.bfloat16 == DTYPE:
        rounded = x.to(tl.int16, bitcast=True)
    else:
        x = x.to(tl.float32)
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, halves to even
        rounded = tl.where(x == x, rounded, _NAN_BFLOAT16).to(tl.int16)
    tl.store(target, rounded, mask=mask)


@triton.jit
def _round_from(target, address, elements, mask, dtype, HINT: tl.constexpr):
    if dtype == _FLOAT32:
        _round_block(target, address, elements, mask, tl.float32, HINT)
    elif dtype == _BFLOAT16:
        _round_block(target, address, elements, mask, tl.bfloat16, HINT)
    else:
        _round_block(target, address, elements, mask, tl.float16, HINT)


@triton.jit(do_not_specialize=["blocks"])
def _round_kernel(table, block_pieces, gradients, rows, blocks, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    rank, block = program // blocks, program % blocks
    piece, entry, elements, mask = _find(table, block_pieces, block, BLOCK)
    target = rows + rank * _aligned(entry + _ROW_NUMEL) + _aligned(entry + _OFFSET) + elements
    source = rank * _aligned(entry + _LENGTH) + elements
    address, dtype = tl.load(gradients + 2 * piece), tl.load(gradients + 2 * piece + 1)
    if address == 0:
        tl.store(target, tl.zeros((BLOCK,), tl.int16), mask=mask)
    elif address % 16 == 0:
        _round_from(target, address, source, mask, dtype, 16)
    else:
        _round_from(target, address, source, mask, dtype, 1)


@triton.jit
def _float32_of(bits):
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _average_kernel(
    table, block_pieces, rows, WORLD_SIZE: tl.constexpr, ADDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    _, entry, elements, mask = _find(table, block_pieces, tl.program_id(0).to(tl.int64), BLOCK)
    contribution = rows + _aligned(entry + _OFFSET) + elements
    row_numel = _aligned(entry + _ROW_NUMEL)
    total = _float32_of(tl.load(contribution, mask=mask))
    for rank in range(1, WORLD_SIZE):
        total += _float32_of(tl.load(contribution + rank * row_numel, mask=mask))
    if WORLD_SIZE & (WORLD_SIZE - 1) == 0:
        average = total * (1.0 / WORLD_SIZE)  # a power of two: the product is the quotient
    else:  # not by `/`, which is an approximation on GPUs; a division takes a dozen instructions
        average = tl.div_rn(total, tl.full((BLOCK,), WORLD_SIZE, tl.float32))
    output = tl.multiple_of(tl.load(entry + _OUTPUT).to(tl.pointer_type(tl.float32)), 16) + elements
    if ADDS:
        average = tl.load(output, mask=mask) + average
    tl.store(output, average, mask=mask)


class TritonRows:
    """The two halves of a bucket's average as Triton launches. Their bits are those of `round_rows` and `average_rows`,
    except in a NaN.

    Args:
        outputs: float32, 1-D, on one device, at addresses that are multiples of 16, of lengths that are multiples of
            ALIGN. They stay where they are.
    """

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        self._device = outputs[0].device
        self._kept = list(outputs)  # as the table has their addresses
        row_numel = sum(t.numel() for t in outputs)
        table, counts, offset, self._blocks = [], [], 0, 0
        for t in outputs:
            assert t.dtype == torch.float32, t.dtype
            assert t.numel() % ALIGN == t.data_ptr() % 16 == 0, (t.numel(), t.data_ptr())
            table.append([self._blocks, t.numel(), offset, t.data_ptr(), row_numel])
            counts.append(-(-t.numel() // BLOCK))
            self._blocks += counts[-1]
            offset += t.numel()
        self._table = upload(table, torch.int64, self._device)
        numbers = torch.arange(len(counts), dtype=torch.int32, device="cpu")
        pieces = torch.repeat_interleave(numbers, torch.tensor(counts, dtype=torch.int64, device="cpu"))
        if self._device.type == "cuda":
            pieces = pieces.pin_memory()
        self._block_pieces = pieces.to(self._device, non_blocking=True)

    def round(self, rows: Tensor, inputs: Sequence[Tensor | None]) -> None:
        """`all_to_all.round_rows`."""
        described = [(0, 0) if t is None else (t.data_ptr(), _NUMBER_OF[t.dtype]) for t in inputs]
        gradients = upload(described, torch.int64, self._device)
        arguments = self._table, self._block_pieces, gradients, rows.view(torch.int16), self._blocks
        self._launch(_round_kernel, len(rows) * self._blocks, arguments, (BLOCK,))

    def average(self, rows: Tensor, adds: bool) -> None:
        """`all_to_all.average_rows`."""
        arguments = self._table, self._block_pieces, rows.view(torch.int16)
        self._launch(_average_kernel, self._blocks, arguments, (len(rows), adds, BLOCK))

    def _launch(
        self, kernel: object, programs: int, arguments: Sequence[Tensor | int], constants: Sequence[object]
    ) -> None:
        if self._device.type == "cuda":
            # The stream may be another than that of the tables, which may be dropped before the launch has run.
            stream = torch.cuda.current_stream(self._device)
            self._table.record_stream(stream)
            self._block_pieces.record_stream(stream)
        launch(kernel, programs, arguments, constants, NUM_WARPS)
