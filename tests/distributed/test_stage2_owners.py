"""Stage 2: parameters that are unfrozen, unused, or handed from one optimizer to another."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lion_dist import Lion, ShardedLion
from tests.harness import run_ranks
from tests.scenarios.pair import (
    ALL,
    LR,
    Pair,
    add_group,
    backward_expect,
    gradient,
    left,
    other_ranks_and_dtypes,
    run_bodies,
)
from tests.scenarios.passes import TINY


def body_unfrozen(rank: int, world_size: int) -> None:
    """Sharded since it has a gradient or is trainable, hooked as soon as it can be."""
    for by_hand in (False, True):
        pair = Pair(rank, world_size)
        add_group(pair, (700,), requires_grad=False)
        pair.train(0)
        if by_hand:  # a frozen parameter with a gradient: sharded, but it cannot be hooked
            pair.params[5].grad = gradient(5, pair.params[5], 1, rank, world_size)
            pair.expect(1, [5])
            backward_expect(pair, 1)
            pair.step("a frozen parameter's gradient")
        for params in (pair.params, pair.copies):
            params[5].requires_grad_(True)
        pair.train(2)
        for step in (3, 4):
            backward_expect(pair, step)
            assert left(pair) == [4]
            pair.step(f"step {step}")
        pair.finish()


def body_unused(rank: int, world_size: int) -> None:
    """Buckets that follow that of an unused parameter leave at the end of the backward, not of the step."""
    pair = Pair(rank, world_size)
    for step in range(6):
        of = [i for i in ALL if i != step - 1]
        backward_expect(pair, step, of)
        smallest = of[-1]  # of those whose gradients have left
        assert left(pair) == [smallest]
        sentinel = pair.params[smallest].grad
        assert sentinel is not None
        assert not sentinel.any()
        pair.step(f"step {step}")
    pair.finish()


def assert_hooks(params: Sequence[Tensor], post: int, pre: int) -> None:
    """Counts post-accumulate hooks of each parameter, and pre-hooks (the sentinel's) of all."""
    assert [len(getattr(p, "_post_accumulate_grad_hooks", None) or {}) for p in params] == [post] * len(params)
    assert sum(len(p._backward_hooks or {}) for p in params) == pre


# What an optimizer was last used for: gradients on their way, reduced, clipped, and zeros.
LEAVES: dict[str, Callable[[Pair], object]] = {
    "backward": lambda pair: pair.backward(1),
    "step": lambda pair: pair.backward_and_step(1),
    "clipping": lambda pair: (pair.backward(1), pair.sharded.clip_grad_norm_(1.0)),
    "zero_grad": lambda pair: (pair.backward_and_step(1), pair.sharded.zero_grad(set_to_none=False)),
}


def replaced(rank: int, world_size: int, last: str) -> tuple[Pair, ShardedLion]:
    """A pair under a new optimizer, and the old one."""
    pair = Pair(rank, world_size)
    pair.train(0)
    LEAVES[last](pair)
    old, pair.sharded = pair.sharded, ShardedLion(pair.params, lr=LR, weight_decay=0.1, bucket_mb=TINY)
    pair.lion = Lion(pair.copies, lr=LR, weight_decay=0.1)
    with torch.no_grad():
        for p, copy in zip(pair.params, pair.copies, strict=True):
            copy.copy_(p)
    return pair, old


def body_gone(rank: int, world_size: int) -> None:
    """Zeros left in p.grad would be stepped, and decay their parameter, by the next optimizer."""
    for last in LEAVES:
        pair = Pair(rank, world_size)
        pair.train(0)
        assert_hooks(pair.params, 1, 1)
        LEAVES[last](pair)
        del pair.sharded
        gc.collect()
        assert left(pair) == [], last
        assert_hooks(pair.params, 0, 0)

        pair, old = replaced(rank, world_size, last)
        assert left(pair) == [], last
        assert_hooks(pair.params, 1, 0)
        backward_expect(pair, 2, [0, 1])  # not the old one's sentinel
        pair.step("the new one steps what it has gradients of")
        del old
        gc.collect()
        assert_hooks(pair.params, 1, 1)
        pair.train(3)
        pair.finish()


def body_replaced_is_refused(rank: int, world_size: int) -> None:
    for last in LEAVES:
        pair, old = replaced(rank, world_size, last)
        for call in (
            old.step,
            partial(old.clip_grad_norm_, 1.0),
            partial(old.load_state_dict, pair.sharded.full_state_dict()),
            partial(old.add_param_group, {"params": [nn.Parameter(torch.ones(3, device=pair.device))]}),
        ):
            with pytest.raises(RuntimeError, match="given to another ShardedLion"):
                call()
        pair.check("not stepped")
        for set_to_none in (False, True):
            with contextlib.suppress(RuntimeError):  # it may be refused, but must not leave zeros that count
                old.zero_grad(set_to_none)
            assert left(pair) == [], last
        pair.train(2)
        pair.finish()


@pytest.mark.parametrize("body", [body_unfrozen, body_unused, body_gone, body_replaced_is_refused])
def test_parameters_that_change_hands(body: Callable[[int, int], None], tmp_path: Path) -> None:
    run_ranks(body, 2, tmp_path)


@other_ranks_and_dtypes
def test_on_other_ranks_and_in_bfloat16(world_size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    bodies = [body_unfrozen, body_unused]
    run_ranks(run_bodies, world_size, tmp_path, (bodies, dtype))
