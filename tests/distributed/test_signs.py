"""Parameters synchronised by signs: the same bits as by parameters and as Lion on one process, for a sixteenth of
the bytes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lion_dist import Lion, ShardedLion
from lion_dist.param_sync import GatherSigns
from lion_dist.sharding import collectives
from lion_dist.sharding.exchange import FOOTER
from tests.distributed.test_sharded_lion import FP32, MAX_NORM, MIXED, assert_same_model, assert_same_momentum, warm_up
from tests.distributed.test_stage2 import BF16, FEW, TRAINABLE, some
from tests.distributed.toy import SHAPES, Toy, coefficient, hash_of
from tests.harness import device_of, run_ranks

STEPS = 20
LR = 0.25

# -- The same bits


def hostile(name: str, p: Tensor, step: int, rank: int, world_size: int, rarity: int = 300) -> Tensor:
    """The toy's coefficients, and in other places each step, one in ``rarity`` for each: NaN on one rank, an infinity
    on one, infinities of both signs on two (whose sum is NaN), an exact zero as a sum; and in a ninth of all, exact
    zeros on every rank."""
    c = coefficient(name, p, step, rank, world_size).float()
    where = torch.randint(rarity, p.shape, generator=torch.Generator().manual_seed(hash_of(name) + 31 * step))
    where = where.to(p.device)
    one = step % world_size == rank  # whose turn it is
    next_ = (step + 1) % world_size == rank
    c = torch.where((where >= 6) & (where % 9 == 0), torch.zeros_like(c), c)
    for kind, mine, others in [
        (0, float("nan"), 1.0), (1, float("inf"), 1.0), (2, float("-inf"), -1.0), (3, -0.0, 0.0),
    ]:  # fmt: skip
        c = torch.where(where == kind, torch.full_like(c, mine if one else others), c)
    both = float("inf") if one else float("-inf") if next_ else 1.0
    cancels = world_size if one else -world_size if next_ else 0.0
    c = torch.where(where == 4, torch.full_like(c, both), c)
    return torch.where(where == 5, torch.full_like(c, cancels), c).to(p.dtype)


def used(step: int, rank: int) -> list[str]:
    return TRAINABLE if step % 4 == 0 else some(step, rank)


def hostile_backward(model: Toy, step: int, rank: int, world_size: int, rarity: int = 300) -> None:
    terms = [
        (p * hostile(name, p, step, rank, world_size, rarity)).float().sum()
        for name in used(step, rank)
        for p in [getattr(model, name)]
    ]
    torch.stack(terms).sum().backward()


def hostile_averages(model: Toy, step: int, world_size: int, rarity: int = 300) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    for rank in range(world_size):
        for name in used(step, rank):
            c = hostile(name, getattr(model, name), step, rank, world_size, rarity).float()
            sums[name] = sums[name] + c if name in sums else c
    return {name: (s / world_size).to(getattr(model, name).dtype) for name, s in sums.items()}


def body_equals(rank: int, world_size: int) -> None:
    for dtypes in (FP32, BF16, MIXED):
        equals(rank, world_size, dtypes)


def equals(rank: int, world_size: int, dtypes: tuple, steps: int = STEPS) -> None:
    """Ranks use other parameters, which in stage 1 is averaged already."""
    device = device_of(rank, world_size)
    expected = Toy(100, dtypes, device)
    lion = Lion(expected.groups(), lr=0.01)
    schedulers = [warm_up(lion)]
    rarity = 15 * steps  # a good part of the weights shall outlive them
    trained = []
    for stage in (1, 2):
        for sync in ("signs", "params"):
            model = Toy(100 + rank, dtypes, device)  # the first rank's must win
            optimizer = ShardedLion(model.groups(), lr=0.01, stage=stage, param_sync=sync, bucket_mb=FEW)
            schedulers.append(warm_up(optimizer))
            trained.append((f"stage {stage}, {sync}", stage, model, optimizer))
    for step in range(steps):
        averages = hostile_averages(expected, step, world_size, rarity)
        for name, g in averages.items():
            getattr(expected, name).grad = g
        lion.step()
        lion.zero_grad()
        for what, stage, model, optimizer in trained:
            if stage == 2:
                hostile_backward(model, step, rank, world_size, rarity)
            else:
                for name, g in averages.items():
                    getattr(model, name).grad = g
            optimizer.step()
            optimizer.zero_grad()
            try:
                assert_same_model(model, expected)
            except AssertionError as error:
                raise AssertionError(f"{what}, step {step}") from error
        for scheduler in schedulers:
            scheduler.step()
    for _, _, _, optimizer in trained:
        assert_same_momentum(optimizer.full_state_dict(), lion)
        optimizer.check_replicas()
    big = expected.embedding.detach()
    assert 0 < big.isnan().float().mean() < 0.5  # something of everything has come
    assert not any(entry["exp_avg"].isinf().any() for entry in lion.state.values())


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_signs_equal_params_and_lion(world_size: int, tmp_path: Path) -> None:
    run_ranks(body_equals, world_size, tmp_path)


def body_through_triton(rank: int, world_size: int) -> None:
    """The kernels, in the interpreter or on the GPU, from backward to weight."""
    device = device_of(rank, world_size)
    model, expected = (Toy(100, FP32, device) for _ in range(2))
    optimizer = ShardedLion(model.groups(), lr=0.01, param_sync="signs", use_triton=True)
    lion = Lion(expected.groups(), lr=0.01)
    for step in range(2):
        hostile_backward(model, step, rank, world_size)
        for name, g in hostile_averages(expected, step, world_size).items():
            getattr(expected, name).grad = g
        for o in (optimizer, lion):
            o.step()
            o.zero_grad()
        assert_same_model(model, expected)
    assert_same_momentum(optimizer.full_state_dict(), lion)


def test_through_triton(tmp_path: Path) -> None:
    run_ranks(body_through_triton, 2, tmp_path, share_gpus=True)


def body_clipped(rank: int, world_size: int) -> None:
    device = device_of(rank, world_size)
    models = [Toy(100, MIXED, device) for _ in range(4)]
    optimizers = [
        ShardedLion(model.groups(), lr=0.01, stage=stage, param_sync=sync)
        for model, (stage, sync) in zip(models, [(s, p) for s in (1, 2) for p in ("params", "signs")], strict=True)
    ]
    for step in range(5):
        for number, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            if number < 2:
                for name in SHAPES:
                    getattr(model, name).grad = model.average_gradient(name, step, world_size)
            else:
                model(step, rank, world_size).backward()
            assert optimizer.clip_grad_norm_(MAX_NORM) > MAX_NORM
            optimizer.step()
            optimizer.zero_grad()
            assert_same_model(model, models[0])


def test_clipped(tmp_path: Path) -> None:
    run_ranks(body_clipped, 3, tmp_path)


def body_one_rank(rank: int, world_size: int) -> None:
    device = device_of(rank, world_size)
    for stage in (1, 2):
        model, expected = (Toy(100, MIXED, device) for _ in range(2))
        optimizer = ShardedLion(model.groups(), lr=0.01, stage=stage, param_sync="signs")
        lion = Lion(expected.groups(), lr=0.01)
        for step in range(3):
            for m, o in ((model, optimizer), (expected, lion)):
                m(step, rank, world_size).backward()
                o.step()
                o.zero_grad()
            assert_same_model(model, expected)
        optimizer.check_replicas()
        optimizer.resync()
        assert_same_momentum(optimizer.full_state_dict(), lion)


def test_one_rank(tmp_path: Path) -> None:
    run_ranks(body_one_rank, 1, tmp_path)


# -- What travels


def body_auto(rank: int, world_size: int) -> list[str]:
    """What is logged, and whether signs are sent."""
    logger, said = logging.getLogger("lion_dist"), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(f"{record.levelname}: {record.getMessage()}")  # type: ignore[method-assign]
    logger.addHandler(handler)
    p = nn.Parameter(torch.zeros(300, device=device_of(rank, world_size)))
    ShardedLion([p], stage=1)
    assert said == []  # not at the usual level
    logger.setLevel(logging.DEBUG)
    for sync in ("auto", "signs", "params"):
        optimizer = ShardedLion([p], stage=1, param_sync=sync)
        assert isinstance(optimizer._sync, GatherSigns) is (sync == "signs" or (sync == "auto" and world_size > 1))
    return said


@pytest.mark.parametrize(("world_size", "word"), [(1, "params"), (2, "signs")])
def test_auto_says_what_it_chose(world_size: int, word: str, tmp_path: Path) -> None:
    for said in run_ranks(body_auto, world_size, tmp_path):
        (line,) = said  # of the one that chose
        assert line.startswith(f"DEBUG: param_sync: {word}")


class Counter:
    """Bytes of the tensors handed to collectives, by kind. Of a gather: what it completes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes: dict[str, list[int]] = {"gather": [], "scatter": [], "reduce": [], "broadcast": []}
        for name, kind, which in [("_all_gather", "gather", 1), ("_reduce_scatter", "scatter", 2)]:
            monkeypatch.setattr(collectives, name, self.counting(getattr(collectives, name), kind, which))
        for name in ("all_reduce", "broadcast"):
            kind = name.removeprefix("all_")
            monkeypatch.setattr(collectives.dist, name, self.counting(getattr(dist, name), kind, 0))

    def counting(self, function: Callable[..., Any], kind: str, which: int) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            tensors = args[which] if isinstance(args[which], list) else [args[which]]
            self.bytes[kind].append(sum(t.numel() * t.element_size() for t in tensors))
            return function(*args, **kwargs)

        return counted


