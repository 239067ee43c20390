"""ShardedLion over tensor parallelism, whose group is the data-parallel ranks, and over tensor parallelism, FSDP2 and
replicas: the same bits as `Lion` with gradients that something else averages, and as one process."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from lion_dist import Lion, ShardedLion, clip_grad_norm_
from tests.asserts import assert_same_bits
from tests.harness import device_of, run_ranks
from tests.scenarios.hybrid import FEW, HybridToy, check_whole, exact_clip, groups_of, local, part_of, shard_

OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "bucket_mb": FEW}


class Block(nn.Module):
    """Its norm works on a part of the sequence; its gain is not parallelized."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.up = nn.Linear(24, 130)
        self.down = nn.Linear(130, 24)
        self.gain = nn.Parameter(torch.ones(24))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x)).tanh()) * self.gain


class Net(nn.Module):
    def __init__(self, seed: int, device: torch.device, tp: DeviceMesh) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([Block(), Block()]).to(device)
        self.tp = tp
        plan = {
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Replicate()),
        }
        for block in self.blocks:
            parallelize_module(block, tp, plan)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(DTensor.from_local(x, self.tp, [Replicate()]).redistribute(placements=[Shard(1)]))
        return x.square().mean()


def place(model: nn.Module) -> None:
    """Adds up the partial sums that sequence parallelism leaves, as ShardedLion does in each backward."""
    for p in model.parameters():
        if isinstance(p.grad, DTensor):
            p.grad = p.grad.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]


def average_by_hand(model: nn.Module, group: dist.ProcessGroup) -> None:
    for p in model.parameters():
        dist.all_reduce(local(p.grad), dist.ReduceOp.AVG, group)


def check_nets(mesh: DeviceMesh, stage: int, sync: str, sharded: bool, accumulate: bool, steps: int = 4) -> None:
    """Two replicas, since the sum of two numbers has one order only; ``sharded``: by FSDP2 too."""
    device, group, tp = device_of(dist.get_rank(), dist.get_world_size()), mesh["replicate"].get_group(), mesh["tp"]
    net, other = (Net(seed, device, tp) for seed in (mesh.get_local_rank("replicate"), 0))
    if sharded:
        for model, over in ((net, mesh["shard"]), (other, mesh["replicate", "shard"])):
            for block in model.blocks:
                fully_shard(block, mesh=over)
            fully_shard(model, mesh=over)
    optimizer = ShardedLion(net.named_parameters(), **OPTIONS, process_group=group, stage=stage, param_sync=sync)
    lion = Lion(other.named_parameters(), lr=OPTIONS["lr"], weight_decay=OPTIONS["weight_decay"])
    what = f"{tuple(mesh.shape)}, stage {stage}, {sync}, sharded {sharded}"
    data = mesh.get_local_rank("replicate") + 10 * (mesh.get_local_rank("shard") if sharded else 0)
    for step in range(steps):
        micro_steps = [step, step + 100] if accumulate else [step]
        for micro_step in micro_steps:
            x = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(100 * micro_step + data)).to(device)
            last = micro_step == micro_steps[-1]
            if sharded:  # or the order of sums would differ
                for model in (net, other):
                    model.set_requires_gradient_sync(last)  # type: ignore[operator]
            if last or stage == 1:
                net(x).backward()
            else:
                with optimizer.no_sync():
                    net(x).backward()
            other(x).backward()
            if not sharded:
                place(other)
        if not sharded:
            average_by_hand(other, group)
        if stage == 1:
            place(net)
            average_by_hand(net, group)
        if step % 2:
            norms = optimizer.clip_grad_norm_(0.01), clip_grad_norm_(other.parameters(), 0.01)
            assert_same_bits(norms[0], norms[1], f"{what}: norm")
        for o in (optimizer, lion):
            o.step()
            o.zero_grad()
        for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
            assert_same_bits(local(p), local(q), f"{what}, step {step}: {name}")
    optimizer.check_replicas()
    check_whole(optimizer, lion, other, what)


# Others are replicated.
PLACEMENTS = {"first.weight": Shard(0), "second.weight": Shard(1), "sometimes.weight": Shard(0)}


def tensor_parallel(model: HybridToy, tp: DeviceMesh, row: Shard) -> None:
    """The units' parameters are cut over the mesh, that of one row as said; the root's are left plain."""
    placements = {**PLACEMENTS, "second.row": row}

    def cut(unit: str, _: str, module: nn.Module, tp: DeviceMesh) -> None:
        for key, p in list(module.named_parameters(recurse=False)):
            placed = distribute_tensor(p.detach(), tp, [placements.get(f"{unit}.{key}", Replicate())])
            module.register_parameter(key, nn.Parameter(placed, requires_grad=p.requires_grad))

    for name, unit in model.units.items():
        distribute_module(unit, tp, partial(cut, name))


