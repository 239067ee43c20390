"""How a load converts stored elements to the form that they have here, while it reads them.

A conversion is given elements of a stored tensor, 1-D, and `Where` they lie in it, and returns as many elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..update import codecs
from ..update.reference import STORAGE_DTYPES
from .codes import decode_at


class Where(NamedTuple):
    """Where consecutive elements of a box of a tensor lie.

    Attributes:
        shape: shape of the whole tensor.
        offsets, sizes: the box.
        start: number of the first element in the box, in row-major order.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int

    def numbers(self, count: int) -> Tensor:
        """The numbers of the elements in the whole tensor, in row-major order, int64."""
        rest = torch.arange(self.start, self.start + count, device="cpu")
        numbers, stride = torch.zeros_like(rest), 1
        for extent, offset, size in zip(self.shape[::-1], self.offsets[::-1], self.sizes[::-1], strict=True):
            numbers += (rest % size + offset) * stride
            rest //= size
            stride *= extent
        return numbers


Conversion: TypeAlias = Callable[[Tensor, Where], Tensor]


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Elements in another dtype. A NaN gets the form in which Lion stores it; torch would leave other bits."""
    if values.dtype == dtype:
        return values
    found = values.to(dtype)
    return found.masked_fill_(found.isnan(), math.nan) if dtype in STORAGE_DTYPES else found


def rounded(values: Tensor, where: Where) -> Tensor:
    """The bfloat16 weights of master weights."""
    return codecs.split(values.float())[0]


def remainders(values: Tensor, where: Where) -> Tensor:
    """The remainders of master weights."""
    return codecs.split(values.float())[1]


def as_float32(values: Tensor, where: Where) -> Tensor:
    """The same numbers in float32."""
    return values.float()


def as_int16(values: Tensor, where: Where) -> Tensor:
    """Integers of 16 bits."""
    return values.to(torch.int16)


def decoded(scale: Tensor) -> Conversion:
    """The momenta of 8-bit codes.

    Args:
        scale: the scales of all blocks, float32, 1-D.
    """

    def convert(values: Tensor, where: Where) -> Tensor:
        return decode_at(values, where.numbers(values.numel()), scale)

    return convert


def scaled(scale: Tensor) -> Conversion:
    """Momenta that are stored as numbers to be multiplied by one float32 scale, shape ()."""

    def convert(values: Tensor, where: Where) -> Tensor:
        return values.float() * scale

    return convert
