"""Parameters under ShardedLion, stage 2, beside their copies under Lion: what the tests of stage 2's life share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d

from lion_dist import Lion, ShardedLion
from lion_dist.update import reference
from tests.asserts import assert_same_bits, assert_same_momentum
from tests.harness import device_of
from tests.scenarios.passes import TINY
from tests.scenarios.toy import coefficient

# Heads and tails, tails alone, and a small sentinel.
SIZES: tuple[tuple[int, ...], ...] = ((40, 33), (300,), (24, 48), (129,), (3,))
LR = 0.25
SHORT = timedelta(seconds=6)  # for tests on gloo that wait for it: a GPU that many processes share may take longer


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


ALL = list(range(len(SIZES)))


def model_of(pair: Pair) -> nn.Module:
    """A module of the parameters, with a zero_grad() of its own."""
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


# Each an interval: for each pass, the parameters that it reaches on each of three ranks.
FULL = [ALL, ALL, ALL]


def make_interval(pair: Pair, step: int, interval: Sequence[Sequence[Sequence[int]]]) -> None:
    """The backward passes of an interval, and what Lion is to step by."""
    for number, uses in enumerate(interval):
        if uses[pair.rank]:
            pair.backward(10 * step + number, uses[pair.rank])
        expect_uses(pair, 10 * step + number, uses)


def clip_both(pair: Pair, max_norm: float) -> None:
    grads = [p.grad for p in pair.copies if p.grad is not None]
    zero = torch.zeros((), dtype=torch.float64, device=pair.device)
    total = torch.stack([zero, *map(reference.sum_of_squares, grads)]).sum()
    norm, scale = reference.clip_coefficient(total, max_norm)
    assert_same_bits(pair.sharded.clip_grad_norm_(max_norm), norm, "norm")
    for g in grads:
        g.mul_(scale)


def run_bodies(
    rank: int, world_size: int, bodies: Sequence[Callable[[int, int], object]], dtype: torch.dtype = torch.float32
) -> None:
    """Runs several tests on ranks that are started once, with pairs of this dtype."""
    Pair.dtype = dtype  # of this process
    for body in bodies:
        try:
            body(rank, world_size)
        except Exception as error:
            raise AssertionError(body.__name__) from error


# For tests that run in float32 on two or three ranks elsewhere.
other_ranks_and_dtypes = pytest.mark.parametrize(
    ("world_size", "dtype"),
    [
        pytest.param(2, torch.bfloat16, id="2-bf16", marks=pytest.mark.exhaustive),
        pytest.param(3, torch.bfloat16, id="3-bf16"),
        pytest.param(4, torch.bfloat16, id="4-bf16", marks=pytest.mark.exhaustive),
        pytest.param(4, torch.float32, id="4-fp32"),
    ],
)