def check_toy(mesh: DeviceMesh, sync: str, sharded: bool, steps: int = 4) -> None:
    """Exact gradients, beside one process. The ranks of a tp mesh have the same part of the batch."""
    device = device_of(dist.get_rank(), dist.get_world_size())
    replicas, shards = mesh["replicate"].size(), mesh["shard"].size() if sharded else 1
    size, replica = replicas * shards, mesh.get_local_rank("replicate")
    rank = replica * shards + (mesh.get_local_rank("shard") if sharded else 0)
    model = HybridToy(device, seed=replica, shards=shards, use="apart", tied=not sharded)
    # By rows, the second rank holds nothing of it, which FSDP2 cannot shard further.
    tensor_parallel(model, mesh["tp"], row=Shard(1) if sharded else Shard(0))
    if sharded:
        shard_(model, mesh["shard"])
    single = HybridToy(device, shards=shards, use="apart", tied=not sharded)
    options = {"lr": OPTIONS["lr"], "weight_decay": OPTIONS["weight_decay"]}
    optimizer = ShardedLion(groups_of(model), **OPTIONS, process_group=mesh["replicate"].get_group(), param_sync=sync)
    lion = Lion(groups_of(single), **options)
    for step in range(steps):
        model(step, rank, size).backward()
        for name, p in single.named_parameters():
            p.grad = single.average_gradient(name, step, size)
        norm = optimizer.clip_grad_norm_(5.0)
        assert_same_bits(norm, exact_clip([p.grad for p in single.parameters() if p.grad is not None], 5.0), "norm")
        for o in (optimizer, lion):
            o.step()
            o.zero_grad()
        for name, p in model.named_parameters():
            q = single.get_parameter(name).detach()
            assert_same_bits(local(p), part_of(q, p) if isinstance(p, DTensor) else q, f"{sync}, step {step}: {name}")
    optimizer.check_replicas()
    check_whole(optimizer, lion, single, f"{tuple(mesh.shape)}, {sync}, sharded {sharded}")


def check_scalar(mesh: DeviceMesh) -> None:
    """A DTensor without dimensions, as distribute_module makes of a logit scale: its state is loaded again."""
    device = device_of(dist.get_rank(), dist.get_world_size())
    for sync in ("params", "signs"):
        p = nn.Parameter(distribute_tensor(torch.tensor(1.5, device=device), mesh["tp"], [Replicate()]))
        optimizer = ShardedLion([("p", p)], lr=0.25, process_group=mesh["replicate"].get_group(), param_sync=sync)
        for step in range(2):
            loss: Any = p * 3.0
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            state = optimizer.full_state_dict()
            assert state["state"][0]["exp_avg"].shape == ()
            optimizer.load_state_dict(state)
            assert_same_bits(optimizer.full_state_dict()["state"][0]["exp_avg"], state["state"][0]["exp_avg"], sync)
            assert local(p).item() == 1.5 - 0.25 * (step + 1)


def body(rank: int, world_size: int, steps: int) -> None:
    device = device_of(rank, world_size)
    two = init_device_mesh(device.type, (2, 2), mesh_dim_names=("replicate", "tp"))
    check_nets(two, 2, "signs", sharded=False, accumulate=True, steps=steps)
    check_nets(two, 1, "params", sharded=False, accumulate=False, steps=steps)
    check_toy(two, "params", sharded=False, steps=steps)
    check_scalar(two)
    three = init_device_mesh(device.type, (2, 1, 2), mesh_dim_names=("replicate", "shard", "tp"))
    check_nets(three, 2, "params", sharded=True, accumulate=False, steps=steps)
    check_toy(three, "signs", sharded=True, steps=steps)


@pytest.mark.parametrize("steps", [4, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_tensor_parallelism(steps: int, tmp_path: Path) -> None:
    run_ranks(body, 4, tmp_path, (steps,))


def body_three_dimensions(rank: int, world_size: int) -> None:
    device = device_of(rank, world_size)
    mesh = init_device_mesh(device.type, (2, 2, 2), mesh_dim_names=("replicate", "shard", "tp"))
    for sync in ("params", "signs"):
        for accumulate in (False, True):
            check_nets(mesh, 2, sync, sharded=True, accumulate=accumulate)
        check_toy(mesh, sync, sharded=True)


@pytest.mark.exhaustive
def test_three_dimensions(tmp_path: Path) -> None:
    run_ranks(body_three_dimensions, 8, tmp_path, timeout=timedelta(seconds=60))
