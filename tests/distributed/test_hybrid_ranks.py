"""ShardedLion over FSDP2: errors that reach every rank of the mesh, and gradients that arrive late in a backward."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from lion_dist import Lion, ShardedLion
from tests.asserts import bits
from tests.harness import device_of, run_ranks
from tests.scenarios.hybrid import HybridToy, local, mesh_of, refused, shard_
from tests.scenarios.wire import Counter


def body_one_differs(rank: int, world_size: int) -> None:
    """Every rank learns what only the replicas of one part can compare."""
    device, mesh = device_of(rank, world_size), mesh_of(2, 2)
    group = mesh["replicate"].get_group()
    model: Any = shard_(HybridToy(device), mesh["shard"])
    named = [
        (f"{name}{'?' if rank == 3 and i == 2 else ''}", p) for i, (name, p) in enumerate(model.named_parameters())
    ]
    match = "different on the ranks" if rank in (1, 3) else r"rank 1 failed with ValueError: .*different on the ranks"
    with refused(model, ValueError if rank in (1, 3) else RuntimeError, match):
        ShardedLion(iter(named), process_group=group)
    groups: Any = iter([{"params": iter(named[:1])}, {"params": [named[1]], "lr": 2.0 if rank == 3 else 1.0}])
    with refused(model, ValueError if rank in (1, 3) else RuntimeError, match):
        ShardedLion(groups, process_group=group)
    optimizer = ShardedLion(model.named_parameters(), process_group=group)
    state = optimizer.full_state_dict()
    if rank == 3:
        state["param_groups"][0]["lr"] = -1.0
    with refused(model, ValueError if rank == 3 else RuntimeError, "lr"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] > 0
    # A mesh that only two of the ranks are in.
    value = torch.ones(3 if rank < 2 else 0, device=device)
    half = DeviceMesh(device.type, [0, 1])
    part = DTensor.from_local(value, half, [Shard(0)], run_check=False, shape=torch.Size([6]), stride=(1,))
    with pytest.raises(ValueError if rank >= 2 else RuntimeError, match=f"which rank {rank | 2} is not in"):
        ShardedLion([nn.Parameter(part)], process_group=group)
    # A mesh whose rows are not the replicas.
    crossed = DeviceMesh(device.type, [[0, 3], [1, 2]], mesh_dim_names=("replicate", "shard"))
    crossed_model = shard_(HybridToy(device), crossed["shard"])
    with refused(crossed_model, ValueError, "of 2 in process_group"):
        ShardedLion(crossed_model.named_parameters(), process_group=crossed["replicate"].get_group())


class TwoRoots(nn.Module):
    """Two roots of FSDP2, whose first layers are reduced in callbacks at the end of the backward."""

    def __init__(self, mesh: DeviceMesh, device: torch.device) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.roots = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)).to(device) for _ in range(2))
        for root in self.roots:
            fully_shard(root, mesh=mesh)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.roots
        return (first(x) + second(x)).square().sum()


def body_two_roots(rank: int, world_size: int) -> None:
    device, mesh = device_of(rank, world_size), mesh_of(2, 2)
    model, hsdp = TwoRoots(mesh["shard"], device), TwoRoots(mesh, device)
    group = mesh["replicate"].get_group()
    optimizer = ShardedLion(model.named_parameters(), lr=0.01, process_group=group)
    lion = Lion(hsdp.named_parameters(), lr=0.01)
    for step in range(3):
        x = torch.randint(-3, 4, (4, 8), generator=torch.Generator().manual_seed(9 * step + rank)).to(device).float()
        with Counter(group) as counter:
            model(x).backward()
            left = [p for p in model.parameters() if p.grad is not None]
            assert len(left) <= 1  # the sentinel
            for p in left:
                assert not local(copy.deepcopy(p.grad)).any()
                torch.save(p.grad, io.BytesIO())
            optimizer.step()
            optimizer.zero_grad()
        numel = sum(shard.layout.shard_numel * 2 for shard in optimizer._shards)
        assert sum(counter.bytes["scatter"]) == 4 * numel  # one round
        hsdp(x).backward()
        lion.step()
        lion.zero_grad()
    for p, q in zip(model.parameters(), hsdp.parameters(), strict=True):
        assert torch.equal(bits(local(p)), bits(local(q)))


def body(rank: int, world_size: int) -> None:
    body_one_differs(rank, world_size)
    body_two_roots(rank, world_size)


def test_one_rank_that_differs_and_two_roots(tmp_path: Path) -> None:
    run_ranks(body, 4, tmp_path)
