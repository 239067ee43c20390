"""A model whose gradients are known exactly, so that training it can be compared bit for bit.

Its loss is linear: the sum over its parameters of parameter * coefficient, where the coefficients of a
step and rank are world_size times small dyadic numbers. The average over the ranks is then exact,
whatever the order of the reduction, and known to every rank without communication.

Shapes split badly on purpose, for 2, 3 and 4 ranks (heads are multiples of 256, 384 and 512 elements):
several heads, heads without a tail (3072 elements) and tails without a head, one element more and one
fewer than 128, a scalar, nothing at all, and a channels-last kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from lion_dist import Lion, ShardedLion
from lion_dist.update import reference

FP32 = (torch.float32,)
BF16 = (torch.bfloat16,)
MIXED = (torch.float32, torch.bfloat16, torch.float16)
MAX_NORM = 5.0

SHAPES: dict[str, tuple[int, ...]] = {
    "embedding": (100, 71),  # used twice, as tied weights are
    "square": (64, 48),
    "kernel": (8, 6, 5, 5),
    "frozen": (33, 10),
    "unused": (40, 40),
    "sometimes": (300,),
    "bias": (129,),
    "short": (127,),
    "one": (1,),
    "scalar": (),
    "empty": (0, 3),
}


class Toy(nn.Module):
    embedding: nn.Parameter
    square: nn.Parameter
    kernel: nn.Parameter
    frozen: nn.Parameter
    one: nn.Parameter

    def __init__(self, seed: int, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for i, (name, shape) in enumerate(SHAPES.items()):
            value = torch.randn(shape, generator=generator).to(dtypes[i % len(dtypes)])
            if name == "kernel":
                value = value.contiguous(memory_format=torch.channels_last)
            setattr(self, name, nn.Parameter(value.to(device), requires_grad=name != "frozen"))

    def used(self, step: int) -> list[str]:
        return [n for n in SHAPES if n not in ("frozen", "unused") and (n != "sometimes" or step % 3 == 1)]

    def forward(self, step: int, rank: int, world_size: int) -> Tensor:
        loss = torch.zeros((), device=self.one.device)
        for name in self.used(step):
            p = getattr(self, name)
            term = (p * coefficient(name, p, step, rank, world_size)).float().sum()
            loss = loss + term
            if name == "embedding":
                loss = loss + (p * coefficient("again", p, step, rank, world_size)).float().sum()
        return loss

    def average_gradient(self, name: str, step: int, world_size: int) -> Tensor | None:
        """The average of p.grad over the ranks, or None."""
        if name not in self.used(step):
            return None
        p = getattr(self, name)
        names = [name, "again"] if name == "embedding" else [name]
        terms = [coefficient(n, p, step, r, world_size).float() for n in names for r in range(world_size)]
        return (torch.stack(terms).sum(0) / world_size).to(p.dtype)

    def groups(self) -> list[dict]:
        """Decay for matrices, none for the rest, at another lr; and one parameter in a group of its own."""
        named = dict(self.named_parameters())
        own = [named.pop("short")]
        return [
            {"params": [p for p in named.values() if p.dim() >= 2], "weight_decay": 0.3},
            {"params": [p for p in named.values() if p.dim() < 2], "lr": 3e-3},
            {"params": own, "betas": (0.95, 0.98), "maximize": True},
        ]


def coefficient(name: str, p: Tensor, step: int, rank: int, world_size: int) -> Tensor:
    """world_size * k/4 with k in [-8, 8]: few bits, and sums that 16-bit floats hold exactly."""
    seed = hash_of(name) + 7919 * step + 104729 * rank
    generator = torch.Generator().manual_seed(seed)
    k = torch.randint(-8, 9, p.shape, generator=generator)
    return (world_size * k / 4).to(p.device, p.dtype)


def hash_of(name: str) -> int:
    return sum((i + 1) * ord(c) for i, c in enumerate(name))


def wrapped(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, find_unused_parameters=True)


def warm_up(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 7))


def train(model: Toy, ddp: nn.Module, optimizer: Any, scheduler: Any, steps: range, clip: bool = False) -> list[Tensor]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    norms = []
    for step in steps:
        ddp(step, rank, world_size).backward()
        if clip:
            norms.append(optimizer.clip_grad_norm_(MAX_NORM))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return norms


def expect(
    model: Toy, optimizer: Lion | ShardedLion, scheduler: Any, steps: range, world_size: int, clip: bool = False
) -> list[Tensor]:
    """The same training on one process: Lion over the averaged gradient, clipped by the reference's coefficient."""
    norms = []
    for step in steps:
        for name in SHAPES:
            getattr(model, name).grad = model.average_gradient(name, step, world_size)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if clip:
            total = torch.stack([reference.sum_of_squares(g) for g in grads]).sum()
            norm, coefficient = reference.clip_coefficient(total, MAX_NORM)
            norms.append(norm)
            for g in grads:
                assert g.dtype == torch.float32  # in 16 bits the product would be rounded once more
                g.mul_(coefficient)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return norms
