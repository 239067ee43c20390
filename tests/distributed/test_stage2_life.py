"""Stage 2 in the life of a training run: clipping, what it refuses, parameters and groups that change in mid-run,
other optimizers, and ranks that fail. Against Lion on the averaged gradient, or stage 1: the same bits.

What becomes of gradients on their way is test_stage2.py's.
"""

from __future__ import annotations

import gc
import os
import time
import weakref
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d
from torch.nn.parallel import DistributedDataParallel

from lion_dist import Lion, ShardedLion
from lion_dist.sharding import collectives
from lion_dist.update import reference
from tests.bits import assert_same_bits
from tests.distributed.test_sharded_lion import FP32, MIXED, assert_same_model, assert_same_momentum
from tests.distributed.test_stage2 import FEW, TINY, Pass, Step, averages, backward, some, subsets
from tests.distributed.toy import SHAPES, Toy, coefficient
from tests.harness import device_of, run_ranks, spawn_only

# Heads and tails, tails alone, and a small witness.
SIZES: tuple[tuple[int, ...], ...] = ((40, 33), (300,), (24, 48), (129,), (3,))
LR = 0.25
SHORT = timedelta(seconds=6)


def gradient(i: int, p: Tensor, step: int, rank: int, world_size: int) -> Tensor:
    """One rank's gradient of parameter i: exact, as the toy's are."""
    return coefficient(f"parameter{i}", p, step, rank, world_size)


def average(i: int, p: Tensor, step: int, world_size: int) -> Tensor:
    return torch.stack([gradient(i, p, step, r, world_size) for r in range(world_size)]).sum(0) / world_size


class Pair:
    """Parameters under ShardedLion, stage 2, and their copies under Lion, which is given the averages.

    ``rank`` and ``world_size`` are of the optimizer's group; ``dtype`` is that of new pairs' parameters.
    """

    dtype = torch.float32

    def __init__(
        self,
        rank: int,
        world_size: int,
        device: torch.device | None = None,
        *,
        sizes: Sequence[tuple[int, ...]] = SIZES,
        **kwargs: Any,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.device = device or device_of(rank, world_size)
        generator = torch.Generator().manual_seed(3)
        values = [torch.randn(shape, generator=generator).to(self.device, self.dtype) for shape in sizes]
        self.params = [nn.Parameter(v.clone()) for v in values]
        self.copies = [nn.Parameter(v.clone()) for v in values]
        self.sharded = ShardedLion(self.params, lr=LR, weight_decay=0.1, **{"bucket_mb": TINY, **kwargs})
        self.lion = Lion(self.copies, lr=LR, weight_decay=0.1)

    def add(self, shape: tuple[int, ...], requires_grad: bool = True) -> None:
        """One more parameter, still in no group."""
        for params in (self.params, self.copies):
            value = torch.ones(shape, device=self.device, dtype=self.dtype)
            params.append(nn.Parameter(value, requires_grad=requires_grad))

    def loss(self, step: int, of: Sequence[int] | None = None) -> Tensor:
        chosen = [i for i, p in enumerate(self.params) if p.requires_grad] if of is None else of
        terms = [(self.params[i] * gradient(i, self.params[i], step, self.rank, self.world_size)).sum() for i in chosen]
        return torch.stack(terms).sum()

    def backward(self, step: int, of: Sequence[int] | None = None) -> None:
        """All ranks use the same parameters."""
        self.loss(step, of).backward()

    def expect(self, step: int, of: Sequence[int] | None = None) -> None:
        """The average of that backward, added to the copies' gradients."""
        for i, p in enumerate(self.copies):
            if (p.requires_grad or i in (of or ())) if of is None else i in of:
                g = average(i, p, step, self.world_size)
                p.grad = g if p.grad is None else p.grad + g

    def backward_and_step(self, step: int) -> None:
        self.backward(step)
        self.sharded.step()

    def step(self, what: str) -> None:
        self.sharded.step()
        self.lion.step()
        self.check(what)
        self.sharded.zero_grad()
        self.lion.zero_grad()

    def train(self, *steps: int) -> None:
        for step in steps:
            self.backward(step)
            self.expect(step)
            self.step(f"step {step}")

    def check(self, what: str) -> None:
        for i, (p, copy) in enumerate(zip(self.params, self.copies, strict=True)):
            assert_same_bits(p, copy, f"{what}, parameter {i}")

    def finish(self) -> None:
        """Momenta too."""
        assert_same_momentum(self.sharded.full_state_dict(), self.lion)


# Clipping ---------------------------------------------------------------------------------------------------


def body_clip(rank: int, world_size: int, dtypes: tuple[torch.dtype, ...], bucket_mb: float) -> None:
    """Ranks use different parameters: those that none uses are left out of the norm and of the step."""
    device = device_of(rank, world_size)
    models = [Toy(100, dtypes, device) for _ in range(2)]
    two = ShardedLion(models[0].groups(), lr=0.01, bucket_mb=bucket_mb)
    one = ShardedLion(models[1].groups(), lr=0.01, stage=1)
    inactive = 0
    for step in range(8):
        backward(models[0], Pass(subsets(step, rank).passes[0].uses), "pass0", step, rank, world_size)
        expected = averages(models[1], subsets, step, world_size)
        inactive += len(SHAPES) - 1 - len(expected)
        for name in SHAPES:
            getattr(models[1], name).grad = expected.get(name)
        total = torch.stack([reference.sum_of_squares(g) for g in expected.values()]).sum()
        max_norm = float(total.sqrt()) / (2 if step % 2 else 0.5)
        norms = [optimizer.clip_grad_norm_(max_norm) for optimizer in (two, one)]
        assert_same_bits(norms[0], norms[1], "norm")
        assert_same_bits(norms[0], reference.clip_coefficient(total, max_norm)[0], "norm, from the gradients")
        if step % 3 == 0:  # a second time: the norm is that of the clipped gradient
            again = [optimizer.clip_grad_norm_(max_norm / 4) for optimizer in (two, one)]
            assert_same_bits(again[0], again[1], "second norm")
        for optimizer in (two, one):
            optimizer.step()
            optimizer.zero_grad()
        assert_same_model(models[0], models[1])
    assert inactive or world_size > 2  # some are left out indeed
    got, want = two.full_state_dict()["state"], one.full_state_dict()["state"]
    assert got.keys() == want.keys()
    for i in got:
        assert_same_bits(got[i]["exp_avg"], want[i]["exp_avg"], f"exp_avg {i}")


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("dtypes", "bucket_mb"), [(FP32, TINY), (MIXED, FEW)], ids=["fp32", "mixed"])
def test_clipping_as_stage_1(world_size: int, dtypes: tuple, bucket_mb: float, tmp_path: Path) -> None:
    run_ranks(body_clip, world_size, tmp_path, (dtypes, bucket_mb))


