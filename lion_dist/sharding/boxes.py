"""Boxes of a tensor: integers only, no torch.

Box: the elements whose index lies in ``offsets[d] : offsets[d] + sizes[d]`` in every dimension d.
    torch.distributed.checkpoint calls it a chunk: it saves and shards tensors as boxes that do not overlap.
Order: the dimensions of a dense tensor from the outermost to the innermost in memory, (0, 1, ..., ndim - 1) if it is
    row-major. Elements are numbered in that order, in which `ShardLayout` cuts them.
"""

from __future__ import annotations

import random
import secrets
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

_PRIME = (1 << 127) - 1


@dataclass(frozen=True)
class Box:
    """A hyper-rectangle of a tensor. Without dimensions it is the only element, with offsets and sizes ()."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.sizes)

    def overlap(self, other: Box) -> Box | None:
        """The box of the elements that both boxes have in common; None if there are none."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        ends = (
            min(a + n, b + m) for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        sizes = tuple(end - offset for end, offset in zip(ends, offsets, strict=True))
        return Box(offsets, sizes) if all(size > 0 for size in sizes) else None

    def slices(self, origin: Sequence[int] | None = None) -> tuple[slice, ...]:
        """Slices that take the box from a tensor.

        Args:
            origin: index, in the whole, of that tensor's first element; None if it is the whole.
        """
        starts = self.offsets if origin is None else [o - at for o, at in zip(self.offsets, origin, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.sizes, strict=True))

    def hull(self, shape: Sequence[int]) -> tuple[int, int]:
        """The shortest run of a row-major tensor of ``shape`` that contains the box: (start, stop), (0, 0) if it is
        empty."""
        if not self.numel:
            return 0, 0
        first = last = 0
        for offset, size, extent in zip(self.offsets, self.sizes, shape, strict=True):
            first = first * extent + offset
            last = last * extent + offset + size - 1
        return first, last + 1


def memory_order(strides: Sequence[int]) -> tuple[int, ...]:
    """The order of the dimensions of a dense tensor with these strides."""
    return tuple(sorted(range(len(strides)), key=lambda d: -strides[d]))


def cut(shape: Sequence[int], start: int, stop: int, order: Sequence[int] | None = None) -> list[Box]:
    """Cuts a run of a dense tensor's elements into boxes.

    Args:
        shape: shape of the tensor.
        start, stop: the elements from ``start`` to ``stop``, which is excluded.
        order: order of the tensor's dimensions; None is row-major.

    Returns:
        At most 2 * ndim - 1 boxes, or one if there are no dimensions. Each is a run of elements, and they are in order.

    Raises:
        ValueError: the run is not in the tensor, or the order does not have each dimension once.
    """
    if not 0 <= start <= stop <= prod(shape):
        raise ValueError(f"expected 0 <= start <= stop <= {prod(shape)} for shape {tuple(shape)}, got {start}, {stop}")
    if order is None:
        return [Box(offsets, sizes) for offsets, sizes in _cut(tuple(shape), start, stop)]
    place = {d: i for i, d in enumerate(order)}
    if sorted(place) != list(range(len(shape))):
        raise ValueError(f"expected an order with each dimension of shape {tuple(shape)} once, got {tuple(order)}")
    back = [place[d] for d in range(len(shape))]
    return [
        Box(tuple(offsets[i] for i in back), tuple(sizes[i] for i in back))
        for offsets, sizes in _cut(tuple(shape[d] for d in order), start, stop)
    ]


def _cut(shape: tuple[int, ...], start: int, stop: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The boxes as (offsets, sizes): the end of the first row, whole rows, and the beginning of the last."""
    if start == stop:
        return []
    if not shape:
        return [((), ())]
    inner = shape[1:]
    row = prod(inner)
    (first, begin), (last, end) = divmod(start, row), divmod(stop, row)

    def within(index: int, start: int, stop: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        return [((index, *offsets), (1, *sizes)) for offsets, sizes in _cut(inner, start, stop)]

    if first == last:
        return within(first, begin, end)
    boxes = []
    if begin:
        boxes += within(first, begin, row)
        first += 1
    if first < last:
        boxes.append(((first, *[0] * len(inner)), (last - first, *inner)))
    return boxes + within(last, 0, end)


def check_cover(shape: Sequence[int], boxes: Sequence[Box]) -> None:
    """Raises ValueError unless every element of a tensor of ``shape`` is in exactly one of the boxes."""
    for box in boxes:
        if len(box.offsets) != len(shape) or len(box.sizes) != len(shape):
            raise ValueError(f"{box} has other dimensions than shape {tuple(shape)}; expected {len(shape)}")
        if any(o < 0 or n < 0 or o + n > extent for o, n, extent in zip(box.offsets, box.sizes, shape, strict=True)):
            raise ValueError(f"{box} is not within shape {tuple(shape)}")
    full = [box for box in boxes if box.numel]
    covered = sum(box.numel for box in full)
    # Boxes that have the right number of elements together and do not overlap leave nothing out.
    if covered != prod(shape):
        raise ValueError(f"{len(full)} boxes hold {covered} elements of {prod(shape)} of shape {tuple(shape)}")
    if not shape or len(full) < 2:
        return
    # [Note: Cover] Let z be variables, one for each index of a dimension. In one dimension a box is described by
    # z[stop] - z[start], and in several dimensions by the product of these. The boxes have every element once if and
    # only if their products add up to the product of the whole shape, as polynomials in the z. Two polynomials are
    # compared by their values at one random point modulo a prime: unequal ones agree with a probability below
    # ndim / 2**120. This takes one pass. Comparing the boxes in pairs could be made quadratic by an attacker.
    draw = random.Random(secrets.randbits(256))  # an attacker cannot predict the point
    points: list[dict[int, int]] = [defaultdict(lambda: draw.getrandbits(126)) for _ in shape]

    def value(offsets: Sequence[int], sizes: Sequence[int]) -> int:
        product = 1
        for z, start, size in zip(points, offsets, sizes, strict=True):
            product = product * (z[start + size] - z[start]) % _PRIME
        return product

    if sum(value(box.offsets, box.sizes) for box in full) % _PRIME != value([0] * len(shape), shape):
        raise ValueError(
            f"{len(full)} boxes overlap: some elements of shape {tuple(shape)} are in several of them, others in none"
        )
