"""Parameters under ShardedLion, stage 2, beside their copies under Lion: what the tests of stage 2's life share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d

from lion_dist import Lion, ShardedLion
from tests.bits import assert_same_bits
from tests.distributed.test_sharded_lion import assert_same_momentum
from tests.distributed.test_stage2 import TINY
from tests.distributed.toy import coefficient
from tests.harness import device_of

# Heads and tails, tails alone, and a small sentinel.
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