def body_clip_then(rank: int, world_size: int) -> None:
    """Clipping belongs to the gradients that it was computed from."""
    pair = Pair(rank, world_size)
    pair.train(0)
    before = [p.detach().clone() for p in pair.params]

    def refused() -> None:
        with pytest.raises(ValueError, match="changed since clip_grad_norm_"):
            pair.sharded.step()
        for p, b in zip(pair.params, before, strict=True):
            assert_same_bits(p, b, "refused")
        pair.sharded.zero_grad()

    pair.backward(1)
    pair.sharded.clip_grad_norm_(0.01)
    pair.backward(2)  # another backward
    refused()
    pair.backward(3)
    pair.sharded.clip_grad_norm_(0.01)
    with pair.sharded.no_sync():  # one that leaves its gradients where they are
        pair.backward(4)
    refused()
    pair.backward(5)
    pair.sharded.clip_grad_norm_(0.01)
    pair.params[1].grad = torch.ones_like(pair.params[1])  # a gradient by hand
    refused()
    pair.backward(6)
    pair.sharded.clip_grad_norm_(0.01)
    for p in pair.params:  # zeroed without the optimizer
        p.grad = None
    pair.backward(7)
    refused()

    # zero_grad() drops the clipping too: what follows is not clipped. (Lion's first momentum must not be clipped.)
    pair.backward(8)
    pair.sharded.clip_grad_norm_(1e-3)
    pair.sharded.zero_grad()
    pair.train(9)
    # Clipping of both backwards together, after clipping of the first.
    pair.backward(10)
    pair.sharded.clip_grad_norm_(0.01)
    pair.backward(11)
    norm = pair.sharded.clip_grad_norm_(2.0)
    pair.expect(10)
    pair.expect(11)
    grads = [p.grad for p in pair.copies if p.grad is not None]
    total = torch.stack([reference.sum_of_squares(g) for g in grads]).sum()
    expected, scale = reference.clip_coefficient(total, 2.0)
    assert_same_bits(norm, expected, "norm of both")
    for g in grads:
        g.mul_(scale)
    pair.step("both backwards clipped")
    pair.finish()


