"""Stage 2: clipping of its own, and what clips, scales or averages without knowing of it and is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lion_dist import Lion, ShardedLion
from lion_dist.update import reference
from tests.asserts import assert_same_bits, assert_same_model
from tests.harness import device_of, run_ranks, spawn_only
from tests.scenarios.pair import LR, Pair, average, gradient, other_ranks_and_dtypes, run_bodies
from tests.scenarios.passes import FEW, TINY, Pass, averages, backward, subsets
from tests.scenarios.toy import FP32, MIXED, SHAPES, Toy


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


def body_grad_scaler(rank: int, world_size: int) -> None:
    for unscale in (False, True):
        for backwards in (1, 2):  # the second one's gradients are in p.grad, those of the first are not
            pair = Pair(rank, world_size)
            scaler = torch.amp.GradScaler(pair.device.type, init_scale=4.0)
            for _ in range(backwards):
                scaler.scale(pair.loss(0)).backward()
            if unscale:
                with pytest.raises(RuntimeError, match=r"GradScaler\.unscale_\(\) .* stage=2"):
                    scaler.unscale_(pair.sharded)
            with pytest.raises(RuntimeError, match="GradScaler"):
                scaler.step(pair.sharded)
            pair.check("refused")
            pair.sharded.zero_grad()
            pair.train(1)  # without it
            pair.finish()
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
            lambda: pair.backward(2),  # in which the sentinel's own gradient comes first
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
                if as_bucket_view:
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


@other_ranks_and_dtypes
def test_on_other_ranks_and_in_bfloat16(world_size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    bodies: list[Callable[[int, int], object]] = [body_clip_then_more]
    if dtype == torch.float32:  # the fused step does not round a scaled gradient to 16 bits, as the copies do
        bodies.append(body_clip_then)
    run_ranks(run_bodies, world_size, tmp_path, (bodies, dtype))
