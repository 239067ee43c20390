"""Stage 2: gradients that are zeroed without the optimizer. Against Lion on the averaged gradient: the same bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from lion_dist.update import reference
from tests.asserts import assert_same_bits, assert_unmoved
from tests.harness import run_ranks
from tests.scenarios.pair import (
    Pair,
    add_group,
    backward_expect,
    gradient,
    model_of,
    other_ranks_and_dtypes,
    run_bodies,
)
from tests.scenarios.passes import TINY

# Orders of a backward's gradients: autograd takes the term made last first. Parameter 4 is the smallest, the sentinel.
SENTINEL_LAST, SENTINEL_FIRST = [4, 0, 1, 2, 3], [0, 1, 2, 3, 4]


def body_zeroed_in_place(rank: int, world_size: int) -> None:
    """It does not reach what has been reduced, which later backwards would have been added to."""
    for bucket_mb in (TINY, 64.0):
        pair = Pair(rank, world_size, bucket_mb=bucket_mb)
        pair.train(0)
        calls: tuple[Callable[[], object], ...] = (
            partial(pair.backward, 2, SENTINEL_FIRST),
            partial(pair.backward, 2, SENTINEL_LAST),
            pair.sharded.step,
            partial(pair.sharded.clip_grad_norm_, 1.0),
        )
        for call in calls:
            backward_expect(pair, 1)
            pair.sharded.step()
            pair.lion.step()
            model_of(pair).zero_grad(set_to_none=False)
            with pytest.raises(RuntimeError, match=r"ShardedLion's own clip_grad_norm_\(\) and zero_grad\(\)"):
                call()
            pair.check("refused")
            pair.sharded.zero_grad()
            pair.lion.zero_grad()
            pair.train(3)
        pair.finish()


def body_zeros_then_none(rank: int, world_size: int) -> None:
    """Zeros count as gradients, which decay their parameters; then there are none, even of those zeros."""
    pair = Pair(rank, world_size)
    for step, of in enumerate(([0, 2], SENTINEL_LAST, SENTINEL_FIRST, [], [4])):
        pair.train(step)
        backward_expect(pair, 10 + step)
        for optimizer, params in ((pair.sharded, pair.params), (pair.lion, pair.copies)):
            if step % 2:
                optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            nn.ParameterList(params).zero_grad()
        if of:
            backward_expect(pair, 20 + step, of)
        pair.step(f"gradients of {of} only")
    # The other way round: where gradients are None, there are none to be made zeros of.
    backward_expect(pair, 30)
    for optimizer, params in ((pair.sharded, pair.params), (pair.lion, pair.copies)):
        optimizer.step()
        nn.ParameterList(params).zero_grad()
        optimizer.zero_grad(set_to_none=False)
    pair.step("no gradients")
    pair.finish()


def body_zeroed_before_group(rank: int, world_size: int) -> None:
    """The new group must not bring back gradients that were set to None."""
    for uses_new in (False, True):
        pair = Pair(rank, world_size)
        pair.train(0)
        pair.backward(1)
        model_of(pair).zero_grad()
        add_group(pair, (500,))
        if uses_new:
            backward_expect(pair, 2, [5])
        pair.step("old parameters do not move")
        pair.train(3, 4)
        pair.finish()


def body_create_graph(rank: int, world_size: int) -> None:
    """With create_graph autograd replaces p.grad, the sentinel's too, instead of adding to it."""
    pair = Pair(rank, world_size)
    pair.train(0)
    for step, (count, by_model) in enumerate([(1, True), (1, True), (2, False), (2, True), (3, False)]):
        for number in range(count):
            # Gradients have a graph, and still the values that the copies' have.
            curved = torch.stack([(p - p.detach()).square().sum() for p in pair.params]).sum()
            (pair.loss(10 * step + number) + curved).backward(create_graph=True)
            pair.expect(10 * step + number)
        grads = [p.grad for p in pair.copies if p.grad is not None]
        total = torch.stack([reference.sum_of_squares(g) for g in grads]).sum()
        norm, coefficient = reference.clip_coefficient(total, 5.0)
        assert_same_bits(pair.sharded.clip_grad_norm_(5.0), norm, f"norm of {count} backwards")
        for g in grads:
            g.mul_(coefficient)
        for optimizer in (pair.sharded, pair.lion):
            optimizer.step()
        pair.check(f"{count} backwards, zeroed by model: {by_model}")
        (model_of(pair) if by_model else pair.sharded).zero_grad()
        pair.lion.zero_grad()
    pair.finish()


@pytest.mark.parametrize(
    "body", [body_zeroed_in_place, body_zeros_then_none, body_zeroed_before_group, body_create_graph]
)
def test_zeroing(body: Callable[[int, int], None], tmp_path: Path) -> None:
    run_ranks(body, 2, tmp_path)


def body_zeroed_by_model(rank: int, world_size: int) -> None:
    """model.zero_grad() is seen after whatever has come between it and the backward."""
    pair = Pair(rank, world_size)
    pair.train(0, 1)
    pair.backward(2)
    add_group(pair, (500,))  # which has the shards made anew
    model_of(pair).zero_grad()
    pair.step("group added, then zeroed")
    pair.backward(3)
    model_of(pair).zero_grad()
    for i in (0, 2):  # and then gradients by hand
        pair.params[i].grad = gradient(i, pair.params[i], 4, rank, world_size)
    pair.expect(4, [0, 2])
    pair.step("by hand")
    pair.backward(5)
    pair.sharded.clip_grad_norm_(1.0)
    model_of(pair).zero_grad()
    weights = [p.detach().clone() for p in pair.params]
    with pytest.raises(ValueError, match="changed since clip_grad_norm_"):
        pair.sharded.step()
    assert_unmoved(pair.params, weights)
    pair.sharded.zero_grad()
    pair.train(6)
    pair.finish()


def test_zeroed_by_model(tmp_path: Path) -> None:
    run_ranks(body_zeroed_by_model, 2, tmp_path)


@other_ranks_and_dtypes
def test_on_other_ranks_and_in_bfloat16(world_size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    bodies: list[Callable[[int, int], object]] = [body_zeroed_in_place, body_zeros_then_none, body_zeroed_before_group]
    if dtype == torch.float32:  # the fused step does not round a scaled gradient to 16 bits, as the copies do
        bodies.append(body_create_graph)
    run_ranks(run_bodies, world_size, tmp_path, (bodies, dtype))
