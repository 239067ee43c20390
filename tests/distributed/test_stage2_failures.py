"""Stage 2 with ranks that fail: the errors that they and the others raise, and after how long."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.join import Join

from lion_dist import ShardedLion
from lion_dist.sharding import flag_exchange
from lion_dist.sharding.all_to_all import TorchRows
from tests.asserts import assert_unmoved
from tests.harness import device_of, run_ranks, spawn_only
from tests.scenarios.pair import LR, SHORT, Exit, OwnError, Pair, fail_in_backward
from tests.scenarios.passes import TINY


def body_one_raises(rank: int, world_size: int, bucket_mb: float) -> float:
    pair = Pair(rank, world_size, bucket_mb=bucket_mb)
    pair.train(0, 1)
    weights = [p.detach().clone() for p in pair.params]
    start = time.monotonic()
    if rank == 1:
        with pytest.raises(OwnError, match="of this rank's own"):
            fail_in_backward(pair, 2, OwnError)
        pair.sharded.zero_grad()  # as scripts do that catch an exception; it heals nothing
        for call in (pair.sharded.step, lambda: pair.backward(3)):
            with pytest.raises(RuntimeError, match="can no longer be used: a backward raised"):
                call()
    else:
        with pytest.raises(RuntimeError, match="rank 1 of the group: a backward raised"):
            pair.backward_and_step(2)
    assert_unmoved(pair.params, weights)
    return time.monotonic() - start


@spawn_only
@pytest.mark.parametrize("bucket_mb", [TINY, 64.0], ids=["tiny", "one"])
def test_one_rank_raises_in_its_backward(bucket_mb: float, tmp_path: Path) -> None:
    seconds = run_ranks(body_one_raises, 3, tmp_path, (bucket_mb,), timeout=SHORT, on_cpu=True)
    assert max(seconds) < SHORT.total_seconds() + 2


def body_one_raises_at_the_end(rank: int, world_size: int) -> float:
    """In autograd's last callback, where what no gradient has come of is launched: here a gradient that cannot be."""
    device = device_of(rank, world_size)
    values = torch.ones(300), torch.ones(40), torch.ones(50, 8)
    weight, _, table = params = [nn.Parameter(v.to(device)) for v in values]
    optimizer = ShardedLion(params, lr=LR)  # one bucket
    rows = torch.arange(5, device=device)
    start = time.monotonic()

    def train() -> None:
        (nn.functional.embedding(rows, table, sparse=rank == 1).sum() + weight.sum()).backward()
        optimizer.step()

    if rank == 1:
        with pytest.raises(TypeError, match=r"parameter 2 .*[Ss]parse"):
            train()
    else:
        with pytest.raises(RuntimeError, match="rank 1 of the group: a backward raised"):
            train()
    with pytest.raises(RuntimeError, match="can no longer be used"):
        optimizer.step()
    for p in params:
        assert bool((p == 1).all())
    return time.monotonic() - start


@spawn_only
def test_one_rank_raises_at_the_end_of_its_backward(tmp_path: Path) -> None:
    seconds = run_ranks(body_one_raises_at_the_end, 2, tmp_path, timeout=SHORT, on_cpu=True)
    assert max(seconds) < SHORT.total_seconds() + 2


def body_refused_and_zeroed(rank: int, world_size: int) -> None:
    table, weight = nn.Parameter(torch.ones(50, 7)), nn.Parameter(torch.ones(300))
    optimizer = ShardedLion([weight, table], lr=0.25)
    rows = torch.tensor([1, 2])
    with pytest.raises(TypeError, match=r"parameter 1 .*[Ss]parse.*stage 2 needs dense"):
        (nn.functional.embedding(rows, table, sparse=True).sum() + weight.sum()).backward()
    optimizer.zero_grad()
    (nn.functional.embedding(rows, table).sum() + weight.sum()).backward()
    optimizer.step()
    assert weight.tolist() == [0.75] * 300
    assert table.sum() == 50 * 7 - 2 * 7 * 0.25


