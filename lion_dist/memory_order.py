"""A tensor's elements in memory order: by address, whatever the order of its dimensions.

Lion is elementwise, so a channels-last or transposed tensor can be stepped, cut and sent as 1-D memory,
as long as everything that goes with it (gradient, momentum) lies in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_dense(t: Tensor) -> bool:
    """Whether t's elements fill one block of memory, each address once, in some order of dimensions."""
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(t.stride(), t.shape, strict=True) if sz != 1):
        if stride != expected:
            return t.numel() == 0
        expected *= size
    return True


def may_overlap(t: Tensor) -> bool:
    """Whether two indices of t may share an address (an expanded tensor, for one)."""
    reach = 0  # the furthest address, in elements, that the smaller strides get to
    for stride, size in sorted((st, sz) for st, sz in zip(t.stride(), t.shape, strict=True) if sz != 1):
        if stride <= reach:
            return t.numel() > 0
        reach += stride * (size - 1)
    return False


def flat_bytes(t: Tensor) -> Tensor:
    """The bytes of a dense tensor in memory order: uint8, 1-D, of the same memory."""
    size = t.element_size()
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(
        t.untyped_storage(), t.storage_offset() * size, (t.numel() * size,), (1,)
    )


def flat(t: Tensor, start: int = 0, length: int | None = None) -> Tensor:
    """Elements of a dense tensor in memory order: 1-D, of the same memory, all of them or ``length``
    from ``start``.

    Not a view to autograd and torch.compile, which would compile anew for each shape of the base; so
    whoever writes through it tells autograd (`torch.autograd.graph.increment_version`).
    """
    shape = (t.numel() - start if length is None else length,)
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(
        t.untyped_storage(), t.storage_offset() + start, shape, (1,)
    )


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether a and b, of one shape, put their elements in the same memory order."""
    return a.stride() == b.stride() or all(
        x == y for x, y, size in zip(a.stride(), b.stride(), a.shape, strict=True) if size > 1
    )


def laid_out_like(t: Tensor, like: Tensor) -> Tensor:
    """t itself, or a copy of it with the memory order of ``like`` (dtype and device stay t's)."""
    if t.shape == like.shape and same_layout(t, like):
        return t
    return torch.empty_strided(like.shape, like.stride(), dtype=t.dtype, device=t.device).copy_(t)
