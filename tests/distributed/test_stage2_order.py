"""Stage 2: the order in which buckets are reduced, where ranks differ in what they use. Against Lion on the averaged
gradient: the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lion_dist import Lion, ShardedLion
from lion_dist.sharding.collectives import reduce_scatter_mean
from tests.asserts import assert_same_bits
from tests.harness import run_ranks
from tests.scenarios.pair import ALL, LR, Pair, add_group, backward_expect, expect_uses, left
from tests.scenarios.passes import TINY, some


def subsets(step: int, world_size: int) -> list[list[int]]:
    """Part of the parameters for every rank, in an order of its own."""
    names = [str(i) for i in ALL]
    return [[int(name) for name in some(step, rank, of=names)] for rank in range(world_size)]


def body_own_collectives(rank: int, world_size: int) -> None:
    """A reduce-scatter as long as a bucket's would take that one's place on another rank, without an error."""
    group = dist.group.WORLD
    assert group is not None
    pair = Pair(rank, world_size)
    pair.train(0)  # the order is learned: the sentinel first, and the first parameter last
    for step in range(1, 8):
        # The first rank uses all, the others not what is first in the order.
        uses = subsets(step, world_size) if step % 2 else [ALL, *[[0]] * (world_size - 1)]
        pair.backward(step, uses[rank])
        expect_uses(pair, step, uses)
        value = torch.ones((), device=pair.device)
        dist.all_reduce(value)
        assert value.item() == world_size
        for length in (128, 640, 3):
            given = torch.full((length * world_size,), 5.0 * rank, device=pair.device)
            mean = torch.empty(length, device=pair.device)
            reduce_scatter_mean([mean], [given], group).wait()
            assert_same_bits(mean, torch.full_like(mean, 5.0 * (world_size - 1) / 2), f"own mean, step {step}")
        pair.step(f"step {step}")
    pair.finish()


def body_dead_first(rank: int, world_size: int) -> None:
    """An order that nobody has seen yet must not be taken for learned, nor that of a rank that saw none."""
    for first in ("nothing", "unsynced", "first rank idle"):
        pair = Pair(rank, world_size)
        if first == "unsynced":
            with pair.sharded.no_sync():
                backward_expect(pair, 0, [2, 0])
        elif first == "first rank idle":
            if rank:
                pair.backward(0, [0, 3])
            expect_uses(pair, 0, [[], *[[0, 3]] * (world_size - 1)])
        pair.step(first)
        seen: list[list[int]] = []
        handle = pair.params[3].register_post_accumulate_grad_hook(
            lambda _, pair=pair, seen=seen: seen.append(left(pair))
        )
        for step in (1, 2):
            backward_expect(pair, step, ALL[::-1])
            pair.step(f"step {step}, first {first}")
        handle.remove()
        assert {0, 1, 2} <= set(seen[0]), first  # not the order that is assumed before one is learned
        assert not {0, 1, 2} & set(seen[1]), first
        for step in range(3, 7):
            uses = subsets(step, world_size)
            pair.backward(step, uses[rank])
            expect_uses(pair, step, uses)
            pair.step(f"step {step}, first {first}")
        pair.finish()


def body_unfrozen_on_some(rank: int, world_size: int) -> None:
    """Shards that were made while a parameter was frozen have no hook on it until a step after it is unfrozen: its
    first gradient, which one rank alone has, must not be taken for a late one that the others cannot see."""
    pair = Pair(rank, world_size)
    pair.train(0, 1)
    saved = pair.sharded.full_state_dict()  # with a momentum of what is frozen where it is loaded
    for resumed in (False, True):
        if resumed:
            pair = Pair(rank, world_size)
        for p in (pair.params[0], pair.copies[0]):
            p.requires_grad_(False)
        if resumed:
            pair.sharded = ShardedLion(pair.params, lr=LR, weight_decay=0.1, bucket_mb=TINY)
            pair.lion = Lion(pair.copies, lr=LR, weight_decay=0.1)
            pair.sharded.load_state_dict(saved)
            pair.lion.load_state_dict(saved)
        else:
            add_group(pair, (50,))  # which has the shards made anew
        pair.train(2, 3)
        for p in (pair.params[0], pair.copies[0]):
            p.requires_grad_(True)
        uses = [list(range(rank > 0, len(pair.params))) for rank in range(world_size)]
        pair.backward(4, uses[rank])
        expect_uses(pair, 4, uses)
        pair.step(f"unfrozen, used on rank 0 only, resumed: {resumed}")
        pair.train(5)
        pair.finish()


@pytest.mark.parametrize("body", [body_own_collectives, body_dead_first, body_unfrozen_on_some])
def test_ranks_that_differ(body: Callable[[int, int], None], tmp_path: Path) -> None:
    run_ranks(body, 3, tmp_path)