def test_clipping_does_not_outlive_its_gradients(tmp_path: Path) -> None:
    run_ranks(body_clip_then, 3, tmp_path)


def body_clip_then_more(rank: int, world_size: int) -> None:
    """A norm without the parameters that have come since is not one to clip them by."""
    for kwargs in ({"stage": 2}, {"stage": 1}, {"stage": 1, "param_sync": "params"}):
        pair = Pair(rank, world_size, **kwargs)
        for _ in range(4):
            pair.add((50,), requires_grad=False)
        for optimizer, params in ((pair.sharded, pair.params), (pair.lion, pair.copies)):
            optimizer.add_param_group({"params": params[-4:]})

        def gradients(step: int, pair: Pair = pair, by_hand: bool = kwargs["stage"] == 1) -> None:
            pair.expect(step)
            if by_hand:
                for p, copy in zip(pair.params, pair.copies, strict=True):
                    p.grad = None if copy.grad is None else copy.grad.clone()
            else:
                pair.backward(step)

        gradients(0)
        pair.step("first")
        for number, change in enumerate(("add", "unfreeze")):
            before = [p.detach().clone() for p in pair.params]
            gradients(1)
            pair.sharded.clip_grad_norm_(0.01)
            if change == "add":
                pair.add((500,))
                for optimizer, params in ((pair.sharded, pair.params), (pair.lion, pair.copies)):
                    optimizer.add_param_group({"params": params[-1:]})
            else:
                for params in (pair.params, pair.copies):
                    for p in params:
                        p.requires_grad_(True)
            with pytest.raises(ValueError, match="changed since clip_grad_norm_"):
                pair.sharded.step()
            for p, b in zip(pair.params, before, strict=False):
                assert_same_bits(p, b, f"refused after {change}")
            for optimizer in (pair.sharded, pair.lion):
                optimizer.zero_grad()
            gradients(2 + number)
            pair.step(f"after {change}")
        pair.finish()


def test_clipping_without_parameters_that_came_later(tmp_path: Path) -> None:
    run_ranks(body_clip_then_more, 2, tmp_path)


