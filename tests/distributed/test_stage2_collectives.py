"""Stage 2 beside other collective calls, and its own calls on backends that do not average."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lion_dist import Lion, ShardedLion
from lion_dist.sharding import collectives
from tests.asserts import assert_same_bits, assert_same_model, assert_same_momentum
from tests.harness import device_of, run_ranks
from tests.scenarios.pair import LR, Pair, gradient
from tests.scenarios.passes import FEW, Pass, Step, averages, backward, some
from tests.scenarios.toy import FP32, SHAPES, Toy


def body_between(rank: int, world_size: int) -> None:
    """Collectives between a backward and its step, where ranks had different gradients: they may not come between
    those of the buckets. (They met other ranks' reduce-scatters, and hung or ended the process.)"""
    pair = Pair(rank, world_size)
    pair.train(0, 1)
    saved = pair.sharded.full_state_dict()

    def all_reduce() -> None:
        t = torch.ones((), device=pair.device)
        dist.all_reduce(t)
        assert t.item() == world_size

    def buffers() -> None:
        b = torch.full((77,), float(rank), device=pair.device)
        pair.sharded.broadcast_buffers([b])
        assert not b.any()

    def add() -> None:
        pair.add((200,))
        for optimizer, params in ((pair.sharded, pair.params), (pair.lion, pair.copies)):
            optimizer.add_param_group({"params": [params[-1]]})

    def save() -> None:
        assert_same_momentum(pair.sharded.full_state_dict(), pair.lion)

    def load() -> None:
        pair.sharded.load_state_dict(saved)
        pair.lion.load_state_dict(saved)

    def no_clip() -> None:
        pair.sharded.clip_grad_norm_(1e9)

    for step, call in enumerate((all_reduce, buffers, save, load, no_clip, add), 2):
        # The first rank uses all parameters, the others only one, of the bucket that is launched last.
        pair.backward(step, None if rank == 0 else [0])
        for i, p in enumerate(pair.copies):
            ranks = range(world_size if i == 0 else 1)
            p.grad = torch.stack([gradient(i, p, step, r, world_size) for r in ranks]).sum(0) / world_size
        call()
        pair.step(call.__name__)
    pair.finish()


@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives_between_backward_and_step(world_size: int, tmp_path: Path) -> None:
    run_ranks(body_between, world_size, tmp_path)


def body_buffers(rank: int, world_size: int) -> None:
    """Each rank's own until they are broadcast, and again after it."""
    device = device_of(rank, world_size)
    norm = nn.BatchNorm1d(5, momentum=0.5, device=device)
    optimizer = ShardedLion(norm.parameters(), lr=LR)

    def differ() -> bool:
        assert norm.running_mean is not None
        gathered = [torch.empty_like(norm.running_mean) for _ in range(world_size)]
        dist.all_gather(gathered, norm.running_mean)
        return not all(torch.equal(g, gathered[0]) for g in gathered)

    for step in range(2):
        norm(torch.full((4, 5), 1.0 + rank, device=device)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert differ(), f"step {step}"
        mine = [b.clone() for b in norm.buffers()]
        optimizer.broadcast_buffers(norm.buffers())
        assert not differ()
        if rank == 0:
            for b, m in zip(norm.buffers(), mine, strict=True):
                assert_same_bits(b, m, "the first rank's")
    gaps = torch.full((4, 6), float(rank), device=device)
    optimizer.broadcast_buffers([gaps[:, ::2], torch.empty(0, device=device)])
    assert_same_bits(gaps[:, ::2], torch.zeros_like(gaps[:, ::2]), "a buffer with gaps")
    assert_same_bits(gaps[:, 1::2], torch.full_like(gaps[:, 1::2], rank), "between them")
    for dtype in (torch.bool, torch.int16, torch.uint16, torch.uint32, torch.float8_e4m3fn, torch.complex64):
        buffer, firsts = (torch.tensor([1, r, 0], device=device).to(dtype) for r in (rank, 0))
        version = buffer._version
        optimizer.broadcast_buffers([buffer])
        assert_same_bits(buffer, firsts, str(dtype))
        assert buffer._version > version
    buffer = torch.tensor([1 + 1j], device=device)
    buffer = buffer.conj() if rank else buffer  # the same memory, read in another way
    optimizer.broadcast_buffers([buffer])
    assert buffer.tolist() == [1 + 1j]
    with pytest.raises(ValueError, match=r"buffer 0: shape \(1,\)"):
        optimizer.broadcast_buffers([torch.zeros(1 + rank, device=device)])


def test_broadcast_buffers(tmp_path: Path) -> None:
    run_ranks(body_buffers, 3, tmp_path)


def body_without_averaging(rank: int, world_size: int, dtypes: tuple[torch.dtype, ...]) -> None:
    """Backends that only sum: a division more, also of gradients that are added to others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "AVERAGING_BACKENDS", frozenset())

        def twice(step: int, rank: int) -> Step:
            return Step([Pass(some(step, rank, salt)) for salt in range(2)])

        device = device_of(rank, world_size)
        models = [Toy(100, dtypes, device) for _ in range(2)]
        two, lion = ShardedLion(models[0].groups(), lr=0.01, bucket_mb=FEW), Lion(models[1].groups(), lr=0.01)
        for step in range(5):
            for number, a_pass in enumerate(twice(step, rank).passes):
                backward(models[0], a_pass, f"pass{number}", step, rank, world_size)
            expected = averages(models[1], twice, step, world_size)
            for name in SHAPES:
                getattr(models[1], name).grad = expected.get(name)
            for o in (two, lion):
                o.step()
                o.zero_grad()
            assert_same_model(models[0], models[1])
        assert_same_momentum(two.full_state_dict(), lion)


def test_backends_that_do_not_average(tmp_path: Path) -> None:
    run_ranks(body_without_averaging, 3, tmp_path, (FP32,))
