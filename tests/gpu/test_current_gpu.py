"""Ranks whose tensors are on another GPU than the current one, as in programs without torch.cuda.set_device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from lion_dist import Lion, ShardedLion, checkpoint, clip_grad_norm_
from lion_dist.dtensors import local
from tests.asserts import assert_same_bits
from tests.harness import device_of, run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def body_sharded(rank: int, world_size: int, folder: Path) -> None:
    device = device_of(rank, world_size)
    torch.cuda.set_device(0)
    torch.manual_seed(rank)
    model = nn.Linear(30, 20, device=device)
    optimizer = ShardedLion(model.named_parameters(), lr=0.25)

    def train(count: int) -> None:
        for _ in range(count):
            model(torch.randn(8, 30, device=device)).square().mean().backward()
            optimizer.clip_grad_norm_(0.5)
            optimizer.step()
            optimizer.zero_grad()

    train(2)
    optimizer.statistics()
    checkpoint.save(folder / "step-1", model, optimizer)
    pending = checkpoint.async_save(folder / "step-2", model, optimizer)
    train(2)
    pending.result()
    then = [p.detach().clone() for p in model.parameters()]
    for number in (1, 2):
        checkpoint.load(folder / f"step-{number}", model, optimizer)  # and this GPU's generator
        train(2)
        for p, expected in zip(model.parameters(), then, strict=True):
            assert_same_bits(p.detach(), expected)
    assert torch.cuda.current_device() == 0


def test_sharded_lion(tmp_path: Path) -> None:
    run_ranks(body_sharded, 2, tmp_path, (tmp_path,))


def body_dtensors(rank: int, world_size: int) -> None:
    device = device_of(rank, world_size)
    mesh = DeviceMesh("cuda", list(range(world_size)))
    torch.cuda.set_device(0)

    def sharded(value: float) -> DTensor:
        return DTensor.from_local(torch.full((4, 3), value, device=device), mesh, [Shard(0)])

    p = nn.Parameter(sharded(1.0))
    optimizer = Lion([p], lr=0.25)
    p.grad = sharded(1.0 + rank)
    norm = clip_grad_norm_([p], 1.0)
    assert norm.device == device
    torch.testing.assert_close(norm.item(), (12 * (1.0 + 4.0)) ** 0.5)
    optimizer.step()
    assert (local(p) == 0.75).all()
    assert optimizer.statistics()
    assert torch.cuda.current_device() == 0


def test_dtensors(tmp_path: Path) -> None:
    run_ranks(body_dtensors, 2, tmp_path)


def body_whole_state(rank: int, world_size: int) -> None:
    """A ShardedLion of one rank over DTensors, whose state is gathered over their mesh."""
    device = device_of(rank, world_size)
    mesh = DeviceMesh("cuda", list(range(world_size)))
    alone = [dist.new_group([r]) for r in range(world_size)][rank]
    torch.cuda.set_device(0)
    p = nn.Parameter(DTensor.from_local(torch.ones(4, 3, device=device), mesh, [Shard(0)]))
    optimizer = ShardedLion([p], lr=0.25, process_group=alone)
    (p * (1.0 + rank)).sum().backward()
    optimizer.step()
    momentum = optimizer.full_state_dict()["state"][0]["exp_avg"]
    assert momentum.shape == (8, 3)
    assert (momentum[4:] == 2 * momentum[:4]).all()


def test_whole_state(tmp_path: Path) -> None:
    run_ranks(body_whole_state, 2, tmp_path)
