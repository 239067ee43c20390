"""Conversions of a momentum between numbers and 8-bit codes (update/codecs.py), for tensors as parameters have them.

Blocks are counted in the memory order of the codes' tensor, which is the parameter's where this library made it. Of a
sharded parameter each rank converts its own part: blocks begin at the start of that part, and the scales are a plain
1-D tensor for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fsdp import local, new_state
from .memory_order import flat, is_dense, laid_out_like
from .update import codecs
from .update.state import EXP_AVG, StateColumn

BLOCK = codecs.BLOCK
PIECE = (
    1 << 20
)  # elements that are converted at a time, a multiple of BLOCK: a conversion needs several temporary tensors


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
        float32, in the shape, sharding and memory order of ``like`` and on its device. Exact.
    """
    m = new_state([like], [StateColumn(EXP_AVG, torch.float32)])[0]
    source = _dense(local(codes))
    numbers = decoded_run(flat(source), scale.to(source.device))
    local(m).copy_(numbers.as_strided(source.shape, source.stride()))
    return m


def encoded(m: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of a momentum, rounded to nearest.

    Codes that were decoded are found again, with their scales, if the blocks are the same.

    Args:
        m: a floating dtype, in the shape and sharding of ``like``.
        like: the parameter.

    Returns:
        Codes, int8, in the shape, sharding and memory order of ``like``; scales, float32, shape (ceil(n / 128),) for
        the n elements that this rank holds. Both are on the device of ``like``.
    """
    codes = new_state([like], [StateColumn(EXP_AVG, torch.int8)])[0]
    part = local(codes)
    run, scale = encoded_run(flat(laid_out_like(local(m), part)).to(part.device))
    flat(part).copy_(run)
    return codes, scale


def decoded_run(codes: Tensor, scale: Tensor) -> Tensor:
    """`decoded` for elements in memory order: int8, shape (n,), and float32, shape (ceil(n / 128),); to float32."""
    m = torch.empty(codes.shape, device=codes.device)
    for at in range(0, codes.numel(), PIECE):
        m[at : at + PIECE] = codecs.decode(codes[at : at + PIECE], scale[at // BLOCK : (at + PIECE) // BLOCK])
    return m


def encoded_run(m: Tensor) -> tuple[Tensor, Tensor]:
    """`encoded` for elements in memory order: a floating dtype, shape (n,); to codes and scales."""
    codes = torch.empty(m.shape, dtype=torch.int8, device=m.device)
    scale = torch.empty(scales_of(m.numel()), device=m.device)
    for at in range(0, m.numel(), PIECE):
        codes[at : at + PIECE], scale[at // BLOCK : (at + PIECE) // BLOCK] = codecs.encode(m[at : at + PIECE].float())
    return codes, scale


def _dense(t: Tensor) -> Tensor:
    """t itself if it is dense, else a copy that is."""
    return t if is_dense(t) else t.contiguous()
