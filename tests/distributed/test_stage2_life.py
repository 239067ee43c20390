"""Stage 2 in the life of a training run: parameters and groups that change in mid-run, where gradients are, other
optimizers. Against Lion on the averaged gradient, or stage 1: the same bits.

What becomes of gradients on their way is test_stage2.py's.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lion_dist import Lion, ShardedLion
from lion_dist.sharding import collectives
from tests.bits import assert_same_bits
from tests.distributed.pair import (
    LR,
    SHORT,
    SIZES,
    Pair,
    average,
    gradient,
)
from tests.distributed.test_sharded_lion import FP32, assert_same_model, assert_same_momentum
from tests.distributed.test_stage2 import FEW, TINY, Pass, Step, averages, backward, some
from tests.distributed.toy import SHAPES, Toy
from tests.harness import device_of, run_ranks


def body_groups_grow(rank: int, world_size: int) -> None:
    """Between two steps, and between backward and step, where the new parameter may have a gradient already."""
    for bucket_mb in (TINY, 64.0):
        pair = Pair(rank, world_size, bucket_mb=bucket_mb)
        pair.train(0, 1)
        pair.add((500,))
        for optimizer, params in ((pair.sharded, pair.params), (pair.lion, pair.copies)):
            optimizer.add_param_group({"params": [params[-1]], "lr": 0.125})
        pair.train(2, 3)
        # Used in a backward before it is given to the optimizer, and the smallest, so the next sentinel.
        pair.add((2,))
        pair.backward(4)
        pair.expect(4)
        for optimizer, params in ((pair.sharded, pair.params), (pair.lion, pair.copies)):
            optimizer.add_param_group({"params": [params[-1]]})
        pair.step("with its gradient")
        # Given to the optimizer after a backward that does not use it.
        pair.backward(5, [0, 2, 4])
        pair.expect(5, [0, 2, 4])
        pair.add((129, 3))
        for optimizer, params in ((pair.sharded, pair.params), (pair.lion, pair.copies)):
            optimizer.add_param_group({"params": [params[-1]]})
        pair.step("without a gradient")
        pair.train(6, 7, 8)
        pair.finish()


@pytest.mark.parametrize("world_size", [2, 3])
def test_groups_added_in_mid_run(world_size: int, tmp_path: Path) -> None:
    run_ranks(body_groups_grow, world_size, tmp_path)


def body_freezing(rank: int, world_size: int) -> None:
    pair = Pair(rank, world_size)
    pair.add((77,), requires_grad=False)
    for optimizer, params in ((pair.sharded, pair.params), (pair.lion, pair.copies)):
        optimizer.add_param_group({"params": [params[-1]]})

    def freeze(i: int, frozen: bool = True) -> None:
        for params in (pair.params, pair.copies):
            params[i].requires_grad_(not frozen)

    pair.train(0)
    freeze(1)
    pair.train(1, 2)
    freeze(4)  # the sentinel itself
    pair.train(3, 4)
    freeze(4, frozen=False)
    freeze(5, frozen=False)  # frozen when it was given
    pair.train(5, 6)
    freeze(1, frozen=False)
    pair.train(7, 8)
    pair.backward(9)
    pair.expect(9)
    freeze(0)  # between backward and step: its gradient is stepped
    pair.step("frozen before the step")
    pair.train(10)
    freeze(0, frozen=False)
    pair.train(11)
    # Frozen while the shards are made anew: it is hooked when it is unfrozen, and its gradient leaves p.grad again.
    for i in (4, 0):
        freeze(i)
        pair.train(12 + i)
        pair.add((500,))
        for optimizer, params in ((pair.sharded, pair.params), (pair.lion, pair.copies)):
            optimizer.add_param_group({"params": [params[-1]]})
        pair.train(13 + i)
        freeze(i, frozen=False)
        pair.train(14 + i)
    pair.backward(20)
    pair.expect(20)
    assert sum(p.grad is not None for p in pair.params) == 1
    pair.step("hooked again")
    pair.finish()


@pytest.mark.parametrize("world_size", [2, 3])
def test_freezing_and_unfreezing(world_size: int, tmp_path: Path) -> None:
    run_ranks(body_freezing, world_size, tmp_path)


def body_subgroup(rank: int, world_size: int) -> None:
    members = [0, 2]
    group = dist.new_group(members)
    if rank not in members:
        with pytest.raises(ValueError, match="not in process_group"):
            ShardedLion([nn.Parameter(torch.zeros(3))], process_group=group)
        return
    pair = Pair(members.index(rank), 2, device_of(rank, world_size), process_group=group)
    pair.train(0, 1)
    pair.backward(2)
    pair.expect(2)
    pair.backward(3)
    pair.expect(3)
    pair.step("two backwards")
    assert pair.sharded.clip_grad_norm_(1.0).item() == 0  # of no gradients
    pair.sharded.zero_grad()
    pair.train(4)
    pair.finish()


def test_process_group_that_is_not_world(tmp_path: Path) -> None:
    run_ranks(body_subgroup, 3, tmp_path)


def body_closure(rank: int, world_size: int) -> None:
    pair = Pair(rank, world_size)
    for step in range(3):

        def closure(step: int = step) -> float:
            pair.sharded.zero_grad()
            loss = pair.loss(step)
            loss.backward()
            return loss.item()

        expected = pair.loss(step).item()
        pair.expect(step)
        assert pair.sharded.step(closure) == expected
        pair.lion.step()
        pair.lion.zero_grad()
        pair.check(f"step {step}")
    pair.finish()


def test_closure(tmp_path: Path) -> None:
    run_ranks(body_closure, 2, tmp_path)


def body_state(rank: int, world_size: int) -> None:
    """Saved and loaded between steps, and between backward and step, where the gradient goes on to the step."""
    for bucket_mb in (TINY, 64.0):
        pair = Pair(rank, world_size, bucket_mb=bucket_mb)
        pair.train(0, 1)
        saved, expected = pair.sharded.full_state_dict(), pair.lion.state_dict()
        assert_same_momentum(saved, pair.lion)
        expected["state"] = {i: {"exp_avg": s["exp_avg"].clone()} for i, s in expected["state"].items()}
        pair.train(2, 3)
        pair.sharded.load_state_dict(saved)
        pair.lion.load_state_dict(expected)
        pair.train(4)
        pair.backward(5)
        pair.expect(5)
        assert_same_momentum(pair.sharded.full_state_dict(), pair.lion)
        pair.step("saved before the step")
        pair.backward(6, [0, 3, 4])
        pair.expect(6, [0, 3, 4])
        pair.sharded.load_state_dict(saved)
        pair.lion.load_state_dict(expected)
        pair.step("loaded before the step")
        pair.train(7, 8)
        pair.finish()


def body_load_merges(rank: int, world_size: int) -> None:
    """Loading momenta of another dtype makes the shards anew, and puts parameters together that were given apart:
    gradients of before are dropped, and said to be. Of the same dtype the shards stay, and the gradients."""
    pair = Pair(rank, world_size)
    pair.add((500,))
    for optimizer, params in ((pair.sharded, pair.params), (pair.lion, pair.copies)):
        optimizer.add_param_group({"params": [params[-1]]})
    pair.train(0, 1)
    pair.backward(2)
    pair.sharded.load_state_dict(pair.sharded.full_state_dict())
    pair.expect(2)
    pair.step("gradients kept")
    saved = pair.sharded.full_state_dict()
    for entry in saved["state"].values():
        entry["exp_avg"] = entry["exp_avg"].to(torch.float32 if pair.dtype == torch.bfloat16 else torch.bfloat16)
    pair.backward(3)
    with pytest.warns(UserWarning, match=r"gradients reduced before load_state_dict\(\) were dropped"):
        pair.sharded.load_state_dict(saved)
    pair.lion.load_state_dict(saved)
    pair.step("not stepped, nor decayed")
    pair.train(4)
    pair.finish()


def test_loading_drops_gradients_aloud(tmp_path: Path) -> None:
    run_ranks(body_load_merges, 3, tmp_path)


@pytest.mark.parametrize("world_size", [2, 3])
def test_state_in_mid_run(world_size: int, tmp_path: Path) -> None:
    run_ranks(body_state, world_size, tmp_path)


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
    run_ranks(body_between, world_size, tmp_path, timeout=SHORT)


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
    with pytest.raises(ValueError, match=r"buffer 0: shape \(1,\)"):
        optimizer.broadcast_buffers([torch.zeros(1 + rank, device=device)])


def test_broadcast_buffers(tmp_path: Path) -> None:
    run_ranks(body_buffers, 3, tmp_path)


def body_moved(rank: int, world_size: int) -> None:
    pair = Pair(rank, world_size)
    kept = []  # so that nothing can lie where it lay before
    for step in range(4):
        pair.train(step)
        for p in pair.params:
            kept.append(p.data)
            p.data = p.data.clone()
        pair.backward(10 + step)
        pair.expect(10 + step)
        for p in pair.params:
            kept.append(p.data)
            p.data = p.data.clone()
        pair.step(f"moved before step {step}")
    pair.finish()


def test_parameters_that_move(tmp_path: Path) -> None:
    run_ranks(body_moved, 2, tmp_path)


# Where gradients are ------------------------------------------------------------------------------------------


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
            pair.params[i].grad = g.t().contiguous().t() if g.dim() == 2 else g
            if g.dim() == 2:
                assert pair.params[i].grad.stride() != pair.params[i].stride()
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
        assert all(g.grad_fn is None and not g.requires_grad for g in optimizer._grads._reducer.grads)  # type: ignore[union-attr]
        for i, p in enumerate(copies):
            p.grad = 2 * p.detach() * average(i, p, step, world_size) * (2 if step == 2 else 1)
        for o in (optimizer, lion):
            o.step()
            o.zero_grad()
        for p, copy in zip(params, copies, strict=True):
            assert_same_bits(p, copy, f"step {step}")


def test_create_graph(tmp_path: Path) -> None:
    run_ranks(body_create_graph, 3, tmp_path)


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


# Other optimizers ---------------------------------------------------------------------------------------------


def body_second_optimizer(rank: int, world_size: int) -> None:
    pair = Pair(rank, world_size)
    pair.train(0)
    first = pair.sharded
    pair.sharded = ShardedLion(pair.params, lr=LR, weight_decay=0.1, bucket_mb=TINY)
    pair.lion = Lion(pair.copies, lr=LR, weight_decay=0.1)
    pair.train(1)
    calls = [first.step, partial(first.clip_grad_norm_, 1.0)]
    for call in calls:
        with pytest.raises(RuntimeError, match="given to another ShardedLion"):
            call()
    pair.check("the first one stepped nothing")
    pair.train(2)
    del first, call, calls
    gc.collect()  # its end must not take the second one's hooks along
    pair.backward(3)
    assert sum(p.grad is not None for p in pair.params) == 1
    pair.expect(3)
    pair.step("after the first one is gone")
    pair.finish()


def test_second_optimizer_takes_over(tmp_path: Path) -> None:
    run_ranks(body_second_optimizer, 2, tmp_path)


def body_deleted(rank: int, world_size: int) -> None:
    """Parameters live on after their optimizer, and must be what they were."""
    pair = Pair(rank, world_size)
    pair.train(0)
    pair.backward(1)  # a round of buckets is open
    reducer = weakref.ref(pair.sharded._grads._reducer)
    optimizer = weakref.ref(pair.sharded)
    del pair.sharded
    gc.collect()
    assert optimizer() is None
    assert reducer() is None
    for p in pair.params:
        assert not getattr(p, "_post_accumulate_grad_hooks", None)
        p.grad = None
    pair.backward(2)
    for i, p in enumerate(pair.params):
        assert p.grad is not None
        assert_same_bits(p.grad, gradient(i, p, 2, rank, world_size), "left alone")


def test_nothing_is_left_of_a_deleted_optimizer(tmp_path: Path) -> None:
    run_ranks(body_deleted, 2, tmp_path)
