"""ShardedLion between nodes, FSDP2 within them: the same bits as FSDP2's own HSDP with Lion over the same mesh, and as
Lion on one process. A rank goes through many cases, because it takes longer to start than to train a toy."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from lion_dist import Lion, ShardedLion, clip_grad_norm_
from tests.asserts import assert_same_bits
from tests.harness import device_of, run_ranks
from tests.scenarios.hybrid import BF16, F32, FEW, Case, body_cases, check_whole, local, mesh_of

MASTER, EIGHT = {"master_weights": True}, {"momentum_dtype": "int8"}

# By the mesh (replicas, shards): each value of each dimension of a case at least once.
DEFAULT = {
    (2, 2): [
        Case(accumulate="optimizer", clip=5.0, reshard=False),
        Case(sync="params", dtypes=(BF16, F32), accumulate="fsdp", reentrant=True),
        Case(policy=True, accumulate="both", use="all", reentrant=False, options=EIGHT),
        Case(sync="params", clip=5.0, use="apart"),
        Case(stage=1, accumulate="fsdp", clip=5.0),
        Case(stage=1, sync="params", dtypes=(BF16,), options=MASTER),
        Case(dtypes=(BF16,), options=MASTER | EIGHT, reduce_dtype=BF16),
        Case(accumulate="both", clip=5.0, use="apart", reduce_dtype=BF16),
    ],
    (4, 1): [Case(clip=5.0, accumulate="optimizer", use="apart"), Case(sync="params", dtypes=(BF16,))],
    (1, 4): [Case(clip=5.0), Case(sync="params", dtypes=(BF16,), options=MASTER | EIGHT)],
    (3, 1): [Case(clip=5.0, use="apart"), Case(stage=1, sync="params", accumulate="fsdp", dtypes=(BF16,))],
}


def every_case() -> list[Case]:
    """Every stage and param_sync with every kind of weights, and with them, in turn, everything else."""
    kinds: list[dict[str, Any]] = [
        {"clip": 5.0},
        {"policy": True, "use": "all", "clip": 5.0},
        {"dtypes": (BF16,)},
        {"dtypes": (BF16, F32)},
        {"dtypes": (BF16,), "options": MASTER},
        {"options": EIGHT},
        {"dtypes": (BF16,), "options": MASTER | EIGHT},
    ]
    cases = []
    for number, (kind, stage, sync) in enumerate(product(kinds, (1, 2), ("params", "signs"))):
        accumulate = ("", "fsdp", "optimizer", "both")[(number + number // 4) % (2 if stage == 1 else 4)]
        reentrant = (None, False, True)[number % 3]
        cases.append(Case(stage, sync, accumulate=accumulate, reshard=number % 5 < 3, reentrant=reentrant, **kind))
    cases += [replace(case, reduce_dtype=BF16) for case in cases if case.stage == 2]
    apart = [Case(2, sync, accumulate=way, use="apart") for sync in ("params", "signs") for way in ("", "both")]
    return cases + apart


@pytest.mark.parametrize("world_size", [3, 4])
def test_cases(world_size: int, tmp_path: Path) -> None:
    cases = {mesh: of_mesh for mesh, of_mesh in DEFAULT.items() if mesh[0] * mesh[1] == world_size}
    run_ranks(body_cases, world_size, tmp_path, (cases, 3))


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mesh", DEFAULT, ids=lambda mesh: f"{mesh[0]}x{mesh[1]}")
def test_every_case(mesh: tuple[int, int], tmp_path: Path) -> None:
    run_ranks(body_cases, mesh[0] * mesh[1], tmp_path, ({mesh: every_case()}, 20), deadline=3000)


# A model that is not linear ---------------------------------------------------------------------------


class Net(nn.Module):
    """Compiled or checkpointed blocks. Its gradients depend on its weights, so an error would grow."""

    def __init__(self, device: torch.device, seed: int, dtype: torch.dtype, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(seed)
        sizes = (19, 129, 127, 3)
        blocks = [nn.Sequential(nn.Linear(n, m), nn.Tanh()) for n, m in pairwise(sizes)]
        self.blocks = nn.ModuleList(blocks).to(device, dtype)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x.float().square().mean()


def sharded_net(net: Any, mesh: DeviceMesh, backend: str, reshard: bool) -> Any:
    for block in net.blocks:
        if backend:
            block.compile(backend=backend)
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    return fully_shard(net, mesh=mesh, reshard_after_forward=reshard)


def body_nets(rank: int, world_size: int) -> None:
    """Two replicas of two shards, since the sum of two numbers has one order only; any data will do."""
    device, mesh = device_of(rank, world_size), mesh_of(2, 2)
    for stage, sync, backend, reentrant in (
        (2, "signs", "aot_eager", None),
        (2, "params", "", True),
        (1, "params", "eager", None),
    ):
        what = f"stage {stage}, {sync}, backend {backend!r}, use_reentrant {reentrant}"
        net, other = (Net(device, seed, F32, reentrant) for seed in (mesh.get_local_rank("replicate"), 0))
        sharded_net(net, mesh["shard"] if stage == 2 else mesh, backend, reshard=stage == 2)
        sharded_net(other, mesh, backend, reshard=True)
        options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
        lion = Lion(other.named_parameters(), **options)
        optimizer = ShardedLion(
            net.named_parameters(), **options, process_group=mesh["replicate"].get_group(), stage=stage,
            param_sync=sync, bucket_mb=FEW,
        )  # fmt: skip
        for step in range(4):
            x = torch.randn(8, 19, generator=torch.Generator().manual_seed(100 * step + rank)).to(device)
            x.requires_grad_(reentrant is True)  # which checkpoints nothing otherwise
            net(x).backward()
            other(x).backward()
            if step % 2:
                norms = optimizer.clip_grad_norm_(0.01), clip_grad_norm_(other.parameters(), 0.01)
                torch.testing.assert_close(*norms)  # sums of float64 in another order
                if norms[0] != norms[1]:
                    raise AssertionError(f"{what}: choose other data, for which the norms agree")
            optimizer.step()
            lion.step()
            optimizer.zero_grad()
            lion.zero_grad()
            for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
                assert_same_bits(local(p), local(q), f"{what}, step {step}: {name}")
        check_whole(optimizer, lion, other, what)


def test_compiled_and_checkpointed_blocks(tmp_path: Path) -> None:
    run_ranks(body_nets, 4, tmp_path)
