"""Groups of what decays, of models that are replicated or sharded, and in both optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from lion_dist import Lion, ShardedLion, decay_groups
from tests.harness import device_of, run_ranks

NAMES = [["0.weight", "2.weight"], ["0.bias", "1.weight", "1.bias", "2.bias"]]


def make() -> nn.Sequential:
    """One row for two ranks, so that a rank holds no element of it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))


def names_of(groups: list[dict[str, Any]], prefix: str = "") -> list[list[str]]:
    return [[name.removeprefix(prefix) for name in group["param_names"]] for group in groups]


def whole(p: Any) -> torch.Tensor:
    return p.full_tensor()


def body(rank: int, world_size: int) -> None:
    device = device_of(rank, world_size)
    mesh = init_device_mesh(device.type, (world_size,))

    model = make().to(device)
    sharded = ShardedLion(decay_groups(model, 0.5), lr=1e-3)
    assert names_of(sharded.param_groups) == NAMES
    assert [group["weight_decay"] for group in sharded.param_groups] == [0.5, 0.0]
    model(torch.ones(1, 3, device=device)).sum().backward()
    sharded.step()

    wrapped = DistributedDataParallel(make().to(device))
    assert names_of(decay_groups(wrapped, 0.5), "module.") == NAMES

    model = make().to(device)
    fully_shard(model, mesh=mesh)
    lion = Lion(decay_groups(model, 0.5), lr=1e-3)  # after sharding: of the parameters that are there now
    before = [whole(p) for p in model.parameters()]
    model(torch.ones(1, 3, device=device)).sum().backward()
    lion.step()
    assert names_of(lion.param_groups) == NAMES, "the dimensions of a DTensor are those of the whole parameter"
    assert any(not torch.equal(whole(p), b) for p, b in zip(model.parameters(), before, strict=True))

    parallelize_module(model := make().to(device), mesh, {"0": ColwiseParallel()})
    assert names_of(decay_groups(model, 0.5)) == NAMES

    for use_orig_params in (True, False):
        model = make().to(device)
        groups = decay_groups(model, 0.5)
        assert names_of(groups) == NAMES
        fsdp1 = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=device)
        with pytest.raises(TypeError, match=r"managed by FSDP1.*call decay_groups before FSDP1"):
            decay_groups(fsdp1, 0.5)
        if use_orig_params:
            lion = Lion(groups, lr=1e-3)
            fsdp1(torch.ones(1, 3, device=device)).sum().backward()
            lion.step()
            moved = torch.tensor([bool(lion.state[p]["exp_avg"].count_nonzero()) for p in model.parameters()]).int()
            moved = moved.to(device)
            dist.all_reduce(moved)
            assert moved.all(), "the groups hold the parameters that FSDP1 has flattened"


def test_every_strategy(tmp_path: Path) -> None:
    run_ranks(body, 2, tmp_path)