def test_a_refused_gradient_can_be_zeroed(tmp_path: Path) -> None:
    """On a single rank, where no other rank must hear of the failure."""
    run_ranks(body_refused_and_zeroed, 1, tmp_path, on_cpu=True)


def body_out_of_memory(rank: int, world_size: int, method: str) -> None:
    """In step(), where scripts may catch it and go on: a bucket would be left out, or be taken for the next one."""
    params = [nn.Parameter(torch.zeros(128 * world_size)) for _ in range(4)]
    optimizer = ShardedLion(params, lr=1.0, reduce_dtype=torch.bfloat16, bucket_mb=TINY)
    with optimizer.no_sync():
        torch.stack([p.sum() for p in params]).sum().backward()
    run, calls = getattr(TorchRows, method), 0

    def fail(self: TorchRows, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2 and rank == world_size - 1:
            raise torch.OutOfMemoryError("no memory left")
        run(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchRows, method, fail)
        if rank == world_size - 1:
            with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
                optimizer.step()
        else:
            with pytest.raises(RuntimeError, match=r"rank 1 of the group: .* raised OutOfMemoryError: no memory"):
                optimizer.step()
    with pytest.raises(RuntimeError, match=r"can no longer be used: .* no memory left"):
        optimizer.step()
    assert not any(p.any() for p in params)


@spawn_only
@pytest.mark.parametrize(("world_size", "method"), [(1, "round"), (1, "average"), (2, "round"), (2, "average")])
def test_a_bucket_that_fails_is_the_end(world_size: int, method: str, tmp_path: Path) -> None:
    run_ranks(body_out_of_memory, world_size, tmp_path, (method,), timeout=SHORT, on_cpu=True)


def body_one_dies(rank: int, world_size: int) -> None:
    pair = Pair(rank, world_size)
    pair.train(0, 1)
    weights = [p.detach().clone() for p in pair.params]
    start = time.monotonic()
    if rank == 1:
        fail_in_backward(pair, 2, Exit)
    with pytest.raises(RuntimeError, match="one may have ended"):
        pair.backward_and_step(2)
    assert_unmoved(pair.params, weights)
    assert time.monotonic() - start < SHORT.total_seconds() + 2


@spawn_only
def test_one_rank_dies_in_its_backward(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception) as failed:
        run_ranks(body_one_dies, 3, tmp_path, timeout=SHORT, on_cpu=True)
    text = str(failed.value)
    assert "rank 1 ended with exit code 3" in text
    assert text.count("---") == 1, text  # the others have seen what they expect


def body_unsynced_raises(rank: int, world_size: int) -> None:
    """Nothing was being reduced, so nothing is lost but the gradients."""
    pair = Pair(rank, world_size)
    pair.train(0)
    if rank == 1:
        with pytest.raises(OwnError), pair.sharded.no_sync():
            fail_in_backward(pair, 1, OwnError)
    pair.sharded.zero_grad()
    pair.train(2)
    # Nor if the others keep theirs: this rank tries again.
    with pair.sharded.no_sync():
        if rank == 1:
            with pytest.raises(OwnError):
                fail_in_backward(pair, 3, OwnError)
            for p in pair.params:
                p.grad = None
        pair.backward(3)
    pair.expect(3)
    pair.backward(4)
    pair.expect(4)
    pair.step("tried again")
    pair.finish()


def test_exception_under_no_sync_is_survived(tmp_path: Path) -> None:
    run_ranks(body_unsynced_raises, 3, tmp_path)


def body_all_raise(rank: int, world_size: int) -> None:
    pair = Pair(rank, world_size)
    pair.train(0)
    weights = [p.detach().clone() for p in pair.params]
    # A rank that is behind may be told by the others before its own exception comes.
    with pytest.raises((OwnError, RuntimeError), match=r"of this rank's own|a backward raised"):
        fail_in_backward(pair, 1, OwnError)
    for call in (pair.sharded.step, lambda: pair.sharded.clip_grad_norm_(1.0), lambda: pair.backward(2)):
        with pytest.raises(RuntimeError, match="can no longer be used: a backward raised"):
            call()
    assert_unmoved(pair.params, weights)


@spawn_only
def test_all_ranks_raise_in_their_backward(tmp_path: Path) -> None:
    run_ranks(body_all_raise, 3, tmp_path, timeout=SHORT, on_cpu=True)


def body_step_left_out(rank: int, world_size: int) -> None:
    """By rank 1, where the gradients of two backwards so meet, of which the second come late. Both ranks hear of it,
    where the other does not read of late gradients, as on GPUs. (Where it does, a step left out cannot be told from a
    pass that missed the other rank.)"""
    pair = Pair(rank, world_size)
    pair.train(0, 1)
    weights = [p.detach().clone() for p in pair.params]

    def go_on() -> None:
        pair.backward(2)
        if rank != 1:
            pair.sharded.step()
        pair.backward(3)
        pair.sharded.step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flag_exchange, "WAITING_DEVICES", frozenset())
        with pytest.raises(RuntimeError, match=r"Did a rank leave out a step\(\)"):
            go_on()
    if rank == 1:
        assert_unmoved(pair.params, weights)


