"""Collectives themselves, without an optimizer."""

from pathlib import Path

import pytest
import torch

from lion_dist.sharding.collectives import reduce_scatter_mean, start_all_gather
from tests.harness import run_ranks


def body_beside_each_other(rank: int, world_size: int, rounds: int) -> float:
    """On the CPU, where gloo completes two collectives at a time."""
    group = torch.distributed.group.WORLD
    assert group is not None
    sent, received, gathered = torch.ones(64), torch.zeros(64 // world_size), torch.ones(64)
    for _ in range(rounds):
        under_way = []
        for _ in range(50):
            under_way.append(start_all_gather([gathered, gathered], group))
            under_way.append(reduce_scatter_mean([received], [sent], group))
        for work in under_way:
            work.wait()
    return float(received.sum() + gathered.sum())


@pytest.mark.parametrize("rounds", [60, pytest.param(2000, marks=pytest.mark.exhaustive)])
def test_gathers_beside_reductions_corrupt_no_memory(rounds: int, tmp_path: Path) -> None:
    """Coalesced all-gathers of gloo do within a second."""
    assert run_ranks(body_beside_each_other, 2, tmp_path, (rounds,), on_cpu=True) == [96.0, 96.0]
