"""Stage 2 beside other collectives in one backward, which reaches different parameters on different ranks: several
ShardedLions, or a model that communicates. No rank waits for one that waits for it."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lion_dist import Lion, ShardedLion, clip_grad_norm_
from lion_dist.sharding.bucket_average import ReduceScatterAverage
from tests.asserts import assert_same_bits
from tests.harness import device_of, run_ranks, spawn_only
from tests.scenarios.passes import TINY

COUNT = 4  # parameters of each kind, each in a bucket of its own with TINY
LR = 0.25
PATIENCE = timedelta(seconds=60)  # of groups over which ranks would wait for one another
# For each step, which experts each of two ranks reaches; in step 2 rank 1 reaches none, in step 3 rank 0 misses others.
EXPERTS: tuple[tuple[list[int], ...], ...] = (
    ([0, 1, 2, 3], [0, 1, 2, 3]),
    ([0, 1, 2, 3], [0, 1, 2]),
    ([0, 1, 2, 3], []),
    ([1, 3], [0, 2]),
)
MISSED = tuple(tuple([e for e in range(COUNT) if e not in reached] for reached in ranks) for ranks in EXPERTS)


def make_params(seed: int, device: torch.device) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter((torch.randn(257, generator=generator) + 2.0).to(device)) for _ in range(COUNT)]


def loss_of(first: Sequence[Tensor], then: Sequence[Tensor], rank: int) -> Tensor:
    """In the backward all gradients of ``then`` come before those of ``first``, from the last to the first."""
    h = torch.linspace(0.5, 1.5, 257, device=first[0].device) + rank
    for p in [*first, *then]:
        h = h * p
    return h.sum()


class Pool:
    """Dense parameters and experts, each under a ShardedLion with a group of its own; every rank has every expert."""

    def __init__(self, device: torch.device, bucket_mb: float, reduce_dtype: torch.dtype | None) -> None:
        self.dense, self.experts = make_params(1, device), make_params(2, device)
        self.optimizers = [
            ShardedLion(
                params, lr=LR, process_group=dist.new_group(timeout=PATIENCE), bucket_mb=bucket_mb,
                reduce_dtype=reduce_dtype,
            )
            for params in (self.dense, self.experts)
        ]  # fmt: skip

    def train(self, rank: int) -> list[Tensor]:
        for step, reached in enumerate(EXPERTS):
            dense = self.dense if step % 2 else [p for i, p in enumerate(self.dense) if i not in MISSED[step][rank]]
            loss_of(dense or self.dense[:1], [self.experts[e] for e in reached[rank]], rank).backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return [p.detach() for p in [*self.dense, *self.experts]]


def body_two_optimizers(rank: int, world_size: int, reduce_dtype: torch.dtype | None) -> None:
    device = device_of(rank, world_size)
    one_bucket = Pool(device, 1.0, reduce_dtype).train(rank)
    start = torch.stack([*make_params(1, device), *make_params(2, device)]).detach()
    assert (torch.stack(one_bucket) - start).abs().max() > 3 * LR  # all four steps were made
    trained = Pool(device, TINY, reduce_dtype).train(rank)
    for i, (p, expected) in enumerate(zip(trained, one_bucket, strict=True)):
        assert_same_bits(p, expected, f"parameter {i}")


@spawn_only
@pytest.mark.parametrize("reduce_dtype", [None, torch.bfloat16], ids=["", "reduced-in-bf16"])
def test_two_optimizers_in_one_backward(reduce_dtype: torch.dtype | None, tmp_path: Path) -> None:
    run_ranks(body_two_optimizers, 2, tmp_path, (reduce_dtype,))


def body_bound(rank: int, world_size: int) -> None:
    """One optimizer has at most two buckets under way; beside another one it has as many as it launches."""
    device = device_of(rank, world_size)
    start, wait = ReduceScatterAverage.start, None
    under_way = most = 0

    def started(self: Any, *args: Any) -> Any:
        nonlocal under_way, most, wait
        work = start(self, *args)
        under_way += 1
        most = max(most, under_way)
        if wait is None:
            wait = type(work).wait
            patch.setattr(type(work), "wait", waited)
        return work

    def waited(self: Any) -> None:
        nonlocal under_way
        assert wait is not None
        wait(self)
        under_way -= 1

    def most_of(optimizer: ShardedLion, params: list[nn.Parameter]) -> int:
        nonlocal most
        most = 0
        loss_of(params, [], rank).backward()
        assert under_way in (2, COUNT)
        optimizer.step()
        optimizer.zero_grad()
        assert under_way == 0
        return most

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReduceScatterAverage, "start", started)
        params, others = make_params(1, device), make_params(2, device)
        optimizer = ShardedLion(params, lr=LR, bucket_mb=TINY)
        alone = [dist.new_group([r]) for r in range(world_size)]
        by_itself = ShardedLion(make_params(3, device), lr=LR, process_group=alone[rank])  # it waits for nobody
        stage_1 = ShardedLion(make_params(4, device), lr=LR, stage=1)
        assert most_of(optimizer, params) == 2
        other = ShardedLion(others, lr=LR, process_group=dist.new_group(), bucket_mb=TINY)
        assert most_of(optimizer, params) == COUNT
        assert most_of(other, others) == COUNT
        again = ShardedLion(others, lr=LR, process_group=dist.new_group(), bucket_mb=TINY)  # takes them over
        del again
        assert most_of(optimizer, params) == 2
        gc.disable()  # an optimizer that is deleted leaves no cycle of references
        try:
            other = ShardedLion(make_params(5, device), lr=LR, process_group=dist.new_group())
            assert most_of(optimizer, params) == COUNT
            del other
            assert most_of(optimizer, params) == 2
        finally:
            gc.enable()
        del by_itself, stage_1


def test_how_many_buckets_are_under_way(tmp_path: Path) -> None:
    run_ranks(body_bound, 2, tmp_path)


def body_clipped_together(rank: int, world_size: int, pairs: bool) -> None:
    """Both orders give the same bits, also if a pass reached no parameter of the optimizer with the wider group."""
    device = device_of(rank, world_size)
    everyone, narrow = dist.new_group(timeout=PATIENCE), [[r, r + 1] for r in range(0, world_size, 2)]
    parts = narrow if pairs else [[r] for r in range(world_size)]
    own = [dist.new_group(part, timeout=PATIENCE) for part in parts][rank // (2 if pairs else 1)]
    trained = []
    for first in (0, 1):
        dense, experts = make_params(1, device), make_params(2, device)
        optimizers = [ShardedLion(dense, lr=LR, process_group=everyone)]
        optimizers.append(ShardedLion(experts, lr=LR, process_group=own))
        for step in range(3):
            loss_of(experts if rank == 1 and step else [*dense, *experts], [], rank).backward()
            clip_grad_norm_([optimizers[first], optimizers[1 - first]], 1e-3)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        trained.append([p.detach() for p in [*dense, *experts]])
    for i, (p, expected) in enumerate(zip(*trained, strict=True)):
        assert_same_bits(p, expected, f"parameter {i}")


@spawn_only
@pytest.mark.parametrize(("world_size", "pairs"), [(2, False), (4, True)], ids=["alone", "pairs"])
def test_clipped_together_in_any_order(world_size: int, pairs: bool, tmp_path: Path) -> None:
    run_ranks(body_clipped_together, world_size, tmp_path, (pairs,))


class SummedGradient(torch.autograd.Function):
    """Returns its input, and sums the gradient over the ranks in the backward, as SyncBatchNorm does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def body_model_that_communicates(rank: int, world_size: int, reaches_all: bool) -> None:
    """Both recipes of docs/sharded.md give the bits of a Lion that steps the averages: one bucket, and the use of every
    parameter between the same communications."""
    device = device_of(rank, world_size)
    communication, group = dist.new_group(timeout=PATIENCE), dist.new_group(timeout=PATIENCE)
    params, expected = make_params(1, device), make_params(1, device)
    optimizer = ShardedLion(params, lr=LR, process_group=group, bucket_mb=TINY if reaches_all else 1.0)
    lion = Lion(expected, lr=LR)

    def backward(used: list[nn.Parameter], reached: list[int]) -> None:
        h = torch.linspace(0.5, 1.5, 257, device=device, requires_grad=True) + rank
        for e, p in enumerate(used):
            if e in reached:
                h = h * p
            elif reaches_all:
                h = h + 0.0 * p
            h = SummedGradient.apply(h, communication)
        h.sum().backward()

    for reached in reversed(EXPERTS):  # the first rank's first backward finds some idle
        backward(params, reached[rank])
        optimizer.step()
        optimizer.zero_grad()
        backward(expected, reached[rank])
        for p in expected:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad, group=communication)
            p.grad /= world_size
        lion.step()
        lion.zero_grad()
        for i, (p, q) in enumerate(zip(params, expected, strict=True)):
            assert_same_bits(p.detach(), q.detach(), f"parameter {i}")


@spawn_only
@pytest.mark.parametrize("reaches_all", [False, True], ids=["one bucket", "all reached"])
def test_a_model_that_communicates(reaches_all: bool, tmp_path: Path) -> None:
    run_ranks(body_model_that_communicates, 2, tmp_path, (reaches_all,))
