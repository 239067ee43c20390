"""An average of gradients that travel in 16 bits: plain torch and the Triton kernels against the definition, and its
error beside that of a ring that adds in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.reduce_error import NOISE, all_to_all, gradients, measure, ring
from lion_dist.sharding.all_to_all import TorchRows
from tests.marks import needs_interpreter
from tests.scenarios.sixteen_bits import BF16, F16, F32, assert_same_numbers, average_of, awkward

# NumPy, under the interpreter, warns of sums that overflow or are not numbers: on purpose here.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

# For each rank: one unit of ShardLayout, one more than a block, and many blocks.
LENGTHS = (128, 2048 + 128, 128, 3 * 2048, 640)


def rows_of(name: str, outputs: Sequence[Tensor]) -> object:
    if name == "torch":
        return TorchRows(outputs)
    from lion_dist.sharding.triton_rows import TritonRows

    return TritonRows(outputs)


@pytest.mark.parametrize("name", ["torch", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize("world_size", [1, 2, 3, pytest.param(5, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("dtypes", [(F32,), (F16, BF16, F32)], ids=["fp32", "mixed"])
def test_both_halves(name: str, world_size: int, dtypes: tuple[torch.dtype, ...]) -> None:
    """All ranks in one process: what rank r sends to rank s is row r of what s receives."""
    generator = torch.Generator().manual_seed(world_size)
    gradients: list[list[Tensor | None]] = []  # by rank
    for rank in range(world_size):
        own: list[Tensor | None] = []
        for i, length in enumerate(LENGTHS):
            shift = (0, 1, 3, 8)[(i + rank) % 4]  # elements off alignment
            t = awkward(shift + length * world_size, dtypes[i % len(dtypes)], generator)[shift:]
            own.append(None if (i, rank) == (2, 0) or i == 4 else t)
        gradients.append(own)
    sent = [torch.full((world_size, sum(LENGTHS)), 7.0, dtype=BF16) for _ in range(world_size)]
    before = [torch.randn(sum(LENGTHS), generator=generator) for _ in range(world_size)]
    after = [[t.clone(), t.clone()] for t in before]
    halves = [[rows_of(name, t.split(list(LENGTHS))) for t in pair] for pair in after]
    for rank in range(world_size):
        halves[rank][0].round(sent[rank], gradients[rank])  # type: ignore[attr-defined]
    for rank in range(world_size):
        received = torch.stack([rows[rank] for rows in sent])
        for adds in (False, True):
            halves[rank][adds].average(received, adds)  # type: ignore[attr-defined]
        offset = 0
        for i, length in enumerate(LENGTHS):
            expected = average_of([own[i] for own in gradients])
            expected = torch.zeros(world_size * length) if expected is None else expected
            mine, part = expected[rank * length :][:length], slice(offset, offset + length)
            what = f"input {i} on rank {rank}"
            assert_same_numbers(after[rank][0][part], mine, what)
            assert_same_numbers(after[rank][1][part], before[rank][part] + mine, f"{what}, added")
            offset += length


@pytest.mark.parametrize("noise", NOISE)
def test_the_error_does_not_grow_with_the_ranks(noise: float) -> None:
    """Rounding to 8 significant digits is off by 2^-8 of a number at most, 2^-8 / sqrt(3) at most in the mean square.
    The ranks' errors are independent, and those of a ring add up."""
    for ranks in (2, 16, 128):
        g = gradients(ranks, 4096, noise)
        error, wrong = measure(all_to_all, g)
        of_average = (g.square().sum(0).mean() / ranks**2 / g.mean(0).square().mean()).sqrt().item()
        assert 0.5 * of_average * 2**-8 / 3**0.5 < error < of_average * 2**-8 / 3**0.5
        error_of_ring, wrong_of_ring = measure(ring, g)
        assert error_of_ring > (1.2 if ranks == 2 else ranks**0.5 / 2) * error
        assert wrong_of_ring >= wrong
