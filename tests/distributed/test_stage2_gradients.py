"""Stage 2: where gradients are kept between a backward and the step. Against Lion on the averaged gradient: the same
bits.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lion_dist import Lion, ShardedLion
from tests.asserts import assert_same_bits
from tests.harness import device_of, run_ranks
from tests.scenarios.pair import LR, SIZES, Pair, average, gradient, other_ranks_and_dtypes, run_bodies
from tests.scenarios.passes import TINY


def body_released(rank: int, world_size: int) -> None:
    """That gradients leave p.grad is what stage 2 saves memory by."""
    for bucket_mb in (TINY, 64.0):
        pair = Pair(rank, world_size, bucket_mb=bucket_mb)
        with pytest.raises(RuntimeError, match="DistributedDataParallel"):
            ShardedLion([nn.Parameter(torch.ones(3, device=pair.device))], stage=1).no_sync()
        for step in range(3):
            with pair.sharded.no_sync():
                pair.backward(step)
                for i, p in enumerate(pair.params):
                    assert p.grad is not None
                    assert_same_bits(p.grad, gradient(i, p, step, rank, world_size), "this rank's own, in full")
            pair.backward(10 + step)
            pair.expect(step)
            pair.expect(10 + step)
            left = [p for p in pair.params if p.grad is not None]
            assert [p.numel() for p in left] == [3]  # the sentinel, with zeros
            assert left[0].grad is not None
            assert not left[0].grad.any()
            pair.step(f"step {step}")
        pair.finish()


@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_leave_and_stay_under_no_sync(world_size: int, tmp_path: Path) -> None:
    run_ranks(body_released, world_size, tmp_path)


def body_by_hand(rank: int, world_size: int) -> None:
    """Gradients that no backward made, some of them in another memory order than their parameter's."""
    pair = Pair(rank, world_size)
    for step in range(4):
        of = [0, 2, 3] if step % 2 else [0, 1, 2, 3, 4]
        if step == 3:  # beside gradients that came by themselves
            pair.backward(step, [4])
            pair.expect(step, [4])
        for i in of:
            g = gradient(i, pair.params[i], step, rank, world_size)
            pair.params[i].grad = turned = g.t().contiguous().t() if g.dim() == 2 else g
            if g.dim() == 2:
                assert turned.stride() != pair.params[i].stride()
        pair.expect(step, of)
        pair.step(f"step {step}")
    # On one rank only: averaged with zeros.
    if rank == 0:
        pair.params[0].grad = torch.full_like(pair.params[0], 2.0 * world_size).t().contiguous().t()
    pair.copies[0].grad = torch.full_like(pair.copies[0], 2.0)
    pair.step("of one rank")
    pair.finish()


def body_by_hand_beside(rank: int, world_size: int) -> None:
    """After a backward: a parameter that it did not reach takes a gradient by hand, and one whose gradient has left
    takes no other, whichever parameter is the smallest."""
    smallest = len(SIZES) - 1
    others = [1, 2, 3]
    for reached, by_hand in ([0, *others], smallest), ([0, smallest], 1), ([smallest], 3), ([0], smallest):
        pair = Pair(rank, world_size)
        pair.train(0)

        def give(i: int, step: int, pair: Pair = pair) -> None:
            pair.params[i].grad = gradient(i, pair.params[i], step, pair.rank, pair.world_size)

        for step, (passes, stepped) in enumerate([(1, False), (2, False), (1, True)], 1):
            for number in range(passes):
                pair.backward(10 * step + number, reached)
                pair.expect(10 * step + number, reached)
            if stepped:  # and not zeroed: gradients go on to add up
                pair.sharded.step()
                pair.lion.step()
            give(by_hand, 100 + step)
            pair.expect(100 + step, [by_hand])
            pair.step(f"parameter {by_hand} by hand, after {passes} backwards, {stepped=}")

            for i in reached:
                calls: list[Callable[[], object]] = [
                    pair.sharded.step, partial(pair.sharded.clip_grad_norm_, 1.0), partial(pair.backward, 5, [0]),
                    partial(pair.backward, 5, [i]), partial(pair.backward, 5, [by_hand]),
                ]  # fmt: skip
                for call in calls if i in (reached[-1], 0) else calls[:1]:
                    if (call is calls[2] and i == 0) or call is calls[3]:
                        continue  # autograd adds to it before anybody could look
                    for _ in range(passes):
                        pair.backward(50 + step, reached)
                    if stepped:
                        pair.sharded.step()
                        with torch.no_grad():
                            for copy, p in zip(pair.copies, pair.params, strict=True):
                                copy.copy_(p)
                        pair.lion.load_state_dict(pair.sharded.full_state_dict())
                    give(i, 200 + step)
                    with pytest.raises(RuntimeError, match="reduced"):
                        call()
                    pair.check("refused")
                    pair.sharded.zero_grad()
                    pair.train(9)  # else the gradients of the next backward wait in p.grad, and may be replaced
        pair.finish()


