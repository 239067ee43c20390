"""Backward passes of stage 2, which differ from rank to rank.

A *scenario* says what every rank does in a step: backward passes over parameters, synchronised or not, in an order of
its own. Coefficients are world_size times small dyadic numbers, so that sums are exact in bfloat16 too, and every rank
can work out the average without communication.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.scenarios.toy import SHAPES, Toy, coefficient

TRAINABLE = [name for name in SHAPES if name != "frozen"]
# Bytes a bucket: everything in one; a few parameters; every parameter in a bucket of its own.
ONE, FEW, TINY = 64.0, 30_000 / 2**20, 1 / 2**20


@dataclass
class Pass:
    """One backward of one rank.

    uses: names of parameters, in the order of the forward; a name may stand several times.
    checkpointed: None, or use_reentrant of a checkpoint around every use.
    """

    uses: list[str]
    sync: bool = True
    checkpointed: bool | None = None


@dataclass
class Step:
    """The backward passes of one rank in a step; those ``abandoned`` are zeroed and not stepped."""

    passes: list[Pass] = field(default_factory=list)
    abandoned: list[Pass] = field(default_factory=list)
    zeroed_by: str = "optimizer"  # or "model"
    set_to_none: bool = True


Scenario = Callable[[int, int], Step]  # of step and rank


def some(step: int, rank: int, salt: int = 0, of: list[str] = TRAINABLE) -> list[str]:
    """Part of the parameters, other ones and in another order on every rank and step; at least one."""
    random = Random(step * 1000 + rank * 10 + salt)
    return random.sample(of, random.randint(1, len(of)))


def subsets(step: int, rank: int) -> Step:
    return Step([Pass(some(step, rank))])


def small_coefficient(p: Tensor, key: str, step: int, rank: int, world_size: int) -> Tensor:
    """world_size * k / 8 with k in [-2, 2]: a dozen of them add up exactly in bfloat16."""
    return (coefficient(key, p, step, rank, world_size) / 2).sign() * world_size / 4 * (1 + hash_bit(key, step))


def hash_bit(key: str, step: int) -> int:
    return (sum(map(ord, key)) + step) % 2


def backward(model: Toy, a_pass: Pass, salt: str, step: int, rank: int, world_size: int) -> None:
    loss = torch.zeros((), device=model.one.device)
    anchor = torch.zeros((), device=model.one.device, requires_grad=True)
    for i, name in enumerate(a_pass.uses):
        p = getattr(model, name)
        c = small_coefficient(p, f"{salt}{i}{name}", step, rank, world_size)

        def term(x: Tensor, p: Tensor = p, c: Tensor = c) -> Tensor:
            return x + (p * c).float().sum()

        if a_pass.checkpointed is None:
            loss = loss + term(anchor)
        else:
            loss = loss + checkpoint(term, anchor, use_reentrant=a_pass.checkpointed)
    loss.backward()


def averages(model: Toy, scenario: Scenario, step: int, world_size: int) -> dict[str, Tensor]:
    """The averaged gradients of the passes that are stepped, by name."""
    sums: dict[str, Tensor] = {}
    for rank in range(world_size):
        for number, a_pass in enumerate(scenario(step, rank).passes):
            for i, name in enumerate(a_pass.uses):
                p = getattr(model, name)
                c = small_coefficient(p, f"pass{number}{i}{name}", step, rank, world_size).float()
                sums[name] = sums[name] + c if name in sums else c
    return {name: (s / world_size).to(getattr(model, name).dtype) for name, s in sums.items()}
