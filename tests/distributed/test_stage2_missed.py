"""Stage 2 where backward passes miss ranks: they reach no parameter there. Every rank makes the same collectives all
the same. Against Lion on the averaged gradient: the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lion_dist.sharding import flag_exchange
from tests.asserts import assert_unmoved
from tests.harness import run_ranks, spawn_only
from tests.scenarios.pair import ALL, FULL, SHORT, Pair, add_group, clip_both, expect_uses, make_interval, model_of

INTERVALS: list[list[list[list[int]]]] = [
    [FULL, [[], ALL, ALL]],  # the second pass misses a rank,
    [[ALL, [], ALL], FULL],  # the first one,
    [FULL, [[], [], [3]]],  # all but one,
    [[[], [0], [4]], [[1], [], [2]]],  # every rank is missed once, and none has a gradient of parameter 3
    [FULL, FULL, [ALL, [0], []]],
    [[[], [], []], [[], [2], []]],
    [[ALL, [], []]],
    [FULL],
]


def body_intervals(rank: int, world_size: int) -> None:
    for param_sync in ("signs", "params"):
        pair = Pair(rank, world_size, param_sync=param_sync)
        pair.train(0, 1)
        for step, interval in enumerate(INTERVALS * 2):
            make_interval(pair, step, interval)
            if step >= len(INTERVALS):
                clip_both(pair, 3.0)
            pair.step(f"interval {interval}")
        pair.finish()
        # Without zeroing, gradients of all intervals add up.
        for step, interval in enumerate(INTERVALS):
            make_interval(pair, step, interval)
            pair.sharded.step()
            pair.lion.step()
            pair.check(f"not zeroed, interval {interval}")


def body_intervals_unwaited(rank: int, world_size: int) -> None:
    """On GPUs the ranks ask about each other's late gradients only if they expect some, which is once several passes
    have been made in one interval."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flag_exchange, "WAITING_DEVICES", frozenset())
        for first in ([FULL, FULL], [FULL, [[], ALL, ALL]]):
            pair = Pair(rank, world_size)
            make_interval(pair, 0, first)
            pair.step("several passes")
            for step, interval in enumerate(INTERVALS, 1):
                make_interval(pair, step, interval)
                pair.step(f"interval {interval}")
            pair.finish()


@pytest.mark.parametrize("body", [body_intervals, body_intervals_unwaited])
def test_passes_that_miss_ranks(body: Callable[[int, int], None], tmp_path: Path) -> None:
    run_ranks(body, 3, tmp_path, on_cpu=True)


