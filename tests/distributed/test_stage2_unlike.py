"""Stage 2 where ranks do not see the same of what comes between two steps: gradients after clipping that reach some
ranks only, and parameters that were unfrozen. No rank is left in a collective that others do not make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lion_dist import ShardedLion
from lion_dist.sharding import flag_exchange
from tests.asserts import assert_unmoved
from tests.harness import run_ranks, spawn_only
from tests.scenarios.pair import ALL, FULL, SHORT, Pair, add_group, clip_both, make_interval

MISSED = [[], ALL, [0]]


def body_after_clipping(rank: int, world_size: int) -> None:
    for param_sync in ("signs", "params"):
        pair = Pair(rank, world_size, param_sync=param_sync)
        pair.train(0, 1)
        # Another clipping takes in what came since, on every rank.
        make_interval(pair, 2, [FULL])
        pair.sharded.clip_grad_norm_(0.01)
        make_interval(pair, 3, [MISSED])
        clip_both(pair, 0.5)
        pair.step("clipped anew")

        # A step does not.
        weights = [p.detach().clone() for p in pair.params]
        for uses in (MISSED, FULL):
            make_interval(pair, 4, [FULL])
            pair.sharded.clip_grad_norm_(0.01)
            make_interval(pair, 5, [uses])
            changed = r"changed since clip_grad_norm_" if uses[rank] else r"ranks \[1, 2\] .*backward pass between clip"
            with pytest.raises(ValueError, match=changed):
                pair.sharded.step()
            assert_unmoved(pair.params, weights)
            pair.sharded.zero_grad()
            pair.lion.zero_grad()
        for number in range(2):  # zeroed after such a pass: nothing was under way
            make_interval(pair, 6, [FULL])
            pair.sharded.clip_grad_norm_(0.01)
            make_interval(pair, 7, [MISSED])
            pair.sharded.zero_grad(set_to_none=bool(number))
            pair.lion.zero_grad()
        before = [p.detach().clone() for p in pair.params]
        make_interval(pair, 8, [MISSED])
        pair.sharded.step()
        assert not all(torch.equal(p, b) for p, b in zip(pair.params, before, strict=True))
        pair.sharded.check_replicas()


def body_clipped_twice_in_stage_1(rank: int, world_size: int) -> None:
    """A rank where p.grad was written between makes the same collectives."""
    pair = Pair(rank, world_size, stage=1)
    pair.expect(0)
    for p, copy in zip(pair.params, pair.copies, strict=True):
        assert copy.grad is not None
        p.grad = copy.grad.clone()
    pair.sharded.clip_grad_norm_(0.01)
    if rank == 1:
        assert pair.params[0].grad is not None
        pair.params[0].grad.mul_(1.0)
    clip_both(pair, 0.5)
    pair.step("clipped twice")


@spawn_only
@pytest.mark.parametrize("body", [body_after_clipping, body_clipped_twice_in_stage_1])
def test_gradients_after_clipping(body: Callable[[int, int], None], tmp_path: Path) -> None:
    run_ranks(body, 3, tmp_path, timeout=SHORT, on_cpu=True)


def body_unfrozen_unlike(rank: int, world_size: int) -> None:
    for clip in (False, True):
        # Frozen again, once a pass has reached it on one rank: as `Lion` does, a gradient counts.
        pair = Pair(rank, world_size)
        add_group(pair, (77,), requires_grad=False)
        pair.train(0)
        for frozen in (False, True):
            for params in (pair.params, pair.copies):
                params[5].requires_grad_(not frozen)
            if not frozen:
                make_interval(pair, 1, [[[5, 0], ALL, [1]]])
        if clip:
            clip_both(pair, 0.5)
        pair.step("frozen again")
        pair.finish()

        # Unfrozen on one rank only.
        add_group(pair, (50,), requires_grad=False)
        weights = [p.detach().clone() for p in pair.params]
        pair.params[6].requires_grad_(rank == 1)
        make_interval(pair, 2, [FULL])
        call = (lambda pair=pair: pair.sharded.clip_grad_norm_(1.0)) if clip else pair.sharded.step
        with pytest.raises(ValueError, match=r"after unfreezing.*requires_grad"):
            call()
        assert_unmoved(pair.params, weights)


def body_unfrozen_and_zeroed(rank: int, world_size: int) -> None:
    """Dropped before the first step: a pass that reached the first rank by an unfrozen parameter alone."""
    for set_to_none in (True, False):
        pair = Pair(rank, world_size)
        add_group(pair, (77,), requires_grad=False)
        pair.train(0)
        for params in (pair.params, pair.copies):
            params[5].requires_grad_(True)
        uses = [[5], ALL, [0]]
        pair.backward(1, uses[rank])
        pair.sharded.zero_grad(set_to_none)
        make_interval(pair, 2, [FULL])
        if set_to_none:
            pair.step("zeroed before the first step")
            pair.finish()
        else:
            pair.sharded.step()
            pair.sharded.check_replicas()


def body_unfrozen_unlike_unwaited(rank: int, world_size: int) -> None:
    """On GPUs a rank that has nothing to ask about does not wait for the others' answers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flag_exchange, "WAITING_DEVICES", frozenset())
        pair = Pair(rank, world_size)
        add_group(pair, (77,), requires_grad=False)
        pair.train(0, 1)
        pair.params[5].requires_grad_(rank == 1)
        weights = [p.detach().clone() for p in pair.params]

        def train() -> None:
            make_interval(pair, 2, [FULL])
            pair.sharded.step()

        with pytest.raises(RuntimeError, match="unfrozen, or have a gradient though"):
            train()
        assert_unmoved(pair.params, weights)


@spawn_only
@pytest.mark.parametrize("body", [body_unfrozen_unlike, body_unfrozen_unlike_unwaited, body_unfrozen_and_zeroed])
def test_unfrozen_on_some_ranks(body: Callable[[int, int], None], tmp_path: Path) -> None:
    run_ranks(body, 3, tmp_path, timeout=SHORT, on_cpu=True)


class Elsewhere(nn.Parameter):
    """A parameter may be on a GPU other than the rank's."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cpu", 0)


def body_device_index(rank: int, world_size: int) -> None:
    """Frozen on the trainable ones' device on the first rank alone, as where all ranks share cuda:0 for it."""
    pair = Pair(rank, world_size)
    frozen = nn.Parameter(torch.ones(50), requires_grad=False)
    if rank != 0:
        frozen = torch.Tensor._make_subclass(Elsewhere, torch.ones(50), False)
    with pytest.raises(ValueError, match="another device than the trainable"):
        ShardedLion([nn.Parameter(torch.ones(30)), frozen])
    with pytest.raises(ValueError, match="another device than the trainable"):
        pair.sharded.add_param_group({"params": [nn.Parameter(torch.ones(30)), frozen]})
    pair.train(0)


def test_frozen_on_another_device_on_some_ranks(tmp_path: Path) -> None:
    run_ranks(body_device_index, 2, tmp_path, timeout=SHORT, on_cpu=True)
