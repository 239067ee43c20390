"""Which rank owns which elements: integers only, no torch.

The elements of a parameter are numbered from 0 in memory order.

Run: consecutive elements of one parameter.
Head: the largest multiple of world_size * ALIGN elements of a parameter, cut into world_size equal runs, the r-th owned
    by rank r. A head is communicated where it lies: reduce-scattering its gradient and all-gathering its weights need
    no copy.
Tail: the rest of the parameter, fewer than world_size * ALIGN elements. A small parameter is all tail.
Tail buffer: the tails one after another, each at a multiple of ALIGN, padded at the end to a multiple of
    world_size * ALIGN and cut into world_size equal parts. Only tails are copied in order to be communicated.
Shard: what one rank owns: its runs of all heads in the order of the parameters, then its part of the tail buffer. All
    shards have the same length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGN = 128  # elements; whole 16-byte accesses in every dtype, and one quantisation block


@dataclass(frozen=True)
class Run:
    """``length`` elements of parameter ``param`` from ``start``, which lie at ``offset`` in a flat buffer.

    Starts and offsets are multiples of ALIGN.
    """

    param: int
    start: int
    length: int
    offset: int


@dataclass(frozen=True)
class ShardLayout:
    """How parameters are cut over the ranks.

    Attributes:
        world_size: number of ranks.
        heads: length of each parameter's head; 0 if it has none.
        tails: the tails that are not empty; their offsets count in the tail buffer.
        tail_buffer_numel: length of the tail buffer, padding included.
        shard_numel: length of one rank's shard.
    """

    world_size: int
    heads: tuple[int, ...]
    tails: tuple[Run, ...]
    tail_buffer_numel: int
    shard_numel: int

    @staticmethod
    def make(numels: Sequence[int], world_size: int) -> ShardLayout:
        """The layout of parameters with these numbers of elements.

        Raises:
            ValueError: a negative number of elements, or no ranks.
        """
        if world_size < 1 or any(n < 0 for n in numels):
            raise ValueError(f"expected world_size >= 1 and numels >= 0, got {world_size} and {tuple(numels)}")
        unit = world_size * ALIGN
        heads = tuple(n - n % unit for n in numels)
        tails, end = [], 0
        for param, (n, head) in enumerate(zip(numels, heads, strict=True)):
            if n > head:
                tails.append(Run(param, head, n - head, end))
                end += _rounded_up(n - head, ALIGN)
        tail_buffer_numel = _rounded_up(end, unit)
        shard_numel = (sum(heads) + tail_buffer_numel) // world_size
        return ShardLayout(world_size, heads, tuple(tails), tail_buffer_numel, shard_numel)

    @property
    def tail_shard_offset(self) -> int:
        """Where a rank's part of the tail buffer begins in its shard."""
        return sum(self.heads) // self.world_size

    def slices(self, rank: int) -> tuple[Run, ...]:
        """The runs that a rank owns, in the order of its shard; their offsets count in the shard.

        Raises:
            ValueError: no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"expected a rank in [0, {self.world_size}), got {rank}")
        owned, offset = [], 0
        for param, head in enumerate(self.heads):
            length = head // self.world_size
            if length:
                owned.append(Run(param, rank * length, length, offset))
            offset += length
        part = self.tail_buffer_numel // self.world_size
        first, last = rank * part, (rank + 1) * part
        for tail in self.tails:
            begin = max(first, tail.offset)
            end = min(last, tail.offset + tail.length)
            if begin < end:
                start = tail.start + begin - tail.offset
                owned.append(Run(tail.param, start, end - begin, offset + begin - first))
        return tuple(owned)


def _rounded_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
