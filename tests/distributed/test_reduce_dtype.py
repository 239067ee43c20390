"""reduce_dtype=torch.bfloat16: the bits of its definition, for gradients of any values and whatever becomes of them."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lion_dist import ShardedLion
from lion_dist.sharding.all_to_all import AllToAllAverage
from tests.harness import device_of, run_ranks
from tests.marks import needs_interpreter
from tests.scenarios.passes import ONE, TINY
from tests.scenarios.sixteen_bits import ALL, BF16, CASES, F32, Twins, body_cases, body_hybrid
from tests.scenarios.wire import Counter


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_bits_of_the_definition(world_size: int, tmp_path: Path) -> None:
    run_ranks(body_cases, world_size, tmp_path, (CASES, [{}]))


def body_triton(rank: int, world_size: int) -> None:
    shapes = [(300,), (8, 6, 5, 5), (3,)]
    for dtypes, sync in ((F32, BF16), "signs"), ((BF16,), "params"):
        twins = Twins(rank, world_size, dtypes, {"use_triton": True}, shapes, param_sync=sync)
        for number in range(2):
            twins.backward(number, [[0, 1, 2], [0, 2]])
            twins.backward(10 + number, [[1], [2]])
            twins.step(f"step {number}")
        twins.finish()


@needs_interpreter
def test_the_kernels_train_alike(tmp_path: Path) -> None:
    run_ranks(body_triton, 2, tmp_path)


@pytest.mark.parametrize("sync", ["signs", "params"])
def test_master_weights_and_int8_momenta(sync: str, tmp_path: Path) -> None:
    """Their gradients are float32 beside bfloat16 weights."""
    options = [{"master_weights": True}, {"master_weights": True, "momentum_dtype": "int8"}]
    run_ranks(body_cases, 3, tmp_path, ([((BF16,), sync, TINY)], options, False))


def body_not_finite(rank: int, world_size: int) -> None:
    """Of one rank: a NaN, an infinity, both infinities on two ranks, and a number that rounds to infinity."""
    values = {0: [math.nan, 1.0, math.inf, 3.4e38, 3.39e38], 1: [1.0, -math.inf, -math.inf, 1.0, 1.0]}
    params = [nn.Parameter(torch.ones(5, device=device_of(rank, world_size))) for _ in range(2)]
    optimizer = ShardedLion(params, lr=0.5, reduce_dtype=BF16)
    given = torch.tensor(values.get(rank, [1.0] * 5), device=params[0].device)
    (params[0] * given).sum().backward()
    optimizer.step()
    expected = [math.nan, math.nan, math.nan, math.nan, 0.5]
    torch.testing.assert_close(params[0].tolist(), expected, equal_nan=True)
    assert params[1].tolist() == [1.0] * 5
    optimizer.check_replicas()


def test_gradients_that_are_not_finite(tmp_path: Path) -> None:
    run_ranks(body_not_finite, 3, tmp_path)


def body_frozen(rank: int, world_size: int) -> None:
    """Parameters that are unfrozen, frozen and added; state that is saved and loaded into a new optimizer."""
    twins = Twins(rank, world_size, (BF16, F32))
    everywhere = [ALL] * world_size
    for p in (twins.params[1], twins.copies[1], twins.params[4], twins.copies[4]):
        p.requires_grad_(False)
    few = [[i for i in ALL if i not in (1, 4)]] * world_size
    twins.backward(0, few)
    twins.step("frozen")
    for p in (twins.params[1], twins.copies[1]):
        p.requires_grad_(True)
    twins.backward(1, [[i for i in ALL if i != 4]] * world_size)
    twins.step("unfrozen")
    state = twins.sharded.full_state_dict()
    twins.params[4].requires_grad_(True)
    twins.copies[4].requires_grad_(True)
    twins.sharded = ShardedLion(twins.params, lr=0.5, bucket_mb=ONE, reduce_dtype="bfloat16")
    twins.sharded.load_state_dict(state)
    twins.backward(2, everywhere)
    twins.sharded.load_state_dict(twins.sharded.state_dict())  # while gradients are reduced
    twins.step("loaded")
    twins.finish()


def test_frozen_parameters_and_loads(tmp_path: Path) -> None:
    run_ranks(body_frozen, 3, tmp_path)


def body_zeroed(rank: int, world_size: int) -> None:
    twins = Twins(rank, world_size)
    everywhere = [ALL] * world_size
    for number, way in enumerate(("optimizer", "model", "zeros")):
        twins.backward(3 * number, everywhere)
        if way == "optimizer":
            twins.sharded.zero_grad()
        elif way == "model":
            nn.ParameterList(twins.params).zero_grad()
        else:
            twins.sharded.zero_grad(set_to_none=False)
        # The interval gets no other round: what follows waits for the step. Zeros still count as gradients.
        zeros = {i: torch.zeros_like(p, dtype=F32) for i, p in enumerate(twins.params)}
        twins.sums, twins.has_sums = (zeros, True) if way == "zeros" else ({}, False)
        twins.left = [{} for _ in twins.left]
        twins.backward(3 * number + 1, everywhere)
        twins.step(way)
    twins.finish()


def test_zeroed_gradients(tmp_path: Path) -> None:
    run_ranks(body_zeroed, 2, tmp_path)


def body_bytes(rank: int, world_size: int) -> None:
    """An element of the parameters takes 2 bytes on the way to its owner and 0.25 back, however it is stored."""
    for dtype in (F32, BF16):
        params = [nn.Parameter(torch.ones(n, dtype=dtype)) for n in (128 * world_size * 40, 128 * world_size * 9)]
        optimizer = ShardedLion(params, param_sync="signs", reduce_dtype=BF16, bucket_mb=TINY)
        for step in range(3):
            with Counter() as counter:
                sum((p * rank).float().sum() for p in params).backward()  # type: ignore[union-attr]
                optimizer.step()
            numel = sum(p.numel() for p in params)
            assert sum(counter.bytes["all to all"]) == 2 * numel
            assert numel / 4 <= sum(counter.bytes["gather"]) <= numel / 4 + 1024
            assert not counter.bytes["scatter"]
            if step:  # the order of buckets is known: one flag a parameter
                assert sum(counter.bytes["reduce"]) < 64
                assert not counter.bytes["broadcast"]
            optimizer.zero_grad()


def test_bytes_on_the_wire(tmp_path: Path) -> None:
    run_ranks(body_bytes, 2, tmp_path, on_cpu=True)


def body_memory(rank: int, world_size: int) -> None:
    """Never more than two buckets are under way, and gradients are freed when they have been rounded."""
    twins = Twins(rank, world_size)
    start = AllToAllAverage.start
    under_way: list[Any] = []
    gradients: list[Any] = []
    most = 0

    def watched(self: Any, bucket: int, inputs: Any, adds: bool) -> Any:
        nonlocal most
        started = start(self, bucket, inputs, adds)
        under_way.append(weakref.ref(started))
        gradients.extend(weakref.ref(t) for t in inputs if t is not None and not adds)
        most = max(most, sum(ref() is not None for ref in under_way))
        return started

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AllToAllAverage, "start", watched)
        for number in range(2):
            twins.backward(number, [ALL] * world_size)
            # What is left are the tail buffers of the parameters, which stay.
            assert sum(ref() is not None for ref in gradients) <= number + 1
            twins.step(f"step {number}")
    assert len(under_way) >= 8
    assert most == 2
    assert not any(ref() is not None for ref in under_way)


def test_memory_is_bounded(tmp_path: Path) -> None:
    run_ranks(body_memory, 2, tmp_path, on_cpu=True)


def body_refused(rank: int, world_size: int) -> None:
    params = [nn.Parameter(torch.ones(3, device=device_of(rank, world_size)))]
    for bad, error, match in (
        (torch.float16, ValueError, "reduce_dtype must be None or torch.bfloat16, got torch.float16.*65504"),
        (torch.float32, ValueError, "got torch.float32.*with None.*torch.bfloat16"),
        ("float16", ValueError, "reduce_dtype must be None or torch.bfloat16, got 'float16'"),
        (torch.int8, ValueError, "got torch.int8"),
        ("half", TypeError, "got 'half'"),
        (16, TypeError, "got 16"),
    ):
        with pytest.raises(error, match=match):
            ShardedLion(params, reduce_dtype=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"reduce_dtype is for stage=2.*DistributedDataParallel"):
        ShardedLion(params, reduce_dtype=BF16, stage=1)
    with pytest.raises(ValueError, match=r"Rank 0: reduce_dtype None. Rank 1: reduce_dtype torch.bfloat16"):
        ShardedLion(params, reduce_dtype=BF16 if rank else None)
    with pytest.raises(RuntimeError if rank else ValueError, match="reduce_dtype must be None"):
        ShardedLion(params, reduce_dtype=None if rank else torch.float16)
    ShardedLion(params, reduce_dtype="torch.bfloat16")


def test_other_dtypes_are_refused_on_every_rank(tmp_path: Path) -> None:
    run_ranks(body_refused, 2, tmp_path)


def test_between_nodes(tmp_path: Path) -> None:
    run_ranks(body_hybrid, 4, tmp_path, (2, 2))
