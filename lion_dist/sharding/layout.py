"""Who owns which elements: integers only, no torch.

A parameter's elements are taken in memory order and numbered from 0.

Head: the largest multiple of world_size * ALIGN elements of a parameter, cut into world_size equal
    slices, the r-th owned by rank r. It lies where the parameter lies, so that a reduce-scatter of its
    gradient and an all-gather of its weights need no copy.
Tail: the rest, fewer than world_size * ALIGN elements; all of a small parameter.
Pack: the tails laid one after another at multiples of ALIGN, padded at the end to a multiple of
    world_size * ALIGN and cut into world_size equal slices too. Only the pack is ever staged.
Shard: what one rank owns: its slices of all heads in parameter order, then its slice of the pack. Of
    one length on every rank; addressed by `ParamSlice`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGN = 128  # elements; whole 16-byte accesses in every dtype, and one quantisation block


@dataclass(frozen=True)
class ParamSlice:
    """``length`` elements of parameter ``param`` from ``start``, owned by ``rank`` at ``shard_offset``
    of its shard."""

    param: int
    start: int
    length: int
    rank: int
    shard_offset: int


@dataclass(frozen=True)
class Tail:
    """``length`` elements of parameter ``param`` from ``start`` to its end, at ``pack_offset``."""

    param: int
    start: int
    length: int
    pack_offset: int


@dataclass(frozen=True)
class ShardLayout:
    """The cut of parameters of ``numels`` elements over ``world_size`` ranks.

    Attributes:
        heads: length of each parameter's head, a multiple of world_size * ALIGN, or 0.
        tails: one for each parameter whose tail is not empty.
        pack_numel: length of the pack with its padding.
        shard_numel: length of one rank's shard, the same on every rank.
    """

    numels: tuple[int, ...]
    world_size: int
    heads: tuple[int, ...]
    tails: tuple[Tail, ...]
    pack_numel: int
    shard_numel: int

    @staticmethod
    def make(numels: Sequence[int], world_size: int) -> ShardLayout:
        if world_size < 1 or any(n < 0 for n in numels):
            raise ValueError(f"expected world_size >= 1 and numels >= 0, got {world_size} and {tuple(numels)}")
        unit = world_size * ALIGN
        heads = tuple(n - n % unit for n in numels)
        tails, end = [], 0
        for param, (n, head) in enumerate(zip(numels, heads, strict=True)):
            if n > head:
                tails.append(Tail(param, head, n - head, end))
                end += -(-(n - head) // ALIGN) * ALIGN
        pack_numel = -(-end // unit) * unit
        shard_numel = (sum(heads) + pack_numel) // world_size
        return ShardLayout(tuple(numels), world_size, heads, tuple(tails), pack_numel, shard_numel)

    @property
    def pack_shard_offset(self) -> int:
        """Where a rank's slice of the pack begins in its shard."""
        return sum(self.heads) // self.world_size

    def slices(self, rank: int) -> tuple[ParamSlice, ...]:
        """What ``rank`` owns, in the order of its shard."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"expected a rank in [0, {self.world_size}), got {rank}")
        owned, offset = [], 0
        for param, head in enumerate(self.heads):
            length = head // self.world_size
            if length:
                owned.append(ParamSlice(param, rank * length, length, rank, offset))
            offset += length
        pack_length = self.pack_numel // self.world_size
        first, last = rank * pack_length, (rank + 1) * pack_length
        for tail in self.tails:
            begin = max(first, tail.pack_offset)
            end = min(last, tail.pack_offset + tail.length)
            if begin < end:
                start = tail.start + begin - tail.pack_offset
                owned.append(ParamSlice(tail.param, start, end - begin, rank, offset + begin - first))
        return tuple(owned)