def body_bytes(rank: int, world_size: int) -> None:
    """fp32, stage 2. A parameter's gradient takes 4 bytes, and then 4 or 1/4; beside them padding of the pack, a
    footer or a checksum a rank, and one flag a parameter."""
    device = device_of(rank, world_size)
    unit = 128 * world_size
    shapes = [(20 * unit,), (33, 40), (3,)]
    numel = sum(torch.Size(s).numel() for s in shapes)
    tails = 33 * 40 % unit, 3
    padded = sum(-(-t // 128) * 128 for t in tails)
    padding = -(-padded // unit) * unit - sum(tails)
    for sync in ("signs", "params"):
        params = [nn.Parameter(torch.zeros(s, device=device)) for s in shapes]
        optimizer = ShardedLion(params, lr=LR, param_sync=sync)
        for step in range(3):
            with pytest.MonkeyPatch.context() as monkeypatch:
                counter = Counter(monkeypatch)
                torch.stack([(p * (step + 1)).sum() for p in params]).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            assert sum(counter.bytes["scatter"]) == 4 * (numel + padding)
            signs = (numel + padding) // 4 + world_size * FOOTER
            # With parameters the checksum of the step travels before them, and with signs among them.
            expected = [signs] if sync == "signs" else [8 * world_size, 4 * (numel + padding)]
            assert counter.bytes["gather"] == expected
            assert sum(counter.bytes["reduce"]) <= len(params) + 8
            assert not counter.bytes["broadcast"] or step == 0  # the order of readiness, once
        assert all((p == -3 * LR).all() for p in params)


@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_on_the_wire(world_size: int, tmp_path: Path) -> None:
    run_ranks(body_bytes, world_size, tmp_path)
