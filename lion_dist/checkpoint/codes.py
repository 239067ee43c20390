"""8-bit momenta (update/codecs.py) where they lie: in a parameter's shape, or in a shard's boxes of it.

The codes of a rank's part of a parameter lie one after another in memory, in one or several runs. Blocks, which share a
scale, are counted in each run from its first code on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..update.codecs import BLOCK, decode, encode

# Elements that are converted at a time, a multiple of BLOCK: it takes several temporary tensors.
PIECE = 1 << 14
PIECE_ON_GPU = 1 << 20


class CodeRun(NamedTuple):
    """8-bit codes that lie one after another in memory, with blocks that begin at the first one.

    Attributes:
        parts: the codes, as views in the shapes of boxes.
        first: index, in their storage, of the first code.
        numel: number of codes.
        scale: float32, shape (ceil(numel / BLOCK),): their scales, in place.
    """

    parts: list[Tensor]
    first: int
    numel: int
    scale: Tensor

    @property
    def codes(self) -> Tensor:
        """The codes in memory order, int8, 1-D, in place."""
        return self.parts[0].as_strided((self.numel,), (1,), self.first)

    def empty(self) -> tuple[Tensor, list[Tensor]]:
        """Memory for the momentum that the codes stand for: float32, 1-D, and views of it that lie as the parts do."""
        buffer = torch.empty(self.numel, dtype=torch.float32, device=self.scale.device)
        views = [buffer.as_strided(p.shape, p.stride(), p.storage_offset() - self.first) for p in self.parts]
        return buffer, views

    def take(self, m: Tensor) -> None:
        """Encodes a momentum into the codes and scales, to nearest.

        Args:
            m: float32, 1-D, in memory order.
        """
        codes = self.codes
        size = PIECE_ON_GPU if m.is_cuda else PIECE
        for at in range(0, self.numel, size):
            stop = min(at + size, self.numel)
            some, scale = encode(m[at:stop])
            codes[at:stop].copy_(some)
            self.scale[at // BLOCK : -(-stop // BLOCK)].copy_(scale)


def code_runs(codes: Sequence[Tensor], scale: Sequence[Tensor]) -> list[CodeRun]:
    """The runs of this rank's codes.

    Args:
        codes: int8, dense views; of a run that is cut into boxes, one after another.
        scale: float32, 1-D: the scales, in the same order.
    """
    runs, scales = _runs(codes), [run for run in _runs(scale) if _numel(run)]
    found = []
    for run in runs:
        numel, first = _numel(run), int(run[0].storage_offset())
        of_run = scales.pop(0) if numel else []
        none = torch.empty(0, dtype=torch.float32, device=run[0].device)
        one = of_run[0].as_strided((_numel(of_run),), (1,)) if of_run else none
        if one.numel() != -(-numel // BLOCK):
            raise ValueError(f"expected {-(-numel // BLOCK)} scales for {numel} 8-bit codes, got {one.numel()}")
        found.append(CodeRun(run, first, numel, one))
    return found


def _runs(parts: Sequence[Tensor]) -> list[list[Tensor]]:
    """The parts that lie one after another in one storage, together."""
    runs: list[list[Tensor]] = []
    end = (0, -1)
    for part in parts:
        storage, start = part.untyped_storage().data_ptr(), int(part.storage_offset())
        if not runs or end != (storage, start):
            runs.append([])
        runs[-1].append(part)
        end = storage, start + part.numel()
    return runs


def _numel(parts: Sequence[Tensor]) -> int:
    return sum(part.numel() for part in parts)


def decode_at(codes: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    """The momentum of codes that need not lie one after another.

    Args:
        codes: int8, any shape.
        index: int64, the same shape: the number of each code from the start of the first block on.
        scale: float32, 1-D: the scales of all blocks.

    Returns:
        float32, the same shape.
    """
    ones = torch.ones(-(-codes.numel() // BLOCK), dtype=torch.float32, device=codes.device)
    levels = decode(codes.reshape(-1), ones).view(codes.shape)
    return levels * scale[index // BLOCK]
