"""The lives and corners of stage 2 once more, in bfloat16 and on other numbers of ranks than their own tests have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.distributed import test_stage2_clipping as clipping
from tests.distributed import test_stage2_corners as corners
from tests.distributed import test_stage2_life as life
from tests.distributed.pair import Pair
from tests.harness import run_ranks

BODIES: list[Callable[[int, int], object]] = [
    clipping.body_clip_then_more, life.body_groups_grow, life.body_freezing, life.body_closure, life.body_state,
    life.body_load_merges, life.body_never_zeroed, life.body_by_hand, life.body_create_graph,
    corners.body_zeroed_in_place, corners.body_zeros_then_none, corners.body_zeroed_before_group,
    corners.body_unfrozen, corners.body_unused,
]  # fmt: skip
# They expect a scaled gradient, which the fused step does not round to the gradient's dtype.
CLIPPED: list[Callable[[int, int], object]] = [clipping.body_clip_then, corners.body_create_graph]


def body_all(rank: int, world_size: int, dtype: torch.dtype) -> None:
    Pair.dtype = dtype  # of this process
    for body in BODIES if dtype == torch.bfloat16 else [*BODIES, *CLIPPED]:
        try:
            body(rank, world_size)
        except Exception as error:
            raise AssertionError(body.__name__) from error


@pytest.mark.parametrize(
    ("world_size", "dtype"), [(2, torch.bfloat16), (3, torch.bfloat16), (4, torch.bfloat16), (4, torch.float32)]
)
def test_every_life(world_size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    run_ranks(body_all, world_size, tmp_path, (dtype,))
