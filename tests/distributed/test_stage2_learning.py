"""The order in which gradients arrive, learned in the first step: what was under way by the old buckets, and who was
ready when. Against Lion on the averaged gradient: the same bits.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.harness import run_ranks
from tests.scenarios.pair import Pair, backward_expect, expect_uses
from tests.scenarios.wire import Counter

# Thousands of elements, and ways for them to arrive: in buckets of ten thousand they make other numbers of buckets.
SIZES = (4, 4, 6, 6)
ORDERS = ([0, 2, 1, 3], [3, 2, 1, 0], [0, 1, 2, 3])


def pair_of(rank: int, world_size: int, sizes: tuple[int, ...], bucket: float) -> Pair:
    return Pair(rank, world_size, sizes=[(1024 * n,) for n in sizes], bucket_mb=bucket * 4096 / 2**20)


def number_of_buckets(pair: Pair, step: int) -> int:
    """Trains for one step, in which every bucket is reduced once."""
    with Counter() as counter:
        pair.train(step)
    return len(counter.bytes["scatter"])


def body_number_of_buckets(rank: int, world_size: int) -> set[tuple[int, int]]:
    """One to three backwards in the learning step, the last of which were reduced by the order that was assumed."""
    changes = set()
    for order, backwards, clips in itertools.product(ORDERS, (1, 2, 3), (False, True)):
        pair = pair_of(rank, world_size, SIZES, 10)
        assumed = number_of_buckets(pair_of(rank, world_size, SIZES, 10), 0)
        for step in range(backwards):
            backward_expect(pair, step, order[::-1])  # autograd takes the term made last first
        if clips:
            pair.sharded.clip_grad_norm_(1e9)  # by nothing
        pair.step(f"order {order}, {backwards} backwards, clips {clips}")
        changes.add((assumed, number_of_buckets(pair, 7)))
        pair.train(8)
        pair.finish()
    return changes


@pytest.mark.parametrize("world_size", [2, 3])
def test_number_of_buckets_changes_with_learning(world_size: int, tmp_path: Path) -> None:
    for changes in run_ranks(body_number_of_buckets, world_size, tmp_path):
        assert {(3, 2), (3, 3), (2, 2)} & changes
        assert any(before != after for before, after in changes)


def body_swapped(rank: int, world_size: int) -> None:
    """Buckets of one size, which a collective could take for each other, ready in another order on every rank."""
    for bucket in (1, 2, 64):
        pair = pair_of(rank, world_size, (1,) * 6, bucket)
        orders = list(itertools.permutations(range(6)))
        for step in range(8):
            uses = [list(orders[(97 * step + 251 * r) % len(orders)]) for r in range(world_size)]
            if step % 3 == 2:
                uses = [use[: 1 + (step + r) % 6] for r, use in enumerate(uses)]  # some on some ranks only
            if step % 2:
                uses = uses[::-1]
            pair.backward(step, uses[rank])
            expect_uses(pair, step, uses)
            pair.step(f"bucket {bucket}, step {step}")
        pair.finish()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_equal_buckets_ready_in_other_orders(world_size: int, tmp_path: Path) -> None:
    run_ranks(body_swapped, world_size, tmp_path)
