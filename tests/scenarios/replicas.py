"""A few replicated parameters under ShardedLion, for tests of ranks that disagree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_dist import ShardedLion
from tests.asserts import bits, momentum_parts
from tests.harness import device_of

LR = 0.25


def step_until_known(optimizer: ShardedLion, device: torch.device, max_norm: float | None = None) -> None:
    """Makes steps until one is refused: on a CPU the first, on a GPU one of the next, the same on every rank.

    The ranks still disagree in the further steps, so the gradients are clipped for each of them. Those of the first
    step are clipped already.
    """
    optimizer.step()
    assert device.type == "cuda", "the step was not refused"
    for _ in range(3):
        if max_norm is not None:
            optimizer.clip_grad_norm_(max_norm)
        optimizer.step()


class Trained:
    """Two fp32 parameters, one in bfloat16, and a small group; gradients that differ from step to step only."""

    def __init__(self, rank: int, world_size: int, stage: int, param_sync: str = "signs", **kwargs: Any) -> None:
        self.device = device_of(rank, world_size)
        shapes = [((700,), torch.float32), ((3, 129), torch.float32), ((40, 20), torch.bfloat16), ((5,), torch.float32)]
        self.stage, self.param_sync = stage, param_sync
        self.params = [nn.Parameter(torch.ones(s, dtype=d, device=self.device)) for s, d in shapes]
        groups: list[dict[str, Any]] = [{"params": self.params[:3]}, {"params": self.params[3:], "lr": 0.5}]
        self.optimizer = ShardedLion(groups, lr=LR, weight_decay=0.5, stage=stage, param_sync=param_sync, **kwargs)
        self.number = 0
        self.max_norm: float | None = None

    def gradients(self) -> None:
        self.number += 1
        generator = torch.Generator().manual_seed(self.number)
        grads = [torch.randint(-4, 5, p.shape, generator=generator).to(p.device, p.dtype) for p in self.params]
        if self.stage == 2:
            torch.stack([(p * g).float().sum() for p, g in zip(self.params, grads, strict=True)]).sum().backward()
        else:
            for p, g in zip(self.params, grads, strict=True):
                p.grad = g

        if self.max_norm is not None:
            self.optimizer.clip_grad_norm_(self.max_norm)

    def step(self) -> None:
        self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def refused(self) -> str:
        """Makes a step that must be refused on this rank, with no weight moved; returns what was said."""
        unchanged: list[Tensor] = list(self.params)
        if self.param_sync == "params" and self.device.type == "cpu":  # refused before the momenta change too
            unchanged += momentum_parts(self.optimizer)
        before = [bits(t) for t in unchanged]
        self.gradients()
        with pytest.raises(ValueError, match="made a step that differs from that of the group's first rank") as error:
            step_until_known(self.optimizer, self.device, self.max_norm)
        for t, b in zip(unchanged, before, strict=True):
            assert torch.equal(bits(t), b), "a weight or momentum moved"
        self.optimizer.zero_grad()
        return str(error.value)


def other_lr(group: dict[str, Any]) -> None:
    group["lr"] *= 1 + 2**-52
