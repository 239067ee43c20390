"""Equality of bits. Lion stores NaN in one canonical form a dtype, so two results are the same exactly
where all their bits are: -0.0 differs from 0.0, and one NaN from another."""

import torch
from torch import Tensor

from lion_dist.update.reference import NAN_BITS


def bits(t: Tensor) -> Tensor:
    """A copy of t's bit patterns as integers, in t's shape."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.detach().clone(memory_format=torch.contiguous_format).view(integer)


def assert_same_bits(got: Tensor, expected: Tensor, what: str = "") -> None:
    """Fails with the first few elements that differ."""
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    assert got.dtype == expected.dtype, f"{what}: dtype {got.dtype}, expected {expected.dtype}"
    differ = (bits(got) != bits(expected)).reshape(-1)
    if differ.any():
        where = differ.nonzero().reshape(-1)
        lines = [
            f"  [{i}] got {got.reshape(-1)[i].item()!r}, expected {expected.reshape(-1)[i].item()!r}" for i in where[:8]
        ]
        raise AssertionError(f"{what}: {len(where)} of {got.numel()} elements differ\n" + "\n".join(lines))


def assert_canonical_nan(t: Tensor, where: Tensor, what: str = "") -> None:
    """Fails unless t is NaN exactly at ``where`` (bool, t's shape), in the bits that t's dtype stores."""
    assert torch.equal(t.isnan(), where), f"{what}: NaN in the wrong places"
    expected = torch.full_like(bits(t)[where], NAN_BITS[t.dtype][1])
    assert torch.equal(bits(t)[where], expected), f"{what}: NaN bits {[hex(b) for b in bits(t)[where].unique()]}"