def body_unexpected(rank: int, world_size: int) -> None:
    """On GPUs a rank that made one pass does not wait for the news that others have made two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flag_exchange, "WAITING_DEVICES", frozenset())
        pair = Pair(rank, world_size)
        pair.train(0, 1)

        def train() -> None:
            make_interval(pair, 2, [FULL, [[], ALL, ALL]])
            pair.sharded.step()

        with pytest.raises(RuntimeError, match=r"while others made a single backward pass.*no_sync"):
            train()
        with pytest.raises(RuntimeError, match="can no longer be used"):
            pair.sharded.step()


@spawn_only
def test_unexpected_late_gradients_are_refused(tmp_path: Path) -> None:
    run_ranks(body_unexpected, 3, tmp_path, timeout=SHORT, on_cpu=True)


def body_unfrozen(rank: int, world_size: int) -> None:
    """Frozen when it was given, and unfrozen before a pass that reaches other parameters on every rank."""
    uses: list[list[list[int]]] = [
        [[5], ALL, [0]], [[], [0, 5], [5]], [[], [], ALL], [[5], [], []], [[], [], []], [[5], [5], [5]],
    ]  # fmt: skip
    for number, of_ranks in enumerate(uses):
        for clip in (False, True):
            pair = Pair(rank, world_size)
            add_group(pair, (77,) if number % 2 else (2,), requires_grad=False)  # or the smallest
            for _ in range(3):  # more buckets than may be under way: a backward waits for the other ranks
                add_group(pair, (900,))
            pair.train(0, 1)
            for params in (pair.params, pair.copies):
                params[5].requires_grad_(True)
            make_interval(pair, 2, [of_ranks, FULL] if number % 2 else [of_ranks])
            if clip:
                clip_both(pair, 3.0)
            pair.step(f"unfrozen, then {of_ranks}")
            make_interval(pair, 3, [of_ranks])
            pair.step("once more")
            pair.train(4)
            pair.finish()


def body_other_calls(rank: int, world_size: int) -> None:
    """Collective calls next after a pass that missed ranks, and that need not wait for them in the backward."""
    pair = Pair(rank, world_size, bucket_mb=64.0)
    pair.train(0, 1)
    saved = pair.sharded.full_state_dict()
    buffer = torch.full((640,), float(rank), device=pair.device)

    def load() -> None:
        if len(pair.params) == len(saved["state"]):
            pair.sharded.load_state_dict(saved)
            pair.lion.load_state_dict(saved)

    calls: list[Callable[[], object]] = [
        pair.sharded.full_state_dict, pair.sharded.check_replicas, load, pair.sharded.resync,
        lambda: pair.sharded.broadcast_buffers([buffer]), lambda: add_group(pair, (200,)),
    ]  # fmt: skip
    for step, call in enumerate(calls * 2, 2):
        missed = [[], ALL, [1]] if step % 2 else [[2], [], []]
        make_interval(pair, 2 * step, [missed])
        if step > len(calls) + 1:  # a second pass too, part of whose gradients wait in p.grad
            make_interval(pair, 2 * step + 1, [[[3], [], [0]]])
        call()
        if step % 3:
            make_interval(pair, 2 * step + 2, [[[0], [1], []]])
        pair.step(f"call {step}")
    pair.finish()


@pytest.mark.parametrize("body", [body_unfrozen, body_other_calls])
def test_collectives_after_a_missed_pass(body: Callable[[int, int], None], tmp_path: Path) -> None:
    run_ranks(body, 3, tmp_path, timeout=SHORT, on_cpu=True)


def body_dropped(rank: int, world_size: int, dropped_by: str, next_call: str) -> None:
    """Gradients of a pass that missed the first rank, which cannot know that there was something to drop: the round
    of its own gradients would meet the round that the others made of those."""
    pair = Pair(rank, world_size)
    pair.train(0, 1)
    weights = [p.detach().clone() for p in pair.params]

    def train() -> None:
        make_interval(pair, 2, [[[], ALL, ALL]])
        if dropped_by == "model":
            model_of(pair).zero_grad()
        else:
            pair.sharded.zero_grad(set_to_none=dropped_by == "optimizer")
        if next_call == "pass":
            make_interval(pair, 3, [FULL])
        if next_call == "group":
            add_group(pair, (50,))
        pair.sharded.step()

    with pytest.raises(RuntimeError, match="zeroed, but not those of every rank"):
        train()
    with pytest.raises(RuntimeError, match="can no longer be used"):
        pair.sharded.step()
    pair.params = pair.params[: len(weights)]
    assert_unmoved(pair.params, weights)


@spawn_only
@pytest.mark.parametrize(
    ("dropped_by", "next_call"),
    [("optimizer", "pass"), ("model", "step"), ("optimizer, to zeros", "pass"), ("optimizer", "group")],
)
def test_dropped_gradients_of_a_missed_pass_are_refused(dropped_by: str, next_call: str, tmp_path: Path) -> None:
    run_ranks(body_dropped, 3, tmp_path, (dropped_by, next_call), timeout=SHORT, on_cpu=True)


def body_dropped_by_all(rank: int, world_size: int) -> None:
    """Passes that reach every rank may be dropped, several of them too; gradients of later ones wait for the step."""
    for by_model in (False, True):
        for set_to_none in (False, True):
            if by_model and not set_to_none:
                continue
            pair = Pair(rank, world_size)
            pair.train(0, 1)
            for step in range(2, 8):
                for number in range(step % 3):
                    uses = [[0, 2], [4], [1, 4]] if number else FULL
                    pair.backward(100 + 10 * step + number, uses[rank])
                    if not set_to_none:
                        expect_uses(pair, 100 + 10 * step + number, uses)
                    (model_of(pair) if by_model else pair.sharded).zero_grad(set_to_none=set_to_none)
                    pair.lion.zero_grad(set_to_none=set_to_none)
                if step != 5:
                    make_interval(pair, step, [FULL, [[1], [], ALL]][: 1 + step % 2])
                pair.step(f"step {step}")
            pair.finish()


def test_passes_dropped_by_all_ranks(tmp_path: Path) -> None:
    run_ranks(body_dropped_by_all, 3, tmp_path)
