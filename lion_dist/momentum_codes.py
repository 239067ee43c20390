"""Conversions of a momentum between numbers and 8-bit codes (update/codecs.py), for tensors as parameters have them.

Blocks are counted in the memory order of the codes' tensor, which is the parameter's where this library made it. Of a
sharded parameter each rank converts its own part: blocks begin at the start of that part, and the scales are a plain
1-D tensor for it. Nothing is communicated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dtensors import local, placed_like
from .memory_order import flat, is_dense, laid_out_like
from .update import codecs

BLOCK = codecs.BLOCK
PIECE = 1 << 20  # elements that are converted at a time, a multiple of BLOCK: a conversion needs several temporaries


def scales_of(numel: int) -> int:
    """Number of scales that ``numel`` elements have."""
    return -(-numel // BLOCK)


def decoded(codes: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """The momentum of codes.

    Args:
        codes: int8, in the shape and sharding of ``like``.
        scale: float32, shape (ceil(n / 128),), for the n elements that this rank holds.
        like: the parameter.

    Returns:
        float32, in the shape, sharding and memory order of ``like``, on the device of ``codes``. Exact.
    """
    part = local(codes)
    part = part if is_dense(part) else part.contiguous()
    m = decoded_run(flat(part), scale.to(part.device)).as_strided(part.shape, part.stride())
    return placed_like(laid_out_like(m, _dense_layout(like)), like)


def encoded(m: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of a momentum, rounded to nearest.

    Codes that were decoded are found again, with their scales, if the blocks are the same.

    Args:
        m: a floating dtype, in the shape and sharding of ``like``.
        like: the parameter.

    Returns:
        Codes, int8, in the shape, sharding and memory order of ``like``; scales, float32, shape (ceil(n / 128),) for
        the n elements that this rank holds. Both are on the device of ``m``.
    """
    layout = _dense_layout(like)
    codes, scale = encoded_run(flat(laid_out_like(local(m).detach(), layout)))
    return placed_like(codes.as_strided(layout.shape, layout.stride()), like), scale


def in_order_of(like: Tensor, codes: Tensor) -> bool:
    """Whether the blocks of codes, in the shape of ``like``, are counted as those of ``like`` are."""
    part = local(codes)
    return is_dense(part) and laid_out_like(part, _dense_layout(like)) is part


def cast(m: Tensor, dtype: torch.dtype) -> Tensor:
    """A momentum in another dtype: itself if it has it, else a plain tensor or DTensor as ``m`` is, in its layout.

    A NaN gets the form in which Lion stores it. Conversions of torch leave other bits.
    """
    if m.dtype == dtype:
        return m
    part = local(m).to(dtype)
    return placed_like(part.masked_fill_(part.isnan(), math.nan), m)


def decoded_run(codes: Tensor, scale: Tensor) -> Tensor:
    """`decoded` for elements in memory order: int8, shape (n,), and float32, shape (ceil(n / 128),); to float32."""
    m = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for at in range(0, codes.numel(), PIECE):
        m[at : at + PIECE] = codecs.decode(codes[at : at + PIECE], scale[at // BLOCK : (at + PIECE) // BLOCK])
    return m


def encoded_run(m: Tensor) -> tuple[Tensor, Tensor]:
    """`encoded` for elements in memory order: a floating dtype, shape (n,); to codes and scales."""
    codes = torch.empty(m.shape, dtype=torch.int8, device=m.device)
    scale = torch.empty(scales_of(m.numel()), dtype=torch.float32, device=m.device)
    for at in range(0, m.numel(), PIECE):
        codes[at : at + PIECE], scale[at // BLOCK : (at + PIECE) // BLOCK] = codecs.encode(m[at : at + PIECE].float())
    return codes, scale


def _dense_layout(like: Tensor) -> Tensor:
    """A tensor without memory, with the shape and strides that the momentum of a parameter has on this rank."""
    return torch.empty_like(local(like), device="meta", memory_format=torch.preserve_format)
