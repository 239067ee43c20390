"""Corners of stage 2 that once went wrong, each without a word or with the wrong one. Against Lion on the averaged
gradient: the same bits.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.utils.checkpoint import checkpoint

from lion_dist import Lion, ShardedLion
from lion_dist.sharding import grad_reducer
from lion_dist.sharding.collectives import reduce_scatter_mean
from lion_dist.update import reference
from tests.bits import assert_same_bits
from tests.distributed.pair import LR, SHORT, SIZES, Fails, OwnError, Pair, assert_unmoved, gradient
from tests.distributed.test_stage2 import TINY, some
from tests.harness import device_of, run_ranks, spawn_only

# Orders of a backward's gradients: autograd takes the term made last first. Parameter 4 is the smallest, the sentinel.
WITNESS_LAST, WITNESS_FIRST = [4, 0, 1, 2, 3], [0, 1, 2, 3, 4]
ALL = list(range(len(SIZES)))


def model_of(pair: Pair) -> nn.Module:
    """What has a zero_grad() of its own."""
    return nn.ParameterList(pair.params)


def left(pair: Pair) -> list[int]:
    """The parameters that have a gradient in p.grad."""
    return [i for i, p in enumerate(pair.params) if p.grad is not None]


def add_group(pair: Pair, shape: tuple[int, ...], requires_grad: bool = True) -> None:
    """One more parameter, in a group of its own."""
    pair.add(shape, requires_grad)
    for optimizer, params in ((pair.sharded, pair.params), (pair.lion, pair.copies)):
        optimizer.add_param_group({"params": [params[-1]]})


def backward_expect(pair: Pair, step: int, of: Sequence[int] | None = None) -> None:
    pair.backward(step, of)
    pair.expect(step, of)


def expect_uses(pair: Pair, step: int, uses: Sequence[Sequence[int]]) -> None:
    """Adds to the copies' gradients the averages of a backward in which rank r uses the parameters ``uses[r]``."""
    for i, p in enumerate(pair.copies):
        terms = [gradient(i, p, step, r, pair.world_size) * use.count(i) for r, use in enumerate(uses) if i in use]
        if terms:
            g = torch.stack(terms).sum(0) / pair.world_size
            p.grad = g if p.grad is None else p.grad + g


def subsets(step: int, world_size: int) -> list[list[int]]:
    """Part of the parameters for every rank, in an order of its own."""
    names = [str(i) for i in ALL]
    return [[int(name) for name in some(step, rank, of=names)] for rank in range(world_size)]


# Zeroing without the optimizer --------------------------------------------------------------------------------


def body_zeroed_in_place(rank: int, world_size: int) -> None:
    """It does not reach what has been reduced, which later backwards would have been added to."""
    for bucket_mb in (TINY, 64.0):
        pair = Pair(rank, world_size, bucket_mb=bucket_mb)
        pair.train(0)
        calls: tuple[Callable[[], object], ...] = (
            lambda pair=pair: pair.backward(2, WITNESS_FIRST),
            lambda pair=pair: pair.backward(2, WITNESS_LAST),
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
    for step, of in enumerate(([0, 2], WITNESS_LAST, WITNESS_FIRST, [], [4])):
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


# Ranks that differ --------------------------------------------------------------------------------------------


def body_own_collectives(rank: int, world_size: int) -> None:
    """A reduce-scatter as long as a bucket's would take that one's place on another rank, without an error."""
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
            reduce_scatter_mean([mean], [given], dist.group.WORLD).wait()
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


@pytest.mark.parametrize("body", [body_own_collectives, body_dead_first, body_reentrant, body_unfrozen_on_some])
def test_ranks_that_differ(body: Callable[[int, int], None], tmp_path: Path) -> None:
    run_ranks(body, 3, tmp_path, timeout=SHORT)


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
    assert_unmoved(pair, weights)
    pair.sharded.zero_grad()
    pair.train(6)
    pair.finish()


def test_zeroed_by_model(tmp_path: Path) -> None:
    run_ranks(body_zeroed_by_model, 2, tmp_path, timeout=SHORT)


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
    run_ranks(body_reentrant_logging, 2, tmp_path, timeout=SHORT)


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
        patch.setattr(grad_reducer, "WAITING_DEVICES", frozenset())  # as on GPUs
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
        assert_unmoved(pair, weights)


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
            with pytest.raises(RuntimeError, match="can go on no more: a backward raised"):
                call()
    else:
        with pytest.raises(RuntimeError, match="rank 1 of the group: a backward raised"):
            train()
    assert_unmoved(pair, weights)


@spawn_only
@pytest.mark.parametrize("where", ["inner pass", "recomputation", "recomputation, after the outer pass"])
def test_exception_with_reentrant_checkpoints(where: str, tmp_path: Path) -> None:
    run_ranks(body_reentrant_raises, 2, tmp_path, (where,), timeout=SHORT, on_cpu=True)


# Parameters that come, go and change --------------------------------------------------------------------------


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


# What is refused ----------------------------------------------------------------------------------------------


def body_bucket_mb(rank: int, world_size: int) -> None:
    params = [nn.Parameter(torch.ones(3, device=device_of(rank, world_size)))]
    for bad in (float("inf"), float("nan"), 0, -1):
        with pytest.raises(ValueError, match="bucket_mb must be > 0 and finite"):
            ShardedLion(params, bucket_mb=bad)
    ShardedLion(params, bucket_mb=1e-9)


def test_bucket_mb_is_checked_on_every_rank(tmp_path: Path) -> None:
    run_ranks(body_bucket_mb, 2, tmp_path)


def linear_backward(params: list[nn.Parameter], gradients: list[Tensor]) -> None:
    torch.stack([(p * g).sum() for p, g in zip(params, gradients, strict=True)]).sum().backward()


def body_compiled_training(rank: int, world_size: int) -> None:
    """Hooks called from within a compiled function are not to be compiled. (The eager backend compiles nothing.)"""
    backward = torch.compile(linear_backward, backend="eager")
    pair = Pair(rank, world_size)
    for step in range(3):
        backward(pair.params, [gradient(i, p, step, rank, world_size) for i, p in enumerate(pair.params)])
        pair.expect(step)
        pair.step(f"step {step}")
    pair.finish()


def body_compiled_autograd(rank: int, world_size: int) -> None:
    """Hooks would be traced, and what they did in the first backward compiled into the others."""
    for enable in (
        lambda: compiled_autograd._enable(torch.compile(backend="eager")),
        lambda: torch._dynamo.config.patch(compiled_autograd=True),
    ):
        pair = Pair(rank, world_size)
        gradients = [gradient(i, p, 0, rank, world_size) for i, p in enumerate(pair.params)]
        weights = [p.detach().clone() for p in pair.params]
        with enable():
            backward = torch.compile(linear_backward, backend="eager")
            with pytest.raises(RuntimeError, match=r"compiled autograd.*stage=1"):
                backward(pair.params, gradients)
        assert_unmoved(pair, weights)


def test_function_that_is_compiled_with_its_backward(tmp_path: Path) -> None:
    run_ranks(body_compiled_training, 2, tmp_path)


def test_compiled_autograd_is_refused(tmp_path: Path) -> None:
    run_ranks(body_compiled_autograd, 1, tmp_path)