def body_zeroed_instead(rank: int, world_size: int, waits: bool) -> None:
    """By rank 1, instead of a step: its next step meets that of the others."""
    pair = Pair(rank, world_size)
    pair.train(0, 1)

    def go_on() -> None:
        pair.backward(2)
        if rank == 1:
            pair.sharded.zero_grad()
            pair.backward(3)
        pair.sharded.step()

    with pytest.MonkeyPatch.context() as patch:
        if not waits:
            patch.setattr(flag_exchange, "WAITING_DEVICES", frozenset())
        with pytest.raises(RuntimeError, match="were zeroed, but not those of every rank"):
            go_on()


@spawn_only
@pytest.mark.parametrize(
    ("body", "args"), [(body_step_left_out, ()), (body_zeroed_instead, (True,)), (body_zeroed_instead, (False,))]
)
def test_a_step_left_out(body: Callable[..., None], args: tuple, tmp_path: Path) -> None:
    run_ranks(body, 2, tmp_path, args, timeout=SHORT, on_cpu=True)


def body_stale_word(rank: int, world_size: int) -> None:
    """A failure is raised by the optimizer that it belongs to: another one of the group neither quotes it nor hides
    it."""
    device = device_of(rank, world_size)
    table = nn.Embedding(50, 7, sparse=True, device=device)
    first = ShardedLion(table.parameters(), lr=LR)
    second = ShardedLion([nn.Parameter(torch.ones(300, device=device))], lr=LR)
    rows = torch.arange(5, device=device)

    def train() -> None:
        table(rows).sum().backward()
        first.step()

    with pytest.raises((TypeError, RuntimeError), match=r"[Ss]parse|backward raised"):
        train()
    assert "backward raised" in first._membership.failure
    third = Pair(rank, world_size)
    third.train(0)
    for optimizer in (second, third.sharded):
        failing = pytest.raises(RuntimeError, match="one may have ended, raised an error or left out a call")
        with failing as failed, optimizer._membership.collective():
            raise RuntimeError("a collective that failed for a reason of its own")
        assert "backward raised" not in str(failed.value)
    with pytest.raises(RuntimeError, match=r"rank \d of the group: a backward raised"), first._membership.collective():
        raise RuntimeError("a collective")


@spawn_only
def test_a_failure_of_another_optimizer_is_not_quoted(tmp_path: Path) -> None:
    run_ranks(body_stale_word, 2, tmp_path, timeout=SHORT, on_cpu=True)


def body_join(rank: int, world_size: int) -> None:
    for stage in (1, 2):
        pair = Pair(rank, world_size, stage=stage)
        with pytest.raises(RuntimeError, match=r"does not work under .*Join: every rank .* same number of steps"):
            Join([pair.sharded])  # type: ignore[list-item]


def test_join_is_refused(tmp_path: Path) -> None:
    run_ranks(body_join, 2, tmp_path)
