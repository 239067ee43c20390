"""A tensor's elements in memory order: by address, whatever the order of its dimensions.

Lion is elementwise, so a channels-last or transposed tensor can be stepped, cut and sent as 1-D memory, as long as its
gradient and its momentum have the same memory order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_dense(t: Tensor) -> bool:
    """Whether t's elements fill one block of memory without gaps or overlaps, in some order of dimensions."""
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(t.stride(), t.shape, strict=True) if sz != 1):
        if stride != expected:
            return t.numel() == 0
        expected *= size
    return True


def may_overlap(t: Tensor) -> bool:
    """Whether two elements of t may share an address, as in an expanded tensor."""
    reach = 0  # the furthest address, in elements, that dimensions of smaller strides reach
    for stride, size in sorted((st, sz) for st, sz in zip(t.stride(), t.shape, strict=True) if sz != 1):
        if stride <= reach:
            return t.numel() > 0
        reach += stride * (size - 1)
    return False


def flat_bytes(t: Tensor) -> Tensor:
    """The bytes of a dense tensor in memory order, as a uint8 1-D tensor of the same memory."""
    size = t.element_size()
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(
        t.untyped_storage(), t.storage_offset() * size, (t.numel() * size,), (1,)
    )


def flat(t: Tensor, start: int = 0, length: int | None = None) -> Tensor:
    """Elements of a dense tensor in memory order, as a 1-D tensor of the same memory.

    The result is not a view of t to autograd and torch.compile, which would compile anew for each shape of the base.
    Code that writes to it must tell autograd so (`torch.autograd.graph.increment_version`).

    Args:
        t: a dense tensor.
        start: number of the first element.
        length: number of elements; None: all from ``start`` on.
    """
    shape = (t.numel() - start if length is None else length,)
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(
        t.untyped_storage(), t.storage_offset() + start, shape, (1,)
    )


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether a and b, which have one shape, have the same memory order."""
    return a.stride() == b.stride() or all(
        x == y for x, y, size in zip(a.stride(), b.stride(), a.shape, strict=True) if size > 1
    )


def laid_out_like(t: Tensor, like: Tensor) -> Tensor:
    """t itself if it has the memory order of ``like``, otherwise a copy that has, in the dtype and on the device of
    t."""
    if t.shape == like.shape and same_layout(t, like):
        return t
    return torch.empty_strided(like.shape, like.stride(), dtype=t.dtype, device=t.device).copy_(t)
