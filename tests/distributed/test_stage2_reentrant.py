"""Stage 2 with reentrant checkpoints, whose gradients arrive in passes of their own. Against Lion on the averaged
gradient: the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lion_dist.sharding import flag_exchange
from tests.asserts import assert_unmoved
from tests.harness import run_ranks, spawn_only
from tests.scenarios.pair import ALL, SHORT, Fails, OwnError, Pair, expect_uses


def reentrant_backward(pair: Pair, step: int, uses: Sequence[int]) -> None:
    """Every use in a checkpoint of its own: a parameter's gradient arrives once for each."""
    x = torch.zeros((), device=pair.device, requires_grad=True)
    losses = [checkpoint(lambda x, i=i: x + pair.loss(step, [i]), x, use_reentrant=True) for i in uses]
    torch.stack(losses).sum().backward()


def body_reentrant(rank: int, world_size: int) -> None:
    # The second rank's first parameter, in the bucket that is launched last, arrives once more after that.
    uses = [[0], [0, *ALL], [1, 0, 0]]
    for learned in (False, True):
        pair = Pair(rank, world_size)
        if learned:
            pair.train(0, 1)
        for step in range(2, 5):
            reentrant_backward(pair, step, uses[rank])
            expect_uses(pair, step, uses)
            pair.step(f"step {step}, order learned before: {learned}")
        pair.train(5)
        pair.finish()


def test_reentrant_checkpoints(tmp_path: Path) -> None:
    run_ranks(body_reentrant, 3, tmp_path)


def body_reentrant_logging(rank: int, world_size: int) -> None:
    """All gradients arrive in reentrant passes; the round is to be launched to its end in the backward even so."""
    pair = Pair(rank, world_size)
    pair.train(0)
    uses = [[0], ALL]  # the second launches all buckets as they are filled, the first fills the last one only
    for step in range(1, 4):
        reentrant_backward(pair, step, uses[rank])
        expect_uses(pair, step, uses)
        value = torch.ones((), device=pair.device)
        dist.all_reduce(value)
        assert value.item() == world_size
        pair.step(f"step {step}")
    pair.finish()


@spawn_only
def test_own_collectives_beside_reentrant_checkpoints(tmp_path: Path) -> None:
    run_ranks(body_reentrant_logging, 2, tmp_path)


def body_reentrant_alone(rank: int, world_size: int) -> None:
    """The first rank has no checkpoints, and the others have late gradients. It reads of them where the host waits
    for collectives anyway."""
    pair = Pair(rank, world_size)
    pair.train(0, 1)
    for step in (2, 3):
        uses = [[0], *[[0, *ALL]] * (world_size - 1)]
        if rank == 0:
            pair.backward(step, [0])
        else:
            reentrant_backward(pair, step, uses[rank])
        expect_uses(pair, step, uses)
        pair.step(f"step {step}")
    pair.finish()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flag_exchange, "WAITING_DEVICES", frozenset())  # as on GPUs
        reentrant_alone_unread(Pair(rank, world_size))


def reentrant_alone_unread(pair: Pair) -> None:
    rank = pair.rank
    pair.train(0, 1)
    weights = [p.detach().clone() for p in pair.params]
    if rank == 0:
        pair.backward(2, [0])
    else:
        reentrant_backward(pair, 2, [0, *ALL])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            pair.sharded.step()
    if rank:  # the first has stepped slices of its own before it heard
        assert_unmoved(pair.params, weights)


@spawn_only
def test_reentrant_checkpoints_on_some_ranks_only(tmp_path: Path) -> None:
    run_ranks(body_reentrant_alone, 3, tmp_path, timeout=SHORT, on_cpu=True)


def body_reentrant_raises(rank: int, world_size: int, where: str) -> None:
    """Gradients have been reduced before: of another checkpoint, of the pass around both, or of the same one."""
    pair = Pair(rank, world_size)
    pair.train(0)
    weights = [p.detach().clone() for p in pair.params]
    recomputing = False

    def segment(x: Tensor) -> Tensor:
        if recomputing and rank == 1:
            if where != "inner pass":
                raise OwnError("of this rank's own")
            x = Fails.apply(x, OwnError)
        return x + pair.loss(1, [0, 1])

    x = torch.zeros((), device=pair.device, requires_grad=True)
    x = checkpoint(segment, x, use_reentrant=True)
    loss = checkpoint(lambda x: x + pair.loss(1, [2, 3]), x, use_reentrant=True)
    if where == "recomputation, after the outer pass":
        loss = loss + pair.loss(1, [4])
    recomputing = True

    def train() -> None:
        loss.backward()
        pair.sharded.step()

    if rank == 1:
        with pytest.raises(OwnError, match="of this rank's own"):
            train()
        for call in (pair.sharded.step, partial(pair.backward, 2)):
            with pytest.raises(RuntimeError, match="can no longer be used: a backward raised"):
                call()
    else:
        with pytest.raises(RuntimeError, match="rank 1 of the group: a backward raised"):
            train()
    assert_unmoved(pair.params, weights)


@spawn_only
@pytest.mark.parametrize("where", ["inner pass", "recomputation", "recomputation, after the outer pass"])
def test_exception_with_reentrant_checkpoints(where: str, tmp_path: Path) -> None:
    run_ranks(body_reentrant_raises, 2, tmp_path, (where,), timeout=SHORT, on_cpu=True)
