"""Gradients with NaN, infinities and zeros among them, and training by signs with them against Lion."""

from __future__ import annotations

import torch
from torch import Tensor

from lion_dist import Lion, ShardedLion
from tests.asserts import assert_same_model, assert_same_momentum
from tests.harness import device_of
from tests.scenarios.passes import FEW, TRAINABLE, some
from tests.scenarios.toy import Toy, coefficient, hash_of, warm_up

STEPS = 20


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