def body_clip_grid(rank: int, world_size: int) -> list[float]:
    """Ranks 0 and 1, and 2 and 3, hold replicas; 0 and 2, and 1 and 3, different parts of one model."""
    device = device_of(rank, world_size)
    replicas = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][rank // 2]
    parts = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])][rank % 2]
    shapes = [[(20, 33), (300,), (7,)], [(1000,), (5, 5)]]

    def made(part: int) -> list[nn.Parameter]:
        return [nn.Parameter(torch.full(shape, 1.0 + part, device=device)) for shape in shapes[part]]

    weights, copies = made(rank // 2), [made(0), made(1)]
    optimizer = ShardedLion(weights, lr=LR, process_group=replicas, bucket_mb=TINY)
    lions = [Lion(part, lr=LR) for part in copies]
    norms = []
    for step in range(4):
        terms = [(p * gradient(10 * (rank // 2) + i, p, step, rank % 2, 2)).sum() for i, p in enumerate(weights)]
        torch.stack(terms).sum().backward()
        for part, params in enumerate(copies):
            for i, p in enumerate(params):
                p.grad = average(10 * part + i, p, step, 2)
        grads = [p.grad for params in copies for p in params if p.grad is not None]
        total = torch.stack([reference.sum_of_squares(g) for g in grads]).sum()
        expected, scale = reference.clip_coefficient(total, 5.0)
        assert expected.item() > 5.0
        assert_same_bits(optimizer.clip_grad_norm_(5.0, process_groups=[parts]), expected, "norm")
        norms.append(expected.item())
        for g in grads:
            g.mul_(scale)
        for o in (optimizer, *lions):
            o.step()
            o.zero_grad()
        for p, copy in zip(weights, copies[rank // 2], strict=True):
            assert_same_bits(p, copy, f"step {step}")
    return norms


def test_clipping_over_a_grid_of_ranks(tmp_path: Path) -> None:
    results = run_ranks(body_clip_grid, 4, tmp_path)
    assert all(norms == results[0] for norms in results)


# What is refused ----------------------------------------------------------------------------------------------


def body_grad_scaler(rank: int, world_size: int) -> None:
    for unscale in (False, True):
        pair = Pair(rank, world_size)
        scaler = torch.amp.GradScaler(pair.device.type, init_scale=4.0)
        scaler.scale(pair.loss(0)).backward()
        if unscale:
            scaler.unscale_(pair.sharded)
        with pytest.raises(RuntimeError, match="GradScaler"):
            scaler.step(pair.sharded)
        pair.check("refused")
        pair.sharded.zero_grad()
        pair.train(1)  # without it
    # One that is switched off does nothing, as in scripts that serve bfloat16 too.
    pair = Pair(rank, world_size)
    scaler = torch.amp.GradScaler(pair.device.type, enabled=False)
    for step in range(3):
        scaler.scale(pair.loss(step)).backward()
        scaler.unscale_(pair.sharded)
        pair.expect(step)
        scaler.step(pair.sharded)
        scaler.update()
        pair.lion.step()
        pair.check(f"step {step}")
        pair.sharded.zero_grad()
        pair.lion.zero_grad()


def test_grad_scaler_is_refused(tmp_path: Path) -> None:
    run_ranks(body_grad_scaler, 2, tmp_path)


def clip_norm(params: list[nn.Parameter]) -> None:
    torch.nn.utils.clip_grad_norm_(params, 1.0)


def clip_value(params: list[nn.Parameter]) -> None:
    torch.nn.utils.clip_grad_value_(params, 1.0)


def body_torch_clipping(rank: int, world_size: int) -> None:
    """It would have scaled nothing and returned 0: an error instead, and zero_grad() makes all well."""
    pair = Pair(rank, world_size)
    pair.train(0)
    for clip in (clip_norm, clip_value):
        for call in (
            pair.sharded.step,
            lambda: pair.sharded.clip_grad_norm_(1.0),
            lambda: pair.backward(2),  # in which the witness's own gradient comes first
            lambda: pair.backward(2, [0, 1, 2, 3]),
        ):
            pair.backward(1)
            clip(pair.params)
            with pytest.raises(RuntimeError, match=r"ShardedLion's own clip_grad_norm_"):
                call()
            pair.check("refused")
            pair.sharded.zero_grad()
            assert all(p.grad is None for p in pair.params)
            pair.train(3)
    pair.finish()


def test_clipping_of_torch_is_refused(tmp_path: Path) -> None:
    run_ranks(body_torch_clipping, 2, tmp_path)


class Linear(nn.Module):
    """A model that DDP can wrap: its loss is linear in all parameters of a pair."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.params = nn.ParameterList(pair.params)
        self.pair = pair

    def forward(self, step: int) -> Tensor:
        return self.pair.loss(step)


def body_ddp(rank: int, world_size: int) -> None:
    """Averaged twice, or by whichever hook comes first: refused before a weight moves."""
    for as_bucket_view in (False, True):
        for bucket_mb in (TINY, 64.0):
            for wrapped_first in (False, True):
                pair = Pair(rank, world_size, bucket_mb=bucket_mb)
                model = Linear(pair)
                if wrapped_first:
                    del pair.sharded
                ids = [pair.device.index] if pair.device.type == "cuda" else None
                ddp = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=as_bucket_view)
                if wrapped_first:
                    pair.sharded = ShardedLion(model.parameters(), lr=LR, weight_decay=0.1, bucket_mb=bucket_mb)

                def train(ddp: nn.Module = ddp, pair: Pair = pair) -> None:
                    ddp(0).backward()
                    pair.sharded.step()

                # DDP itself is the first to raise where it misses its view, taken away in the backward.
                word = r"DistributedDataParallel.*stage=1"
                if as_bucket_view and bucket_mb != TINY:
                    word += "|DDP bucket view"
                with pytest.raises(RuntimeError, match=word):
                    train()
                pair.check("refused")


def test_ddp_is_refused(tmp_path: Path) -> None:
    run_ranks(body_ddp, 2, tmp_path)


def body_sparse(rank: int, world_size: int, bucket_mb: float) -> None:
    device = device_of(rank, world_size)
    table, weight = nn.Embedding(50, 7, sparse=True, device=device), nn.Parameter(torch.ones(300, device=device))
    optimizer = ShardedLion([table.weight, weight], lr=LR, bucket_mb=bucket_mb)
    before = [p.detach().clone() for p in (table.weight, weight)]

    def train() -> None:
        (table(torch.tensor([1, 3], device=device)).sum() + weight.sum()).backward()
        optimizer.step()

    with pytest.raises(TypeError, match=r"\(50, 7\).*[Ss]parse"):
        train()
    for p, b in zip((table.weight, weight), before, strict=True):
        assert_same_bits(p, b, "not stepped")


@spawn_only
@pytest.mark.parametrize("bucket_mb", [TINY, 64.0], ids=["tiny", "one"])
def test_sparse_gradient_is_refused(bucket_mb: float, tmp_path: Path) -> None:
    run_ranks(body_sparse, 2, tmp_path, (bucket_mb,))


# Changes in mid-run -------------------------------------------------------------------------------------------


def body_groups_grow(rank: int, world_size: int) -> None:
    """Between two steps, and between backward and step, where the new parameter may have a gradient already."""
    for bucket_mb in (TINY, 64.0):
        pair = Pair(rank, world_size, bucket_mb=bucket_mb)
        pair.train(0, 1)
        pair.add((500,))
        for optimizer, params in ((pair.sharded, pair.params), (pair.lion, pair.copies)):
            optimizer.add_param_group({"params": [params[-1]], "lr": 0.125})
        pair.train(2, 3)
        # Used in a backward before it is given to the optimizer, and the smallest, so the next witness.
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
    freeze(4)  # the witness itself
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
    """Loading puts parameters together that were given apart: gradients of before are dropped, and said to be."""
    pair = Pair(rank, world_size)
    pair.add((500,))
    for optimizer, params in ((pair.sharded, pair.params), (pair.lion, pair.copies)):
        optimizer.add_param_group({"params": [params[-1]]})
    pair.train(0, 1)
    saved = pair.sharded.full_state_dict()
    pair.backward(2)
    with pytest.warns(UserWarning, match=r"gradients reduced before load_state_dict\(\) were dropped"):
        pair.sharded.load_state_dict(saved)
    pair.step("not stepped, nor decayed")
    pair.train(3)
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
    run_ranks(body_between, world_size, tmp_path, timeout=SHORT, deadline=60)


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
            assert [p.numel() for p in left] == [3]  # the witness, with zeros
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


def test_gradients_set_by_hand(tmp_path: Path) -> None:
    run_ranks(body_by_hand, 3, tmp_path)


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
        assert all(g.grad_fn is None and not g.requires_grad for g in optimizer._reducer.grads)  # type: ignore[union-attr]
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
    reducer = weakref.ref(pair.sharded._reducer)
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


# Ranks that fail ----------------------------------------------------------------------------------------------


class OwnError(Exception):
    pass


class Exit(Exception):
    pass


class Fails(torch.autograd.Function):
    """An identity whose backward raises, or ends the process."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, error: type[Exception]) -> Tensor:
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        if ctx.error is Exit:
            # The others do not wait for its outcome, as the harness would have them.
            c10d._get_default_store().set(f"finished/{dist.get_rank()}", "")
            os._exit(3)
        raise ctx.error("of this rank's own")


def fail_in_backward(pair: Pair, step: int, error: type[Exception]) -> None:
    """After the hooks of some parameters and before those of others: autograd takes the last made node first."""
    early = pair.loss(step, [0, 1])
    loss = Fails.apply(early, error) + pair.loss(step, [2, 3, 4])
    loss.backward()


def assert_unmoved(pair: Pair, weights: list[Tensor]) -> None:
    for p, w in zip(pair.params, weights, strict=True):
        assert_same_bits(p, w, "not stepped")


def body_one_raises(rank: int, world_size: int, bucket_mb: float) -> float:
    pair = Pair(rank, world_size, bucket_mb=bucket_mb)
    pair.train(0, 1)
    weights = [p.detach().clone() for p in pair.params]
    start = time.monotonic()
    if rank == 1:
        with pytest.raises(OwnError, match="of this rank's own"):
            fail_in_backward(pair, 2, OwnError)
        pair.sharded.zero_grad()  # as scripts do that catch an exception; it heals nothing
        for call in (pair.sharded.step, lambda: pair.backward(3)):
            with pytest.raises(RuntimeError, match="can go on no more: a backward raised"):
                call()
    else:
        with pytest.raises(RuntimeError, match="rank 1 of the group: a backward raised"):
            pair.backward_and_step(2)
    assert_unmoved(pair, weights)
    return time.monotonic() - start


@spawn_only
@pytest.mark.parametrize("bucket_mb", [TINY, 64.0], ids=["tiny", "one"])
def test_one_rank_raises_in_its_backward(bucket_mb: float, tmp_path: Path) -> None:
    seconds = run_ranks(body_one_raises, 3, tmp_path, (bucket_mb,), timeout=SHORT, deadline=40)
    assert max(seconds) < SHORT.total_seconds() + 2


def body_one_raises_at_the_end(rank: int, world_size: int) -> float:
    """In autograd's last callback, where what no gradient has come of is launched: here a gradient that cannot be."""
    device = device_of(rank, world_size)
    values = torch.ones(300), torch.ones(40), torch.ones(50, 8)
    weight, _, table = params = [nn.Parameter(v.to(device)) for v in values]
    optimizer = ShardedLion(params, lr=LR)  # one bucket
    rows = torch.arange(5, device=device)
    start = time.monotonic()

    def train() -> None:
        (nn.functional.embedding(rows, table, sparse=rank == 1).sum() + weight.sum()).backward()
        optimizer.step()

    if rank == 1:
        with pytest.raises(TypeError, match=r"parameter 2 .*[Ss]parse"):
            train()
    else:
        with pytest.raises(RuntimeError, match="rank 1 of the group: a backward raised"):
            train()
    with pytest.raises(RuntimeError, match="can go on no more"):
        optimizer.step()
    for p in params:
        assert bool((p == 1).all())
    return time.monotonic() - start


@spawn_only
def test_one_rank_raises_at_the_end_of_its_backward(tmp_path: Path) -> None:
    seconds = run_ranks(body_one_raises_at_the_end, 2, tmp_path, timeout=SHORT, deadline=40)
    assert max(seconds) < SHORT.total_seconds() + 2


def body_one_dies(rank: int, world_size: int) -> None:
    pair = Pair(rank, world_size)
    pair.train(0, 1)
    weights = [p.detach().clone() for p in pair.params]
    start = time.monotonic()
    if rank == 1:
        fail_in_backward(pair, 2, Exit)
    with pytest.raises(RuntimeError, match="one may have ended"):
        pair.backward_and_step(2)
    assert_unmoved(pair, weights)
    assert time.monotonic() - start < SHORT.total_seconds() + 2


@spawn_only
def test_one_rank_dies_in_its_backward(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception) as failed:
        run_ranks(body_one_dies, 3, tmp_path, timeout=SHORT, deadline=40)
    text = str(failed.value)
    assert "rank 1 ended with exit code 3" in text
    assert text.count("---") == 1, text  # the others have seen what they expect


def body_unsynced_raises(rank: int, world_size: int) -> None:
    """Nothing was being reduced, so nothing is lost but the gradients."""
    pair = Pair(rank, world_size)
    pair.train(0)
    if rank == 1:
        with pytest.raises(OwnError), pair.sharded.no_sync():
            fail_in_backward(pair, 1, OwnError)
    pair.sharded.zero_grad()
    pair.train(2)
    # Nor if the others keep theirs: this rank tries again.
    with pair.sharded.no_sync():
        if rank == 1:
            with pytest.raises(OwnError):
                fail_in_backward(pair, 3, OwnError)
            for p in pair.params:
                p.grad = None
        pair.backward(3)
    pair.expect(3)
    pair.backward(4)
    pair.expect(4)
    pair.step("tried again")
    pair.finish()


def test_exception_under_no_sync_is_survived(tmp_path: Path) -> None:
    run_ranks(body_unsynced_raises, 3, tmp_path)


def body_all_raise(rank: int, world_size: int) -> None:
    pair = Pair(rank, world_size)
    pair.train(0)
    weights = [p.detach().clone() for p in pair.params]
    # A rank that is behind may be told by the others before its own exception comes.
    with pytest.raises((OwnError, RuntimeError), match=r"of this rank's own|a backward raised"):
        fail_in_backward(pair, 1, OwnError)
    for call in (pair.sharded.step, lambda: pair.sharded.clip_grad_norm_(1.0), lambda: pair.backward(2)):
        with pytest.raises(RuntimeError, match="can go on no more: a backward raised"):
            call()
    assert_unmoved(pair, weights)


@spawn_only
def test_all_ranks_raise_in_their_backward(tmp_path: Path) -> None:
    run_ranks(body_all_raise, 3, tmp_path, timeout=SHORT, deadline=40)
