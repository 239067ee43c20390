"""reduce_dtype=torch.bfloat16: the bits of its definition, for gradients of any values and whatever becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import run_ranks
from tests.scenarios.passes import FEW, ONE, TINY
from tests.scenarios.sixteen_bits import ALL, BF16, F16, F32, Twins


def train(twins: Twins, clip: bool) -> None:
    """Every way that a gradient may take."""
    ranks = range(twins.world_size)
    everywhere = [ALL] * twins.world_size

    def parts(salt: int) -> list[list[int]]:
        """Other parameters on every rank; of some no rank has a gradient."""
        return [[i for i in ALL if (i * 7 + r * 3 + salt) % 5 < 2 and i != 4] or [0] for r in ranks]

    twins.backward(1, everywhere)
    twins.step("plain")
    twins.backward(2, parts(0))
    twins.step("parts", 5.0 if clip else None)
    for number in (3, 4):
        twins.backward(number, parts(number), sync=False)
    twins.backward(5, parts(5))
    twins.step("no_sync")
    twins.backward(6, parts(6), sync=False)
    twins.step("no_sync alone", 0.5 if clip else None)
    for number in (7, 8, 9):
        twins.backward(number, everywhere if number == 7 else parts(number))
    twins.step("several passes", zero=False)
    twins.backward(10, parts(3))
    twins.step("not zeroed", 2.0 if clip else None, zero=False)
    twins.step("the same once more")
    twins.backward(11, [ALL if r == twins.world_size - 1 else [] for r in ranks])
    twins.step("of one rank")
    twins.finish()


Case = tuple[tuple[torch.dtype, ...], str, float]
CASES: list[Case] = [((F32,), "signs", TINY), ((BF16,), "params", FEW), ((BF16, F32, F16), "signs", ONE)]


def body_cases(rank: int, world_size: int, cases: Sequence[Case], options: Sequence[dict[str, Any]]) -> None:
    for dtypes, sync, bucket_mb in cases:
        for own in options:
            what = f"{dtypes}, {sync}, bucket_mb={bucket_mb}, {own}"
            try:
                train(Twins(rank, world_size, dtypes, own, param_sync=sync, bucket_mb=bucket_mb), clip=True)
            except Exception as error:
                raise AssertionError(what) from error


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_bits_of_the_definition(world_size: int, tmp_path: Path) -> None:
    run_ranks(body_cases, world_size, tmp_path, (CASES, [{}]))