@pytest.mark.parametrize("body", [body_by_hand, body_by_hand_beside])
def test_gradients_set_by_hand(body: Callable[[int, int], None], tmp_path: Path) -> None:
    run_ranks(body, 3, tmp_path)


def body_other_dtypes(rank: int, world_size: int) -> None:
    """The error says what to do: a gradient was given another dtype than its parameter, or both were converted."""
    for converted, match in ((False, "leave its grad_dtype"), (True, "convert and move the model before")):
        for reduce_dtype in (None, torch.bfloat16):
            p = nn.Parameter(torch.ones(300, dtype=torch.bfloat16))
            optimizer = ShardedLion([p], lr=LR, reduce_dtype=reduce_dtype)
            if converted:
                p.data = p.data.float()
            p.grad_dtype = torch.float32
            with pytest.raises(TypeError, match=f"parameter 0 .* is torch.float32 on cpu, .* {match}"):
                (p * 2).sum().backward()
            optimizer.zero_grad()
            assert (p == 1).all()


def test_gradients_of_another_dtype(tmp_path: Path) -> None:
    run_ranks(body_other_dtypes, 1, tmp_path, on_cpu=True)


def body_never_zeroed(rank: int, world_size: int) -> None:
    """Gradients add up over steps, and a step without a backward uses those that are there, as with p.grad."""
    pair = Pair(rank, world_size)
    for step in range(4):
        of = [0, 2, 4] if step % 2 else None
        pair.backward(step, of)
        pair.expect(step, of)
        for what in ("", ", again"):
            pair.sharded.step()
            pair.lion.step()
            pair.check(f"step {step}{what}")
    pair.finish()


@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_that_nobody_zeroes(world_size: int, tmp_path: Path) -> None:
    run_ranks(body_never_zeroed, world_size, tmp_path)


def body_create_graph(rank: int, world_size: int) -> None:
    """Weights and gradients stay small dyadic numbers, as the gradient depends on the weight here."""
    device = device_of(rank, world_size)
    shapes = [(300,), (12, 20), (5,)]
    params = [nn.Parameter(torch.ones(shape, device=device)) for shape in shapes]
    copies = [nn.Parameter(torch.ones(shape, device=device)) for shape in shapes]
    optimizer, lion = ShardedLion(params, lr=LR, bucket_mb=TINY), Lion(copies, lr=LR)
    for step in range(3):
        for create_graph in (True, False) if step == 2 else (True,):
            terms = [(p * p * gradient(i, p, step, rank, world_size)).sum() for i, p in enumerate(params)]
            torch.stack(terms).sum().backward(create_graph=create_graph)
        del terms
        gc.collect()
        assert not [t for t in gc.get_objects() if isinstance(t, Tensor) and t.grad_fn is not None], "a graph is kept"
        for i, p in enumerate(copies):
            p.grad = 2 * p.detach() * average(i, p, step, world_size) * (2 if step == 2 else 1)
        for o in (optimizer, lion):
            o.step()
            o.zero_grad()
        for p, copy in zip(params, copies, strict=True):
            assert_same_bits(p, copy, f"step {step}")


def test_create_graph(tmp_path: Path) -> None:
    run_ranks(body_create_graph, 3, tmp_path)


@other_ranks_and_dtypes
def test_on_other_ranks_and_in_bfloat16(world_size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    bodies = [body_never_zeroed, body_by_hand, body_create_graph]
    run_ranks(run_bodies, world_size, tmp_path, (bodies, dtype))


def body_one_rank(rank: int, world_size: int) -> None:
    """Nothing is sent, and gradients come and go as on several ranks."""
    run_bodies(rank, world_size, [body_released, body_never_zeroed, body_by_hand, body_create_graph])
    with pytest.MonkeyPatch.context() as patched:
        for name in ("allreduce", "broadcast", "reduce_scatter", "allgather"):
            for method in [m for m in dir(dist.ProcessGroup) if m.startswith(name)]:
                patched.setattr(dist.ProcessGroup, method, None)
        Pair(rank, world_size).train(0, 1)


def test_on_one_rank(tmp_path: Path) -> None:
    run_ranks(body_one_rank, 1, tmp_path)
