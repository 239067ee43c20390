"""Stage 2 in the life of a training run: parameters and groups that change in mid-run, and other optimizers. Against
Lion on the averaged gradient: the same bits.
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
from lion_dist.sharding.grad_reducer import GradReducer
from tests.asserts import assert_same_bits, assert_same_momentum
from tests.harness import device_of, run_ranks
from tests.scenarios.pair import LR, Pair, average, gradient, other_ranks_and_dtypes, run_bodies
from tests.scenarios.passes import TINY


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


def test_loading_warns_that_gradients_are_dropped(tmp_path: Path) -> None:
    run_ranks(body_load_merges, 3, tmp_path)


@pytest.mark.parametrize("world_size", [2, 3])
def test_state_in_mid_run(world_size: int, tmp_path: Path) -> None:
    run_ranks(body_state, world_size, tmp_path)


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


# Other optimizers ---------------------------------------------------------------------------------------------


def body_second_optimizer(rank: int, world_size: int) -> None:
    pair = Pair(rank, world_size)
    pair.train(0)
    first = pair.sharded
    pair.sharded = ShardedLion(pair.params, lr=LR, weight_decay=0.1, bucket_mb=TINY)
    pair.lion = Lion(pair.copies, lr=LR, weight_decay=0.1)
    pair.train(1)
    calls: list[Callable[[], object]] = [first.step, partial(first.clip_grad_norm_, 1.0)]
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
    pair.step("after the first one is deleted")
    pair.finish()


def test_second_optimizer_takes_over(tmp_path: Path) -> None:
    run_ranks(body_second_optimizer, 2, tmp_path)


def deleted(pair: Pair, stage: int, clipped: bool) -> None:
    """The optimizer of a pair that has made a step ends with its last reference, without the garbage collector."""

    def backward(step: int) -> None:
        if stage == 2:
            pair.backward(step)
            return
        for i, p in enumerate(pair.params):
            p.grad = average(i, p, step, pair.world_size)

    backward(0)
    pair.sharded.step()
    pair.sharded.zero_grad()
    backward(1)  # in stage 2 a round of buckets is open
    if clipped:
        pair.sharded.clip_grad_norm_(1.0)
    optimizer = weakref.ref(pair.sharded)
    buffers = [weakref.ref(buffer) for shard in pair.sharded._shards for buffer in shard.buffers.values()]
    assert buffers
    del pair.sharded
    assert optimizer() is None
    assert not [buffer for buffer in buffers if buffer() is not None]
    assert not [o for o in gc.get_objects() if isinstance(o, GradReducer)]
    for p in pair.params:
        assert not getattr(p, "_post_accumulate_grad_hooks", None)
        p.grad = None
    pair.backward(2)
    for i, p in enumerate(pair.params):
        assert p.grad is not None
        assert_same_bits(p.grad, gradient(i, p, 2, pair.rank, pair.world_size), "left alone")


def body_deleted(rank: int, world_size: int) -> None:
    """Parameters live on after their optimizer, and must be what they were."""
    gc.disable()
    try:
        for stage in (1, 2):
            for sync in ("params", "signs"):
                for clipped in (False, True):
                    deleted(Pair(rank, world_size, stage=stage, param_sync=sync), stage, clipped)
    finally:
        gc.enable()


def test_nothing_is_left_of_a_deleted_optimizer(tmp_path: Path) -> None:
    run_ranks(body_deleted, 2, tmp_path)


@other_ranks_and_dtypes
def test_on_other_ranks_and_in_bfloat16(world_size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    bodies = [body_groups_grow, body_freezing, body_closure, body_state, body_load_merges]
    run_ranks(run_bodies, world_size, tmp_path, (bodies, dtype))
